"""Which stacked parameters of a model a configuration names."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..arguments import about
from ..config import GenFTConfig
from ..generator import GenFTGenerator
from ..matching import FullMatch, Names, full_matches, held_at
from ..parameters import specific_shapes
from .interface import is_experts, layout_of, projections
from .layer import GenFTExperts, update_name
from .layout import Layout
from .update import ExpertUpdate, shape_of_units


class ExpertTarget(NamedTuple):
    """A stacked parameter to adapt."""

    names: tuple[str, ...]  # every path at which the model will hold its update
    module: nn.Module  # whose parameter it is
    parameter: str
    layout: Layout

    @property
    def name(self) -> str:
        """The first of the paths, under which the update's tensors are listed."""
        return self.names[0]

    @property
    def weight(self) -> torch.Tensor:
        """W of all experts, one below the other; a matrix."""
        return self.module.get_parameter(self.parameter).flatten(0, -2)

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path at which the model holds the experts module."""
        return tuple(name.rpartition(".")[0] for name in self.names)

    def own_shapes(self, config: GenFTConfig) -> dict[str, tuple[int, ...]]:
        """The shapes of the units that the update has of its own."""
        shapes = specific_shapes(config, *self.layout.block_shape)
        return {name: shape_of_units(config, self.layout, shape) for name, shape in shapes.items()}


def find_expert_targets(
    model: nn.Module, config: GenFTConfig, full_matches: FullMatch = full_matches
) -> list[ExpertTarget]:
    """The stacked parameters that `config.target_parameters` names, in the model's order.

    A string is a regular expression for whole names of parameters; in a list, each entry is a name or its dotted end. A
    module that `exclude_modules` names is left alone, at all paths.

    Raises:
        ValueError: nothing matches, or what matches cannot be adapted.
        TypeError: a match is no stack of experts of transformers' interface. Each message names the parameter.
    """
    wanted = config.target_parameters
    if wanted is None:
        return []
    present = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    # Experts with adapters of PEFT's may get another.
    modules = {path: m.original if isinstance(m, GenFTExperts) else m for path, m in present.items()}
    owners = {f"{path}.{name}": (path, name) for path, module in modules.items() for name in module._parameters}
    names = Names(owners, full_matches)
    excluded = Names(modules, full_matches).matching(config.exclude_modules)
    chosen = {name for name in names.matching(wanted) if owners[name][0] not in excluded}
    missing = names.unmatched(wanted)
    if missing or not chosen:
        listed = ", ".join(missing or ([wanted] if isinstance(wanted, str) else wanted))
        raise ValueError(f"target_parameters matched nothing: {listed[:500]}{names.hint(wanted)}. {_stacks(modules)}")
    paths = held_at(modules.items())
    targets: dict[tuple[nn.Module, str], ExpertTarget] = {}
    for name, (path, parameter) in owners.items():
        module = modules[path]
        if name in chosen and (module, parameter) not in targets:
            with about(f"target parameter {name!r}"):
                layout = layout_of(module, parameter)
            at = tuple(f"{path}.{update_name(parameter)}" for path in paths[module])
            targets[module, parameter] = ExpertTarget(at, module, parameter, layout)
    return list(targets.values())


def make_experts(
    targets: list[ExpertTarget], generators: dict[tuple[int, int], GenFTGenerator], backend: str
) -> tuple[dict[str, GenFTExperts], dict[str, ExpertUpdate]]:
    """The replacements of the experts modules, by every path, and the updates in it, each by its first path."""
    adapted: dict[nn.Module, GenFTExperts] = {}
    places: dict[str, GenFTExperts] = {}
    updates: dict[str, ExpertUpdate] = {}
    for target in targets:
        with about(f"target parameter {target.name!r}"):
            if target.module not in adapted:
                adapted[target.module] = GenFTExperts(target.module)
            experts, generator = adapted[target.module], generators[target.layout.block_shape]
            updates[target.name] = experts.adapt(target.parameter, target.layout, generator, backend)
        places |= dict.fromkeys(target.paths, experts)
    return places, updates


def _stacks(modules: dict[str, nn.Module]) -> str:
    """The names that could be given, for an error message."""
    kinds = {
        f"{path.rpartition('.')[2]}.{name}"
        for path, module in modules.items()
        if is_experts(module)
        for name in projections(module)
    }
    return f"The model's stacked experts are: {', '.join(sorted(kinds)) or 'none'}"
