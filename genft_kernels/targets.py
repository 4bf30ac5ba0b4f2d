"""Which modules of a model a configuration names, by PEFT's rules, and what to say when it names none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .adaptable import check_adaptable, is_conv1d
from .arguments import about, listing, shown, warn
from .config import ALL_LINEAR, QUERY_AND_VALUE_NAMES, GenFTConfig
from .frozen_weight import FrozenWeight, blocks_gradients, is_kind_of_layer, kind_name, without_dense
from .heads import heads
from .matching import FullMatch, Names, ends, held_at, upwards
from .row_blocks import RowBlocks

if TYPE_CHECKING:
    from .experts.targets import ExpertTarget

_NAMED = 6  # in a message

# Classes of transformers that read weights of their layers without calling the layers, some only where fused kernels
# are installed. By name, so that transformers need not be imported.
READ_UNCALLED = {
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "MambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "FalconMambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "JambaMambaMixer": ("dt_proj",),
    "Mamba2Mixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "NemotronHMamba2Mixer": ("out_proj",),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "MobileBertLMPredictionHead": ("dense", "decoder"),
}


class Target(NamedTuple):
    """A linear layer to adapt."""

    names: tuple[str, ...]  # every path at which the model holds it
    module: nn.Module
    blocks: RowBlocks

    @property
    def name(self) -> str:
        """The first of the paths, under which its parameters are listed."""
        return self.names[0]

    def blocks_by_shape(self) -> dict[tuple[int, int], RowBlocks]:
        """The adapted blocks by their (in, out): one generator each. ValueError if they do not make up W's rows."""
        out_features, in_features = weight_of(self.module).shape
        with about(f"target module {self.name!r}"):
            return {(in_features, rows): blocks for rows, blocks in self.blocks.by_rows(out_features).items()}


def find_targets(model: nn.Module, config: GenFTConfig, full_matches: FullMatch) -> list[Target]:
    """The layers that `config` adapts, in the model's order.

    A string in `target_modules` or `exclude_modules` is a regular expression for whole paths; in a list, each entry
    is a path or its dotted end (as in PEFT).

    Raises:
        ValueError: nothing matches, a matched module cannot be adapted, or an entry of `fused_blocks` is unused.
        TypeError: a matched module is of a kind that cannot be adapted. Each message names the module.
    """
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    names = Names(modules, full_matches)
    wanted = config.target_modules
    if wanted is None:
        wanted = (*QUERY_AND_VALUE_NAMES, *(config.fused_blocks or ()))
    chosen = _all_linear(model, config, names) if wanted == ALL_LINEAR else names.matching(wanted)
    chosen -= names.matching(config.exclude_modules)
    paths = held_at((name, module) for name, module in modules.items() if name in chosen)
    if not paths:
        raise ValueError(_nothing_matched(model, config, wanted, names))
    targets = []
    for module, at in paths.items():
        try:
            check_adaptable(module)
            weight_of(module)  # a quantised one is made dense once, to try
            for name in at:
                check_called(model, name)
        except (TypeError, ValueError) as error:
            hint = " (exclude_modules leaves it out)" if config.target_modules == ALL_LINEAR else ""
            raise type(error)(f"target module {at[0]!r}: {error}{hint}") from None
        targets.append(Target(tuple(at), module, blocks_of(config, at[0])))
    named = {end for target in targets for end in ends(target.name)}
    unused = [entry for entry in config.fused_blocks or {} if entry not in named]
    if unused:
        listed = listing((target.name for target in targets), _NAMED)
        raise ValueError(f"fused_blocks[{unused[0]!r}] names no target module; targets are {listed}")
    check_gradients_pass(model, {target.module: target.name for target in targets})
    return targets


def blocks_of(config: GenFTConfig, path: str) -> RowBlocks:
    """The blocks of the layer at a path: by the longest of the entries of `fused_blocks` that name it, if any does."""
    fused: Mapping[str, Any] = config.fused_blocks or {}
    return next((fused[end] for end in ends(path) if end in fused), RowBlocks())


def find_modules_to_save(model: nn.Module, config: GenFTConfig, targets: Iterable[Target | ExpertTarget]) -> list[str]:
    """Paths of the modules that `config` trains in full.

    Raises:
        ValueError: an entry matches nothing, or a match overlaps a target or another match.
    """
    if not config.modules_to_save:
        return []
    names = Names(name for name, _ in model.named_modules(remove_duplicate=False) if name)
    found: dict[str, None] = {}
    for entry in config.modules_to_save:
        matches = names.ending_in(entry)
        if not matches:
            raise ValueError(f"modules_to_save: {entry!r} matches no module of the model")
        found |= dict.fromkeys(matches)
    adapted = dict.fromkeys(path for target in targets for path in target.names)
    for inside in (*found, *adapted):
        for outside in upwards(inside):
            if outside in found and (outside != inside or inside in adapted):
                raise ValueError(f"modules_to_save: {outside!r} contains {inside!r}, which is chosen as well")
    return list(found)


