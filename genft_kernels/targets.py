"""Which modules of a model a configuration names, by PEFT's rules, and what to say when it names none."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from .config import ALL_LINEAR, QUERY_AND_VALUE_NAMES, GenFTConfig
from .modules import GenFTLinear, check_adaptable, is_conv1d

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
}


class Target(NamedTuple):
    """A linear layer to adapt."""

    names: tuple[str, ...]  # every path at which the model holds it
    module: nn.Module
    blocks: tuple[int, tuple[int, ...]]  # (number of row blocks, those to adapt)

    @property
    def name(self) -> str:
        """The first of the paths, under which its parameters are listed."""
        return self.names[0]


def find_targets(model: nn.Module, config: GenFTConfig) -> list[Target]:
    """The layers that `config` adapts, in the model's order.

    A string in `target_modules` or `exclude_modules` is a regular expression for whole paths; in a list, each entry
    is a path or its dotted end (as in PEFT). An entry that matches no module at all is warned of: it may be misspelt,
    or one list serves several families of models.

    Raises:
        ValueError: nothing matches, a matched module cannot be adapted, or an entry of `fused_blocks` is unused.
        TypeError: a matched module is of a kind that cannot be adapted. Each message names the module.
    """
    wanted = config.target_modules
    if wanted is None:
        wanted = (*QUERY_AND_VALUE_NAMES, *(config.fused_blocks or ()))
    elif wanted == ALL_LINEAR:
        wanted = _all_linear(model, config)
    paths: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and _matches(wanted, name) and not _matches(config.exclude_modules, name):
            paths.setdefault(module, []).append(name)
    if not paths:
        raise ValueError(_nothing_matched(model, config, wanted))
    for field in ("target_modules", "exclude_modules"):
        for entry in _entries(getattr(config, field)):
            if not any(_matches((entry,), name) for name, _ in model.named_modules(remove_duplicate=False)):
                warnings.warn(
                    f"{field}: {entry!r} matches no module of the model. {_linear_layers(model)}", stacklevel=3
                )
    fused = config.fused_blocks or {}
    targets = []
    for module, names in paths.items():
        try:
            check_adaptable(module)
            for name in names:
                _check_called(model, name)
        except (TypeError, ValueError) as error:
            hint = " (exclude_modules leaves it out)" if config.target_modules == ALL_LINEAR else ""
            raise type(error)(f"target module {names[0]!r}: {error}{hint}") from None
        entry = next((entry for entry in fused if _matches((entry,), names[0])), None)
        targets.append(Target(tuple(names), module, fused[entry] if entry else (1, (0,))))
    unused = [entry for entry in fused if not any(_matches((entry,), target.name) for target in targets)]
    if unused:
        raise ValueError(f"fused_blocks[{unused[0]!r}] names no target module; targets are {_listing(targets)}")
    return targets


def find_modules_to_save(model: nn.Module, config: GenFTConfig, targets: Iterable[Target]) -> list[str]:
    """Paths of the modules that `config` trains in full.

    Raises:
        ValueError: an entry matches nothing, or a match overlaps a target or another match.
    """
    found: list[str] = []
    for entry in config.modules_to_save or ():
        paths = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        matches = [name for name in paths if _matches((entry,), name)]
        if not matches:
            raise ValueError(f"modules_to_save: {entry!r} matches no module of the model")
        found += [name for name in matches if name not in found]
    for name in found:
        inside = [other for other in found if other.startswith(name + ".")]
        adapted = [path for target in targets for path in target.names if (path + ".").startswith(name + ".")]
        if inside or adapted:
            raise ValueError(f"modules_to_save: {name!r} contains {(inside or adapted)[0]!r}, which is chosen as well")
    return found


def _check_called(model: nn.Module, path: str) -> None:
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


def _matches(wanted: str | Iterable[str] | None, name: str) -> bool:
    if wanted is None:
        return False
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == entry or name.endswith("." + entry) for entry in wanted)


def _all_linear(model: nn.Module, config: GenFTConfig) -> tuple[str, ...]:
    """Paths of the linear layers, without the output embedding and what is within `modules_to_save`."""
    output_embedding = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and module is not output_embedding
    ]
    return tuple(name for name in linear if not any(_matches(config.modules_to_save, path) for path in _upwards(name)))


def _upwards(path: str) -> Iterator[str]:
    """A module's path and those of the modules that it is in."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _entries(wanted: str | Iterable[str] | None) -> Iterable[str]:
    return () if wanted is None or isinstance(wanted, str) else wanted


def _nothing_matched(model: nn.Module, config: GenFTConfig, wanted: str | Iterable[str]) -> str:
    patterns = wanted if isinstance(wanted, str) else ", ".join(wanted) or repr(ALL_LINEAR)
    if isinstance(wanted, str) and any(_matches((wanted,), name) for name, _ in model.named_modules()):
        patterns += f" (a string is a regular expression for whole paths: for a name write [{wanted!r}])"
    excluded = f" outside exclude_modules={config.exclude_modules!r}" if config.exclude_modules else ""
    return f"target_modules matched nothing: {patterns}{excluded}. {_linear_layers(model)}"


def _linear_layers(model: nn.Module) -> str:
    """What could be named, for an error message."""
    candidates = Counter()
    for name, module in model.named_modules():
        if isinstance(module, GenFTLinear):
            continue
        try:
            check_adaptable(module)
        except (TypeError, ValueError):
            continue
        candidates[name.rpartition(".")[2] or "(the model itself, which has no name)"] += 1
    listed = ", ".join(f"{name} ({count})" for name, count in sorted(candidates.items())) or "none"
    return f"The model's linear layers are: {listed}"


def _listing(targets: list[Target]) -> str:
    names = [target.name for target in targets]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
