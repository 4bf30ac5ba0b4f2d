"""Adapters in PEFT's LoRA format, which LoRA servers load: `export_lora`.

In the factored form dW *is* a product of thin factors, so it is written as it stands (docs/method.md#factored-form);
a tiled update has full rank, and only its largest singular values can be written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..adapted_model import Adapted, adapted_layers, adapter_state, check_enabled
from ..arguments import check_type, is_finite, is_integer
from ..experts.update import ExpertUpdate
from ..frozen_weight import FrozenWeight
from ..matching import Names
from ..modules import GenFTLinear
from ..sharing.source import is_tensor_subclass
from . import folder
from .format import CONFIG_FILE, TENSORS_FILE, is_ours
from .lora_check import check_by_peft
from .lora_experts import StackedUpdate, exact_stack, lora_names, target_parameters
from .names import PEFT_WRAPPER
from .thin_update import ThinUpdate, exact, largest

# What vLLM's --max-lora-rank may be.
SERVER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# What vLLM serves of `modules_to_save`, in its newer versions.
SERVED_MODULES = ("classifier", "score")


@dataclasses.dataclass(frozen=True)
class LoraExport:
    """An export as it was written; as a string, what a person has to know about it."""

    directory: Path
    rank: int
    energy: dict[str, float]  # by layer, the share of |dW|^2 that is kept; 1 where the export is exact
    modules_to_save: tuple[str, ...]
    drift: float | None  # of the logits by PEFT, relative; None if no inputs were given

    @property
    def server_rank(self) -> int | None:
        """The smallest `--max-lora-rank` with which vLLM serves it, None if there is none."""
        return next((rank for rank in SERVER_RANKS if rank >= self.rank), None)

    def __str__(self) -> str:
        lines = [f"{self.directory}: LoRA of rank {self.rank} for {len(self.energy)} layers"]
        if self.server_rank is None:
            lines.append(f"vLLM serves ranks up to {SERVER_RANKS[-1]} only: export with a smaller rank=")
        else:
            lines.append(f"vLLM: --max-lora-rank {self.server_rank} or more")
        if min(self.energy.values()) < 1:
            lines += [f"energy kept: {energy:.4f} {path}" for path, energy in self.energy.items()]
        if self.modules_to_save:
            lines.append(
                f"modules_to_save: {', '.join(self.modules_to_save)}; PEFT loads them, newer vLLM those named "
                f"{' or '.join(SERVED_MODULES)} and nothing else: for other servers write merged weights"
            )
        lines.append(
            "logits not checked: no inputs" if self.drift is None else f"drift of the logits: {self.drift:.1e}"
        )
        return "\n".join(lines)


def export_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    inputs: Any = None,
) -> LoraExport:
    """Write the adapter of `model` to `directory` as a LoRA adapter in PEFT's format.

    Exact where the outer activation is the identity: the update that answers in evaluation, biases included, is a LoRA
    of rank k for each adapted block of a fused weight (of a sum 2 k; biases add one, to a sum two). All layers get one
    rank, the shorter ones zero rows; `lora_alpha` equals it and `scaling` is folded in, because servers ignore patterns
    of ranks. Stacked experts are written in PEFT's form for `target_parameters`, exact ones only; PEFT reads it, of
    servers not all do.

    Args:
        rank: write this rank, by a truncated singular value decomposition where the update has a higher one.
        energy: in (0, 1]: for each layer the least rank that keeps this share of |dW|^2.
        inputs: of the model (a mapping for keywords, a tuple for several): PEFT loads what is to be written into a
            copy of the frozen model, and its updates and logits must agree with this model's before anything is
            written. The logits of a truncated update are compared only.

    Raises:
        ValueError: the outer activation is not the identity and neither `rank` nor `energy` is given; a bad argument;
            a weight or a unit that is not finite; a layer or a module that LoRA cannot name; `directory` holds an
            adapter of this package.
        RuntimeError: the model has no adapter, is merged, sharded, offloaded, or within `disabled`; or PEFT's answer
            differs by more than rounding.
        ImportError: `inputs` are given, and PEFT is not installed.
    """
    check_type("directory", directory, (str, os.PathLike))
    directory, layers = Path(directory), _exportable_layers(model)
    check_size(rank, energy)
    _check_names(model, layers)
    if is_ours(directory):
        raise ValueError(f"{directory} holds an adapter of this package: choose another folder for the export")
    stacks = {path: layer for path, layer in layers.items() if isinstance(layer, ExpertUpdate)}
    linear = {path: layer for path, layer in layers.items() if isinstance(layer, GenFTLinear)}
    factors = {path: _thin_update(path, layer, rank, energy) for path, layer in linear.items()}
    stacked = {name: exact_stack(path, stacks[path], rank, energy) for path, name in lora_names(stacks).items()}
    made: dict[str, ThinUpdate | StackedUpdate] = {**factors, **stacked}
    highest = int(rank or max(each.rank for each in made.values()))
    tensors = {}
    for name, each in made.items():
        down, up, *_ = each.padded(highest)
        tensors[f"{PEFT_WRAPPER}{name}.lora_A.weight"], tensors[f"{PEFT_WRAPPER}{name}.lora_B.weight"] = down, up
    saved = tuple(adapter_state(model).saved_modules)
    for path in saved:
        for name, tensor in model.get_submodule(path).state_dict().items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"modules_to_save: {path!r} has a state that is no tensor: {name!r}")
            tensors[f"{PEFT_WRAPPER}{path}.{name}"] = tensor
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = {
        TENSORS_FILE: safetensors.torch.save(tensors, {"format": "pt"}),
        CONFIG_FILE: (json.dumps(_description(model, linear, stacks, saved, highest), indent=2) + "\n").encode(),
    }
    kept = {path: each.energy for path, each in factors.items()} | dict.fromkeys(stacks, 1.0)
    drift = None
    if inputs is not None:
        with tempfile.TemporaryDirectory() as temporary:
            for name, payload in content.items():
                Path(temporary, name).write_bytes(payload)
            drift = check_by_peft(model, temporary, inputs, kept)
    _write(directory, content)
    return LoraExport(directory, highest, kept, saved, drift)


@torch.no_grad()
def _thin_update(path: str, layer: GenFTLinear, rank: int | None, energy: float | None) -> ThinUpdate:
    """The layer's update, exact or, where `rank` or `energy` allow less, its largest singular values."""
    if layer.config.outer_activation == "identity":
        return exact(layer.updates.values()).truncated(rank, energy)
    if rank is None and energy is None:
        raise ValueError(
            f"{path!r}: with outer_activation={layer.config.outer_activation!r} the update has full rank and is no "
            "LoRA. Either write merged weights, by remove_genft(model, keep_update=True) and save_pretrained, or "
            "truncate it, by rank= or energy="
        )
    return largest(torch.linalg.svd(layer.delta_weight(), full_matrices=False), rank, energy)


