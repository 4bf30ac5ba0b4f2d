"""The registry: everything that is measured side by side, and what each one needs to run."""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import torch

from benchmarks.layer import genft, lora, third_party
from benchmarks.layer.cases import Case
from benchmarks.layer.problem import Problem
from benchmarks.measure.environment import version
from benchmarks.measure.workload import Workload
from genft_kernels import backends

# Whose time the others' is divided by, and the big products alone: without dyᵀ·x, and with it.
BASELINE, FLOORS = "peft-lora", ("two-product-floor", "three-product-floor")
Obstacle = Callable[[Case, torch.device], str | None]


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
    obstacle: Obstacle = lambda case, device: None
    part: str = "layer"
    rank: Callable[[Case], int] | None = None
    floor: Callable[[Case], str | None] = lambda case: FLOORS[0]
    updates: bool = True


def _floor_of_form(case: Case) -> str:
    return FLOORS[0] if case.form == "factored" else FLOORS[1]


# --- obstacles ------------------------------------------------------------------------------------------------------


def _of_backend(case: Case, device: torch.device, backend: str) -> str | None:
    return backends.unavailable(backend, device, case.dtype)


def _of_peft(case: Case, device: torch.device, only_16_bits: bool = False) -> str | None:
    if only_16_bits and case.dtype == torch.float32:
        return "x is float32, so it is peft-lora itself"
    return None if version("peft") else "PEFT is not installed (pip install peft)"


def _of_package(case: Case, device: torch.device, load: Callable[[], object], needs_cuda: bool = False) -> str | None:
    if needs_cuda and device.type != "cuda":
        return "its kernels need a CUDA device"
    try:
        load()
    except third_party.Missing as reason:
        return str(reason)
    return None


# --- the registry ---------------------------------------------------------------------------------------------------


def _genft(part: str) -> Iterable[Provider]:
    """One part of GenFT in every backend."""
    build = {"layer": genft.layer, "generation": genft.generation, "token side": genft.token_side}[part]
    for backend in backends.OPERATION_BACKENDS:
        name, title = f"genft-{backend}", f"GenFT {backend}"
        if part != "layer":
            name, title = f"{name}-{part.replace(' ', '-')}", f"{title}, {part} alone"
        yield Provider(
            name, title, functools.partial(build, backend=backend), functools.partial(_of_backend, backend=backend),
            part, floor=(lambda case: None) if part == "generation" else _floor_of_form, updates=part != "generation",
        )  # fmt: skip


def _loras() -> Iterable[Provider]:
    """Each LoRA at two ranks: GenFT's k, and that of equal trainable parameters."""
    partial = functools.partial
    unsloth, nemo = (partial(_of_package, load=load) for load in (third_party.unsloth, third_party.nemo))
    float32, nemo_triton = partial(lora.peft, dtype=torch.float32), partial(lora.nemo, triton=True)
    ways = [
        ("peft-lora", "PEFT LoRA", lora.peft, _of_peft),
        ("peft-lora-float32", "PEFT LoRA, float32 adapters", float32, partial(_of_peft, only_16_bits=True)),
    ]
    functions = [
        (f"fused-lora-{backend}", f"LoRA by factored_linear, {backend}", partial(lora.fused, backend=backend),
         partial(_of_backend, backend=backend))
        for backend in backends.OPERATION_BACKENDS
    ]  # fmt: skip
    functions += [
        ("hand-lora", "LoRA, gradients by hand", lora.hand_derived, lambda case, device: None),
        ("unsloth-lora", "unsloth LoRA_W", lora.unsloth, unsloth),
        ("nemo-lora", "NeMo Automodel LoRA, PyTorch", partial(lora.nemo, triton=False), nemo),
        ("nemo-lora-triton", "NeMo Automodel LoRA, Triton", nemo_triton, partial(nemo, needs_cuda=True)),
    ]
    ways += [(name, title, partial(lora.way, forward=function), needs) for name, title, function, needs in functions]
    ways += [("unsloth-qkv", "unsloth LoRA_QKV, a third of it", lora.unsloth_qkv, unsloth)]
    ranks: dict[str, Callable[[Case], int]] = {
        "": lambda case: case.k, "equal parameters": lambda case: case.rank_of_equal_parameters,
    }  # fmt: skip
    for remark, rank in ranks.items():
        for name, title, build, obstacle in ways:
            if remark:
                name, title = f"{name}-{remark.replace(' ', '-')}", f"{title}, {remark}"
            yield Provider(name, title, partial(_with_rank, build=build, rank=rank), obstacle, rank=rank)


def _with_rank(problem: Problem, build: Callable[..., Workload], rank: Callable[[Case], int]) -> Workload:
    return build(problem, rank(problem.case))


def _registry() -> Iterable[Provider]:
    """Providers that the gate holds to one formula stand together: it is evaluated once for all of them."""
    partial = functools.partial
    two, three = FLOORS
    yield Provider(two, "floor: x·Wᵀ and dy·W alone", partial(genft.floor, products=2), updates=False)
    yield Provider(
        three, "floor: x·Wᵀ, dy·W and dyᵀ·x alone", partial(genft.floor, products=3), floor=lambda case: three,
        updates=False,
    )  # fmt: skip
    yield Provider("frozen", "frozen nn.Linear", genft.frozen, updates=False)
    yield from _genft("layer")
    yield from _genft("generation")
    official = partial(genft.official, compiled=False)
    yield Provider("official", "GenFT, official way", official, floor=_floor_of_form)
    compiled = partial(genft.official, compiled=True)
    yield Provider("official-compiled", "GenFT, official way, torch.compile", compiled, floor=_floor_of_form)
    yield from _genft("token side")
    yield from _loras()


PROVIDERS = {provider.name: provider for provider in _registry()}
