"""Parameters that FSDP2 has sharded: gathered to be written, scattered when they are read.

All processes call, and one reads and writes. What happens to it happens to all, so that nobody waits for ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch.distributed
from torch import Tensor, nn

from ..checks import is_sharded

T = TypeVar("T")


def any_sharded(tensors: Iterable[object]) -> bool:
    """Whether one of them is a `DTensor`, of which each process has a part."""
    return any(is_sharded(tensor) for tensor in tensors)


def whole(tensor: T) -> T:
    """All of a tensor, on each process; itself where it is not sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@contextlib.contextmanager
def resident(module: nn.Module) -> Iterator[None]:
    """Within the context the module's own parameters are whole, on each process."""
    sharded = {name: parameter for name, parameter in module._parameters.items() if is_sharded(parameter)}
    for name, parameter in sharded.items():
        module._parameters[name] = nn.Parameter(whole(parameter), requires_grad=False)  # type: ignore[arg-type]
    try:
        yield
    finally:
        module._parameters.update(sharded)


def like(values: Tensor, mine: Tensor) -> Tensor:
    """`values` in the dtype of `mine`, on its device or on the processes that share it."""
    if not is_sharded(mine):
        return values.to(mine.device, mine.dtype)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = mine.device_mesh, mine.placements  # type: ignore[attr-defined]
    return distribute_tensor(values.to(mesh.device_type, mine.dtype), mesh, placements)


def by_one(action: Callable[[], T], sharded: bool) -> T:
    """The result or error of `action`, done by one process for all of them where the model is sharded."""
    if not sharded:
        return action()
    told: list[tuple[T | None, BaseException | None]] = [(None, None)]
    if torch.distributed.get_rank() == 0:
        try:
            told = [(action(), None)]
        except Exception as error:
            told = [(None, error)]
    torch.distributed.broadcast_object_list(told, src=0)
    result, failure = told[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]
