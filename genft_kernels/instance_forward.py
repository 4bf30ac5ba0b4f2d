"""A layer in another's place: hooks go along, accelerate's too; another forward of the instance's own is refused."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator

from torch import nn

# Where accelerate's `add_hook_to_module` keeps its hook, and the forward that it wraps.
_HOOK, _WRAPPED = "_hf_hook", "_old_forward"


def check_instance_forward(module: nn.Module) -> None:
    """Raise TypeError where the instance has a forward of its own, which an adapted layer would drop."""
    own = vars(module).get("forward")
    if own is None or _is_class_forward(module, own):
        return
    if isinstance(own, functools.partial) and own.args == (module,) and _HOOK in vars(module):
        wrapped = vars(module).get(_WRAPPED)
        if wrapped is not None and _is_class_forward(module, wrapped):
            return
    raise TypeError(
        "its forward was replaced on the instance, which an update would bypass: adapt the model first, then patch it"
    )


def carry_instance_forward(old: nn.Module, new: nn.Module) -> None:
    """Give `new`, which takes the place of `old`, the hook that accelerate has put there, or the lack of one."""
    for name in (_HOOK, _WRAPPED, "forward"):
        new.__dict__.pop(name, None)
    if _HOOK in vars(old):
        forward = functools.partial(vars(old)["forward"].func, new)
        new.__dict__.update({_HOOK: vars(old)[_HOOK], _WRAPPED: new.forward})
        new.__dict__["forward"] = functools.update_wrapper(forward, new.forward)


def share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give `new` the very dictionaries of hooks of `old`, so that these go on working, and their handles too."""
    hooks = {name: value for name, value in vars(old).items() if "_hooks" in name}
    new.__dict__.update(hooks, _is_full_backward_hook=old._is_full_backward_hook)


@contextlib.contextmanager
def brought_back(*modules: nn.Module) -> Iterator[None]:
    """Within the context what accelerate has offloaded of some modules is here, as if each had been called."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            hook = vars(module).get(_HOOK)
            if hook is not None and any(t.is_meta for t in (*module.parameters(False), *module.buffers(False))):
                stack.callback(hook.post_forward, module, None)  # also where not all could be brought
                hook.pre_forward(module)
        yield


def _is_class_forward(module: nn.Module, forward: object) -> bool:
    """Whether it is the method of the class after all, as `remove_hook_from_module` leaves it on the instance."""
    return inspect.ismethod(forward) and forward.__func__ is type(module).forward and forward.__self__ is module
