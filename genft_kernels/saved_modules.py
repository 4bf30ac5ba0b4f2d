"""Modules that are trained in full (`modules_to_save`): copies take their places while the originals wait."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .arguments import warn
from .frozen_weight import kind_name, kind_of
from .matching import upwards


def trained_copies(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """A copy of each of these modules, all of which trains; what they share, their copies share.

    Warns of what will not be as before: a tie to another module ends, and a state that is no tensor cannot be saved.

    Raises:
        ValueError, TypeError: a parameter cannot train, or is quantised.
    """
    originals = {path: model.get_submodule(path) for path in paths}
    for path, original in originals.items():
        for name, parameter in original.named_parameters():
            if not (parameter.is_floating_point() or parameter.is_complex()):
                raise ValueError(f"modules_to_save: '{path}.{name}' has dtype {parameter.dtype} and cannot train")
        check_not_quantised(path, original)
        for name, kind in unsavable(original).items():
            warn(f"modules_to_save: {path}.{name} is of type {kind}, and only tensors can be saved by save_adapter")
    for name, other in _ties(model, originals).items():
        warn(f"modules_to_save: {name!r} is tied to {other!r}, and its trained copy is not: they go separate ways")
    memo: dict[int, object] = {}
    return {path: copy.deepcopy(original, memo).requires_grad_(True) for path, original in originals.items()}


def check_not_quantised(path: str, trained: nn.Module) -> None:
    """Raise TypeError if a module that is to train in full, or a part of it, is quantised."""
    for name, module in trained.named_modules(prefix=path):
        if kind_of(module) is not None:
            raise TypeError(f"modules_to_save: {name!r} is quantised ({kind_name(module)}) and cannot train")


def unsavable(module: nn.Module) -> dict[str, str]:
    """The kinds of what is in a module's state dict, by `get_extra_state`, and neither a tensor nor None."""
    state = module.state_dict(keep_vars=True)
    return {
        name: type(value).__name__
        for name, value in state.items()
        if value is not None and not isinstance(value, Tensor)
    }


def check_can_return(originals: Mapping[str, nn.Module], model: nn.Module) -> None:
    """Raise RuntimeError unless each original still fits where its copy is: the vocabulary may have grown."""
    for path, original in originals.items():
        for (name, mine), theirs in zip(
            original.named_parameters(), model.get_submodule(path).parameters(), strict=True
        ):
            if mine.shape != theirs.shape:
                raise RuntimeError(
                    f"modules_to_save: '{path}.{name}' was {list(mine.shape)} and is {list(theirs.shape)} now, so the "
                    "original cannot come back: remove_genft(model, keep_update=True) leaves what was trained"
                )


def beside(original: nn.Module, trained: nn.Module) -> nn.Module:
    """The original of a saved module, with the devices, dtypes and modes of the copy that took its place."""
    for tensors in (nn.Module.parameters, nn.Module.buffers):
        for mine, theirs in zip(tensors(original), tensors(trained), strict=True):
            mine.data = mine.data.to(theirs)
    for module, copied in zip(original.modules(), trained.modules(), strict=True):
        module.training = copied.training
    return original


