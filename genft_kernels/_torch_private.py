"""Every private function and module of torch that the package uses; attributes of `nn.Module` and `Tensor` apart.

Each is looked up at its first use: a version of torch that lacks one raises an error which says so, where it is needed
and nowhere else.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ._version import __version__

TESTED = "2.11 to 2.13"


@functools.cache
def _private(module: str, name: str) -> Any:
    """`name` of a module of torch; RuntimeError if this version has none."""
    try:
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        raise RuntimeError(
            f"torch {torch.__version__} has no {module}.{name}, which genft_kernels {__version__} relies on: install "
            f"a version of torch that it is tested with ({TESTED}), or a newer genft_kernels"
        ) from None


# --- compiled graphs ------------------------------------------------------------------------------------------------


def constant_in_graphs(function: Callable) -> Callable:
    """A decorator: a compiled graph takes the function's answer as it is, instead of tracing it.

    It is what `torch.compiler.assume_constant_result` does, which imports torch._dynamo and with it Triton.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# --- tensors ------------------------------------------------------------------------------------------------------


def norms(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The Frobenius norm of each, taken in `dtype`: on a GPU a launch or two for all of them."""
    found: tuple[torch.Tensor, ...] = _private("torch", "_foreach_norm")(list(tensors), 2, dtype)
    return found


def current_stream(device: torch.device) -> int:
    """The address of the current stream of a CUDA device that has a number."""
    stream: int = _private("torch._C", "_cuda_getCurrentRawStream")(device.index)
    return stream


# --- nested values --------------------------------------------------------------------------------------------------


def leaves(nested: Any) -> list[Any]:
    """All that tuples, lists, dicts, and what is registered as such, hold."""
    found: list[Any] = _private("torch.utils._pytree", "tree_leaves")(nested)
    return found


def map_leaves(function: Callable[[Any], Any], nested: Any) -> Any:
    """The same with `function` of each leaf."""
    return _private("torch.utils._pytree", "tree_map")(function, nested)


# --- autograd -------------------------------------------------------------------------------------------------------


def in_backward() -> bool:
    """Whether this thread is within a backward pass."""
    return _private("torch._C", "_current_graph_task_id")() != -1


def saved_tensors_are_hooked() -> bool:
    """Whether somebody listens to what is saved for backward, as a checkpointed region does."""
    return _private("torch._C._autograd", "_top_saved_tensors_default_hooks")(True) is not None


def when_backward_ends(callback: Callable[[], None]) -> None:
    """Have the backward pass that is under way call `callback` as its last act."""
    _private("torch.autograd", "Variable._execution_engine").queue_callback(callback)


def differentiates_forward() -> bool:
    """Whether a level of forward-mode differentiation or a transform of `torch.func` is active."""
    _private("torch.autograd.forward_ad", "_current_level")  # a number that changes: looked up, and read anew
    level = torch.autograd.forward_ad._current_level
    return level >= 0 or transforms_active()


def transforms_active() -> bool:
    """Whether a transform of `torch.func` is."""
    active: bool = _private("torch._C", "_are_functorch_transforms_active")()
    return active


# --- modules --------------------------------------------------------------------------------------------------------


@functools.cache
def global_hooks() -> tuple[dict[int, Any], dict[int, Any]]:
    """The hooks that run before and after the forward of every module."""
    names = "_global_forward_pre_hooks", "_global_forward_hooks"
    return _private("torch.nn.modules.module", names[0]), _private("torch.nn.modules.module", names[1])


# --- sharding --------------------------------------------------------------------------------------------------------

# An attribute that both kinds of FSDP set on the modules that they are about to wrap. False is FSDP1's default alone.
USES_ORIGINAL_PARAMETERS = "_fsdp_use_orig_params"


# --- dispatch modes -------------------------------------------------------------------------------------------------


def dispatch_modes_active() -> bool:
    """Whether something listens to the dispatcher: counters, fake tensors, selective checkpointing."""
    return _private("torch._C", "_len_torch_dispatch_stack")() > 0


def flop_formulas_in_use() -> list[dict[Any, Any]]:
    """The formulas of the FLOP counters at work, each of which has those that were registered when it was made."""
    counters: list[Any] = [getattr(mode, "counter", None) for mode in _mode_stack()]
    return [counter.flop_registry for counter in counters if hasattr(counter, "flop_registry")]


@functools.cache
def listeners() -> tuple[Any, ...]:
    """Functions that tell how many dispatch modes are active, whether a transform is, whether something traces; last
    the module whose `_current_level` is 0 or more within forward-mode differentiation.
    """
    _private("torch.autograd.forward_ad", "_current_level")
    names = "_len_torch_dispatch_stack", "_are_functorch_transforms_active", "_is_tracing"
    return *(_private("torch._C", name) for name in names), torch.autograd.forward_ad


def tensors_are_fake() -> bool:
    """Whether a mode is active under which tensors have no values of their own: fake ones, tracing."""
    return dispatch_modes_active() and any(mode.is_infra_mode() for mode in _mode_stack())


@contextlib.contextmanager
def hidden_from_selective_checkpointing() -> Iterator[None]:
    """Within the context a region's selective checkpointing sees no operation; other modes do as before.

    It counts operations, and takes the n-th of the repetition for the n-th of the first run. What is computed once and
    found at hand later has no place in that count.
    """
    removed = []
    if dispatch_modes_active():
        selective = _selective_modes()
        while any(isinstance(mode, selective) for mode in _mode_stack()):
            removed.append(_private("torch.utils._python_dispatch", "_pop_mode")())
        kept = [mode for mode in reversed(removed) if not isinstance(mode, selective)]
        _push(kept)
    try:
        yield
    finally:
        if removed:
            for _ in kept:
                _private("torch.utils._python_dispatch", "_pop_mode")()
            _push(reversed(removed))


def _mode_stack() -> list[Any]:
    return _private("torch.utils._python_dispatch", "_get_current_dispatch_mode_stack")()


def _selective_modes() -> tuple[type, ...]:
    names = ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")
    return tuple(_private("torch.utils.checkpoint", name) for name in names)


def _push(modes: Iterable[object]) -> None:
    for mode in modes:
        _private("torch.utils._python_dispatch", "_push_mode")(mode)


# --- process groups -------------------------------------------------------------------------------------------------


def data_parallel_under_way() -> Any:
    """The `DistributedDataParallel` whose forward this is a part of, or None."""
    return _private("torch.nn.parallel", "DistributedDataParallel._get_active_ddp_module")()


def store_of_process_group() -> Any:
    """The store by which the ranks of the default process group met."""
    return _private("torch.distributed.distributed_c10d", "_get_default_store")()