def weight_of(module: nn.Module) -> torch.Tensor | FrozenWeight:
    """W [out, in] of a target: a view where it is stored transposed, a handle where it is quantised."""
    if (quantised := FrozenWeight.of(module)) is not None:
        return quantised
    weight = module.get_parameter("weight")
    return weight if isinstance(module, nn.Linear) else weight.t()


def check_called(model: nn.Module, path: str) -> None:
    """Raise TypeError if the module's owner is known to read its weight past its forward, and so past an update."""
    parent, _, name = path.rpartition(".")
    owner, cure = model.get_submodule(parent), "choose others"
    uncalled = READ_UNCALLED.get(type(owner).__name__, ())
    if type(owner).forward is nn.TransformerEncoderLayer.forward and torch.backends.mha.get_fastpath_enabled():
        uncalled = ("linear1", "linear2")  # in evaluation
        cure = "call torch.backends.mha.set_fastpath_enabled(False) wherever the adapter is used"
    if name in uncalled:
        kind = type(owner).__name__
        raise TypeError(f"{kind} reads its weight without calling it, where an update would be ignored: {cure}")


def _all_linear(model: nn.Module, config: GenFTConfig, names: Names) -> set[str]:
    """Paths of the linear layers, without the output embedding and what is within `modules_to_save`."""
    output_embedding = getattr(model, "get_output_embeddings", lambda: None)()
    saved = names.matching(config.modules_to_save) | set(heads(model))
    return {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if _is_linear(module) and module is not output_embedding
        if name and saved.isdisjoint(upwards(name))
    }


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear) or is_conv1d(module) or is_kind_of_layer(module):
        return True
    return without_dense(module) is not None and not any(module.children())  # it is refused later, by name


def check_gradients_pass(model: nn.Module, adapted: Mapping[nn.Module, str]) -> None:
    """Raise TypeError if a layer after a target, in the model's order, is known to let no gradient through."""
    below = None
    for name, module in model.named_modules():
        below = below or adapted.get(module)
        if below is not None and module not in adapted and (reason := blocks_gradients(module)) is not None:
            raise TypeError(f"{name!r} ({kind_name(module)}) comes after the target {below!r}: {reason}")


def warn_of_unmatched(model: nn.Module, config: GenFTConfig, full_matches: FullMatch) -> None:
    """Warn of what `target_modules` or `exclude_modules` names and the model does not have.

    It may be misspelt, or one list serves several families of models.
    """
    names = Names((name for name, _ in model.named_modules(remove_duplicate=False) if name), full_matches)
    # A string in `target_modules` that matches nothing has been refused.
    targets = None if isinstance(config.target_modules, str) else config.target_modules
    for field, entries in (("target_modules", targets), ("exclude_modules", config.exclude_modules)):
        if unmatched := names.unmatched(entries):
            verb = "matches" if len(unmatched) == 1 else "match"
            listed = listing(map(shown, unmatched), _NAMED) + names.hint(entries)
            warn(f"{field}: {listed} {verb} no module of the model. {_linear_layers(model)}")


def _nothing_matched(model: nn.Module, config: GenFTConfig, wanted: str | Iterable[str], names: Names) -> str:
    patterns = wanted if isinstance(wanted, str) else ", ".join(wanted)
    if wanted == ALL_LINEAR:
        patterns = repr(ALL_LINEAR)
    patterns = patterns[:500] + names.hint(wanted)
    excluded = f" outside exclude_modules={config.exclude_modules!r}" if config.exclude_modules else ""
    return f"target_modules matched nothing: {patterns}{excluded[:500]}. {_linear_layers(model)}"


def _linear_layers(model: nn.Module) -> str:
    """The layers that could be named, for an error message."""
    candidates: Counter[str] = Counter()
    for name, module in model.named_modules():
        try:
            check_adaptable(module)
        except (TypeError, ValueError):
            continue
        candidates[name.rpartition(".")[2] or "(the model itself, which has no name)"] += 1
    listed = ", ".join(f"{name} ({count})" for name, count in sorted(candidates.items())) or "none"
    return f"The model's linear layers are: {listed}"