def _description(
    model: nn.Module, linear: dict[str, GenFTLinear], stacks: dict[str, ExpertUpdate], saved: tuple[str, ...], rank: int
) -> dict[str, Any]:
    """PEFT's LoraConfig."""
    transposed = bool(linear) and all(layer.stored_transposed for layer in linear.values())
    if stacks and transposed:
        raise ValueError("PEFT has no LoRA for transformers' Conv1D and stacked experts in one adapter")
    of_experts = {"target_parameters": target_parameters(model, stacks)} if stacks else {}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": _target_modules(model, set(linear)),
        "modules_to_save": list(saved) or None,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        **of_experts,
    }


def _target_modules(model: nn.Module, paths: set[str]) -> list[str]:
    """The layers' last names where they mean these layers and no others, else their paths."""
    names = Names(name for name, _ in model.named_modules() if name)
    for candidates in (sorted({path.rpartition(".")[2] for path in paths}), sorted(paths)):
        if names.matching(candidates) == paths:
            return candidates
    extra = sorted(names.matching(paths) - paths)
    raise ValueError(f"PEFT would adapt {extra[0]!r} as well: its name ends in that of an adapted layer")


def _exportable_layers(model: nn.Module) -> dict[str, Adapted]:
    adapter_state(model)
    check_enabled(model)
    layers = adapted_layers(model)
    for path, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"{path!r} is merged: call unmerge(model) first")
        sources = [update.source() for update in layer.updates.values()]
        tensors = [thin for source in sources for thin in source.thin]
        if not isinstance(layer.frozen_weight, FrozenWeight):  # whose codes are neither sharded here nor NaN
            tensors.append(layer.stored_weight)
        for tensor in tensors:
            if tensor.device.type == "meta":
                raise RuntimeError(f"{path!r} is on the meta device: bring the offloaded model back first")
            if is_tensor_subclass(tensor):
                raise RuntimeError(f"{path!r} is sharded ({type(tensor).__name__}): gather it first")
            if not tensor.isfinite().all():
                raise ValueError(f"{path!r}: its weight, its units or its generator's hold NaN or infinity")
    return layers


def _check_names(model: nn.Module, layers: dict[str, Adapted]) -> None:
    """Raise ValueError for what PEFT could not load as it is here."""
    for path, layer in adapted_layers(model, remove_duplicate=False).items():
        if path not in layers:
            first = next(name for name, other in layers.items() if other is layer)
            raise ValueError(f"{path!r} is the same module as {first!r}: PEFT would adapt only one of them")
    saved = tuple(adapter_state(model).saved_modules)
    for name, _ in model.named_modules():
        if saved and name.endswith(saved) and name not in saved:  # PEFT's rule, without a dot
            raise ValueError(f"modules_to_save: PEFT would take {name!r} as well, whose name ends in one of {saved}")


def check_size(rank: int | None, energy: float | None) -> None:
    """Raise ValueError unless they are what `export_lora` may be given."""
    if rank is not None and energy is not None:
        raise ValueError("give rank or energy, not both")
    if rank is not None and not (is_integer(rank) and rank >= 1):
        raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")
    if energy is not None and not (is_finite(energy) and 0 < energy <= 1):
        raise ValueError(f"energy must be a number in (0, 1], got {energy!r}")


def _write(directory: Path, content: dict[str, bytes]) -> None:
    """Put the files into `directory`, where in between there is no description that could be taken for theirs."""
    directory.mkdir(parents=True, exist_ok=True)
    with folder.only_saver(directory):
        staged = {directory / name: folder.stage(directory / name, payload) for name, payload in content.items()}
        (directory / CONFIG_FILE).unlink(missing_ok=True)
        for path, place in staged.items():  # the description last
            folder.put(place, path)
