"""The registry: everything that is measured side by side, and what each one needs to run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import torch

from benchmarks.layer import genft as genft_providers
from benchmarks.layer import lora as lora_providers
from benchmarks.layer import third_party
from benchmarks.layer.cases import Case
from benchmarks.layer.problem import Problem
from benchmarks.measure.workload import Workload
from genft_kernels import backends

# What the others' time is divided by, pair by pair, where it ran.
BASELINES = ("two-product-floor", "three-product-floor", "frozen", "peft-lora", "official")


def _always(name: str | None, case: Case) -> str | None:
    return name


def _floor_of_form(case: Case) -> str | None:
    return "two-product-floor" if case.form == "factored" else "three-product-floor"


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to compute a layer.

    Args:
        name: unique in the registry.
        title: as tables show it.
        build: its workload for a problem.
        obstacle: why it cannot run a case on a device, or None.
        part: "layer" is all that a forward and backward do; "generation" and "token side" are GenFT's two halves.
        rank: of a LoRA, for a case.
        floor: the name of the floor that it is measured by, for a case; generation has none among a layer's products.
        updates: whether its y is a frozen layer's with an update.
    """

    name: str
    title: str
    build: Callable[[Problem], Workload]
    obstacle: Callable[[Case, torch.device], str | None] = lambda case, device: None
    part: str = "layer"
    rank: Callable[[Case], int] | None = None
    floor: Callable[[Case], str | None] = functools.partial(_always, "two-product-floor")
    updates: bool = True


def select(names: Iterable[str]) -> list[Provider]:
    """Providers by name; an unknown one raises KeyError naming it."""
    return [PROVIDERS[name] for name in names]


def _backend_obstacle(case: Case, device: torch.device, backend: str) -> str | None:
    return backends.unavailable(backend, device, case.dtype)


def _genft(part: str) -> Iterable[Provider]:
    """One part of GenFT in every backend."""
    build = {
        "layer": genft_providers.layer, "generation": genft_providers.generation,
        "token side": genft_providers.token_side,
    }[part]  # fmt: skip
    for backend in backends.OPERATION_BACKENDS:
        whole, generates = part == "layer", part == "generation"
        yield Provider(
            f"genft-{backend}" + ("" if whole else f"-{part.replace(' ', '-')}"),
            f"GenFT {backend}" + ("" if whole else f", {part} alone"),
            functools.partial(build, backend=backend), functools.partial(_backend_obstacle, backend=backend), part,
            floor=functools.partial(_always, None) if generates else _floor_of_form, updates=not generates,
        )  # fmt: skip


def _lora() -> Iterable[Provider]:
    """Each LoRA at two ranks: GenFT's k, and that of equal trainable parameters."""
    ours = [
        (
            f"fused-lora-{backend}", f"LoRA by factored_linear, {backend}",
            functools.partial(lora_providers.fused, backend=backend),
            functools.partial(_backend_obstacle, backend=backend),
        )
        for backend in backends.OPERATION_BACKENDS
    ]  # fmt: skip
    ways = [
        ("peft-lora", "PEFT LoRA", _peft, _needs_peft),
        ("peft-lora-float32", "PEFT LoRA, float32 adapters", _peft_float32, _needs_peft_and_16_bits),
        *ours,
        ("hand-lora", "LoRA, gradients by hand", lora_providers.hand_derived, _nothing),
        ("unsloth-lora", "unsloth LoRA_W", lora_providers.unsloth, _needs_unsloth),
        ("unsloth-qkv", "unsloth LoRA_QKV, a third of it", lora_providers.unsloth_qkv, _needs_unsloth),
        ("nemo-lora", "NeMo Automodel LoRA, PyTorch", _nemo, _needs_nemo),
        ("nemo-lora-triton", "NeMo Automodel LoRA, Triton", _nemo_triton, _needs_nemo_triton),
    ]
    for suffix, remark, rank in (
        ("", "", lambda case: case.k),
        ("-equal-parameters", ", equal parameters", lambda case: case.rank_of_equal_parameters),
    ):
        for name, title, build, obstacle in ways:
            yield Provider(
                name + suffix, title + remark, functools.partial(_with_rank, build=build, rank=rank), obstacle,
                rank=rank,
            )  # fmt: skip


def _with_rank(problem: Problem, build: Callable[..., Workload], rank: Callable[[Case], int]) -> Workload:
    return build(problem, rank=rank(problem.case))


def _peft(problem: Problem, rank: int) -> Workload:
    return lora_providers.peft(problem, rank, problem.case.dtype)


def _peft_float32(problem: Problem, rank: int) -> Workload:
    return lora_providers.peft(problem, rank, torch.float32)


def _nemo(problem: Problem, rank: int) -> Workload:
    return lora_providers.nemo(problem, rank, triton=False)


def _nemo_triton(problem: Problem, rank: int) -> Workload:
    return lora_providers.nemo(problem, rank, triton=True)


def _nothing(case: Case, device: torch.device) -> None:
    return None


def _needs_peft(case: Case, device: torch.device) -> str | None:
    return None if third_party.version("peft") else "PEFT is not installed (pip install peft)"


def _needs_peft_and_16_bits(case: Case, device: torch.device) -> str | None:
    same = case.dtype == torch.float32
    return "x is float32, so it is peft-lora itself" if same else _needs_peft(case, device)


def _needs_unsloth(case: Case, device: torch.device) -> str | None:
    return _missing(third_party.unsloth)


def _needs_nemo(case: Case, device: torch.device) -> str | None:
    return _missing(third_party.nemo)


def _needs_nemo_triton(case: Case, device: torch.device) -> str | None:
    return "its kernels need a CUDA device" if device.type != "cuda" else _missing(third_party.nemo)


def _missing(load: Callable[[], object]) -> str | None:
    try:
        load()
    except third_party.Missing as reason:
        return str(reason)
    return None


def _registry() -> Iterable[Provider]:
    """Those that the gate holds to one formula stand together: it is evaluated once for all of them."""
    for name, products, title in (
        ("two-product-floor", 2, "floor: x·Wᵀ and dy·W alone"),
        ("three-product-floor", 3, "floor: x·Wᵀ, dy·W and dyᵀ·x alone"),
    ):
        build, itself = functools.partial(genft_providers.floor, products=products), functools.partial(_always, name)
        yield Provider(name, title, build, floor=itself, updates=False)
    yield Provider("frozen", "frozen nn.Linear", genft_providers.frozen, updates=False)
    yield from _genft("layer")
    yield from _genft("generation")
    for name, title, compiled in (
        ("official", "GenFT, official way", False),
        ("official-compiled", "GenFT, official way, torch.compile", True),
    ):
        yield Provider(
            name, title, functools.partial(genft_providers.official, compiled=compiled), floor=_floor_of_form
        )
    yield from _genft("token side")
    yield from _lora()


PROVIDERS = {provider.name: provider for provider in _registry()}