def tied_again(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """A sentence for each parameter of the saved modules that another module has, too, in whatever way."""
    saved = {path: model.get_submodule(path) for path in paths}
    own = {part for module in saved.values() for part in module.modules()}
    told = []
    for name, other in _ties(model, saved, own).items():
        trains = model.get_parameter(name).requires_grad
        follows = f"{other!r} trains, too, and is neither saved nor undone" if trains else "what was trained is gone"
        anew = ", and tie both anew after load_adapter" if trains else ""
        told.append(
            f"modules_to_save: {name!r} is tied to {other!r} again, so {follows}: "
            f"make {name!r} a parameter of its own, by nn.Parameter(tensor.detach().clone()){anew}"
        )
    return told


def keep_untied(model: nn.Module, paths: Iterable[str]) -> None:
    """Let `tie_weights` of transformers models, which `resize_token_embeddings` calls, leave these modules alone."""
    let_tie(model)
    for name, module in model.named_modules():
        within = tuple(path[len(name) :].lstrip(".") for path in paths if name in ("", *upwards(path)))
        if within and callable(getattr(type(module), "tie_weights", None)):
            module.__dict__["tie_weights"] = _TieTheRest(module, within)


def let_tie(model: nn.Module) -> None:
    """Undo `keep_untied`."""
    for module in model.modules():
        if isinstance(vars(module).get("tie_weights"), _TieTheRest):
            del module.__dict__["tie_weights"]


def say_untied(model: nn.Module, paths: Iterable[str]) -> None:
    """Have a transformers model's configuration say that its embeddings are not tied, if these modules ended that.

    Else its next `tie_weights` would put one in the other's place, and so would whoever reads its files. Where the
    setting ties more, as biases or three embeddings, or even scales outputs for it, a warning is all.
    """
    ended = set(paths)
    untied = {module for name, module in model.named_modules() if not ended.isdisjoint(upwards(name))}
    for owner in model.modules():
        configuration = getattr(owner, "config", None)
        if not getattr(configuration, "tie_word_embeddings", False):
            continue
        ends = [_embeddings(owner, end) for end in ("input", "output")]
        first, second = (getattr(end, "weight", None) for end in ends)
        if first is None or second is None or first is second or untied.isdisjoint(ends):
            continue
        if _has_ties(owner):
            warn(
                "input and output embeddings are no longer tied; tie_word_embeddings of the model's config stays True, "
                "because it says more here, so tie_weights and resize_token_embeddings would tie them again"
            )
            continue
        for each in (configuration, getattr(configuration, "text_config", None)):
            if getattr(each, "tie_word_embeddings", False):
                setattr(each, "tie_word_embeddings", False)  # noqa: B010
        warn("input and output embeddings are no longer tied: tie_word_embeddings of the model's config is False now")


def _embeddings(owner: nn.Module, end: str) -> object:
    """A transformers model's module at that end, if it has one."""
    ask = getattr(owner, f"get_{end}_embeddings", None)
    try:
        return ask() if callable(ask) else None
    except (NotImplementedError, AttributeError):  # models without words
        return None


def _has_ties(model: nn.Module) -> bool:
    """Whether two of its modules hold one parameter."""
    held = [
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    ]
    return len(set(held)) < len(held)


class _TieTheRest:
    """Stands in for a model's `tie_weights`, and holds the model weakly: it goes when it is dropped."""

    def __init__(self, owner: nn.Module, paths: tuple[str, ...]) -> None:
        self._owner, self._paths = weakref.ref(owner), paths

    def __reduce__(self) -> tuple[Any, ...]:
        return _TieTheRest, (self._owner(), self._paths)

    def __call__(self, *args: object, **options: object) -> object:
        owner: Any = self._owner()
        before = [(module, *named) for module in owner.modules() for named in module._parameters.items()]
        trained = {id(each) for path in self._paths for each in owner.get_submodule(path).parameters()}
        result = type(owner).tie_weights(owner, *args, **options)
        for module, name, parameter in before:
            if {id(parameter), id(module._parameters.get(name))} & trained:  # either end of a tie
                module._parameters[name] = parameter
        return result


def _ties(model: nn.Module, saved: Mapping[str, nn.Module], but: Collection[nn.Module] = ()) -> dict[str, str]:
    """Parameters within the saved modules that the model also has elsewhere, by name; not in the modules `but`."""
    elsewhere: dict[nn.Parameter, str] = {}
    within = []
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
            if any(outer in saved for outer in upwards(path)):
                within.append((name, parameter))
            elif module not in but:
                elsewhere.setdefault(parameter, name)
    return {name: elsewhere[parameter] for name, parameter in within if parameter in elsewhere}
