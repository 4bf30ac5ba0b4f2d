"""`FrozenWeight`: a frozen W that is stored quantised, as a handle that operations take in a matrix's place.

An operation makes W dense for itself and drops it; what autograd keeps is the handle. So nothing of W's size outlives
an operation, whichever form and backend (docs/architecture.md#quantised-weights). `register_frozen_weight` tells how a
kind is made dense; those of bitsandbytes, torchao and HQQ are in modules of `integrations`, looked up by the name of
the library that a layer or its weight comes from.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import check_type
from .checks import SUPPORTED_DTYPES, compute_dtype
from .norm import norm_of

# Libraries of whose classes a module of `integrations` has a table, KINDS.
_LIBRARIES = ("bitsandbytes", "hqq", "torchao")

# Libraries whose layers hold W in a form of their kernels, without a way to make it dense.
_WITHOUT_DENSE = {
    "gptqmodel": "GPTQ", "auto_gptq": "GPTQ", "awq": "AWQ", "autoawq": "AWQ", "aqlm": "AQLM", "eetq": "EETQ",
}  # fmt: skip


class Kind(NamedTuple):
    """One way in which a frozen weight is stored."""

    dense: Callable[[Any], Tensor]  # module -> W [out, in]
    packed: Callable[[Any], Sequence[Tensor]] | None = None  # module -> all that W is made of; None: what it has
    # module -> why the layers below it get no gradient, or None if they do
    blocks_gradients: Callable[[Any], str | None] | None = None


_registered: dict[type | str, Kind] = {}


def register_frozen_weight(kind: type | str, *, dense: Callable[[Any], Tensor]) -> None:
    """Tell how the quantised weight of a kind of layers is made dense, so that they can be adapted.

        register_frozen_weight("my_library.Linear3bit", dense=lambda module: module.unpacked())

    Args:
        kind: the class of the layer or of its `weight`, or the name of one, with or without its module's. Subclasses
            are of the kind, too. What is registered goes before what the package knows, and later before earlier.
        dense: module -> W [out, in] in a floating-point dtype, anew in each call. It is called four times a layer
            and step, more often for a fused weight (docs/using.md#quantised-bases); the layer's parameters and buffers,
            its bias apart, must be all that W depends on.

    Raises:
        TypeError: `kind` is neither a class nor a name, or `dense` cannot be called.
        ValueError: `kind` is `nn.Linear` or another class that every layer or tensor is of.
    """
    check_type("kind", kind, (type, str))
    if not callable(dense):
        raise TypeError(f"dense must be a function of a module, got {type(dense).__name__}")
    for each in (*nn.Linear.__mro__, *nn.Parameter.__mro__):
        if _is_called(each, kind) or kind in (f"nn.{each.__name__}", f"torch.nn.{each.__name__}"):
            raise ValueError(f"kind={kind!r}: layers of all kinds are of it")
    _registered.pop(kind, None)  # the latest registration is the last
    _registered[kind] = Kind(dense)
    _found.clear()


class FrozenWeight:
    """W [out, in] of a layer that stores it quantised, or some of its rows, or its transpose."""

    def __init__(self, module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.module, self.shape, self.dtype = module, torch.Size(shape), dtype
        self._rows, self._transposed = slice(None), False

    @classmethod
    def of(cls, module: nn.Module) -> FrozenWeight | None:
        """That of a layer whose weight is of a known quantised kind, or None; it is made dense once, to try.

        Raises:
            TypeError: it cannot be made dense, or what comes of it is no dense floating-point matrix.
            ValueError: it has no values (meta device).
        """
        kind = kind_of(module)
        if kind is None:
            return None
        name, codes = kind_name(module), _codes(module)
        if codes.device.type == "meta":
            raise ValueError(
                f"{name} is on the meta device: the update is generated from its values, so load them first"
            )
        tried = _tried.get(module)
        if tried is None or tried.state != _state(codes):
            try:
                weight = kind.dense(module)
            except Exception as error:
                raise TypeError(f"{name} cannot be made dense: {str(error) or type(error).__name__}") from error
            if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.dtype not in SUPPORTED_DTYPES:
                what = f"{weight.dtype} of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight)
                raise TypeError(f"{name} must become dense as a floating-point matrix [out, in], got {what}")
            tried = _tried[module] = _Tried(_state(codes), weight.shape, weight.dtype, {(None, None): norm_of(weight)})
        return cls(module, tried.shape, tried.dtype)

    def dense(self) -> Tensor:
        """W itself, made anew."""
        kind = kind_of(self.module)
        if kind is None:  # a copy in another process
            raise RuntimeError(f"{self.kind} is not registered here: call register_frozen_weight first")
        weight = _made_dense(self.module, kind)[self._rows]
        return weight.t() if self._transposed else weight

    def to(self, dtype: torch.dtype) -> Tensor:
        """W itself in `dtype`, made anew."""
        return self.dense().to(dtype)

    def norm(self) -> Tensor:
        """The Frobenius norm of W, a scalar in float32 or wider; kept for as long as the codes are the same."""
        # A copy, or loaded from a file; where its kind is not known here, `dense` says so.
        if self.module not in _tried and self.of(self.module) is None:
            self.dense()
        tried, part, state = _tried[self.module], (self._rows.start, self._rows.stop), _state(self.codes)
        if tried.state != state:
            tried = _tried[self.module] = tried._replace(state=state, norms={})
        if part not in tried.norms:
            tried.norms[part] = norm_of(self.dense())
        return tried.norms[part]

    @property
    def codes(self) -> Tensor:
        """The stored tensor that changes when W does."""
        return _codes(self.module)

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype that the layer computes in, whatever its input is; None if in the input's."""
        dtype = getattr(self.module, "compute_dtype", None)
        return dtype if dtype in SUPPORTED_DTYPES else None

    @property
    def device(self) -> torch.device:
        """Where W is, and where it is made dense."""
        return self.codes.device

    @property
    def kind(self) -> str:
        """The name of the class that says how W is stored."""
        return kind_name(self.module)

    def numel(self) -> int:
        """The number of elements of W."""
        return self.shape.numel()

    def t(self) -> FrozenWeight:
        """That of the transpose."""
        rows, columns = self.shape
        view = self._view((columns, rows))
        view._transposed = not self._transposed
        return view

    def split(self, sizes: Sequence[int], dim: int = 0) -> tuple[FrozenWeight, ...]:
        """The weights of blocks of consecutive rows, as `Tensor.split` has them."""
        if dim != 0 or self._transposed or self._rows != slice(None):
            raise NotImplementedError("only the rows of a whole quantised weight can be split")
        views, start = [], 0
        for size in sizes:
            view = self._view((size, self.shape[1]))
            view._rows, start = slice(start, start + size), start + size
            views.append(view)
        return tuple(views)

    def _view(self, shape: tuple[int, int]) -> FrozenWeight:
        view = FrozenWeight(self.module, shape, self.dtype)
        view._rows, view._transposed = self._rows, self._transposed
        return view

    # As tensors have them, by which a change is seen.
    @property
    def _version(self) -> int:
        return self.codes._version

    def is_inference(self) -> bool:
        """Whether the codes were made in inference mode."""
        return self.codes.is_inference()


class _Made(threading.local):
    """The W that was made dense last, of `dense_once`."""

    last: dict[nn.Module, Tensor] | None = None  # one at most


_made = _Made()


@contextlib.contextmanager
def dense_once() -> Iterator[None]:
    """Within the context a W that is wanted several times in a row is made dense once; nothing of it stays."""
    before, _made.last = _made.last, {}
    try:
        yield
    finally:
        _made.last = before


def _made_dense(module: nn.Module, kind: Kind) -> Tensor:
    last = _made.last
    if last is None:
        return kind.dense(module).detach()
    if module not in last:
        last.clear()  # first, so that one is dense at a time
        last[module] = kind.dense(module).detach()
    return last[module]


class _Tried(NamedTuple):
    """Facts about a module's weight that hold since it was made dense: of which codes, and the norms of its rows."""

    state: tuple
    shape: torch.Size
    dtype: torch.dtype
    norms: dict[Any, Tensor]


_tried: weakref.WeakKeyDictionary[nn.Module, _Tried] = weakref.WeakKeyDictionary()


def _state(codes: Tensor) -> tuple:
    return codes.data_ptr(), None if codes.is_inference() else codes._version


def opened(value: Any) -> Any:
    """`value` with W itself in the place of a handle, alone or within a list."""
    if isinstance(value, FrozenWeight):
        return value.dense()
    if isinstance(value, list) and any(isinstance(each, FrozenWeight) for each in value):
        return [opened(each) for each in value]
    return value


def kind_of(module: nn.Module) -> Kind | None:
    """How the module's weight is stored, if that is known not to be a dense matrix."""
    return kind_of_classes(*_classes(module))


def kind_name(module: nn.Module) -> str:
    """The class of the module, and of its weight where that is one of its own: for messages."""
    of_module, of_weight = _classes(module)
    return of_module.__name__ if of_weight is None else f"{of_module.__name__} of {of_weight.__name__}"


def without_dense(module: nn.Module) -> str | None:
    """The name of the method by which the module's weight is quantised for good, if it is one of those."""
    return next((_WITHOUT_DENSE[lib] for lib in map(_library, type(module).__mro__) if lib in _WITHOUT_DENSE), None)


def blocks_gradients(module: nn.Module) -> str | None:
    """Why the layers below this one would get no gradient, if it is a quantised layer that is known to block them."""
    kind = kind_of(module)
    return None if kind is None or kind.blocks_gradients is None else kind.blocks_gradients(module)


def is_kind_of_layer(module: nn.Module) -> bool:
    """Whether the module is quantised by its own class, rather than by its weight's."""
    cls: Any = type(module)
    return kind_of_classes(cls, None) is not None


def packed_tensors(module: nn.Module) -> list[Tensor]:
    """All plain tensors that the module's quantised weight is made of."""
    kind = kind_of(module)
    return _stored(module) if kind is None or kind.packed is None else list(kind.packed(module))


def _stored(module: nn.Module) -> list[Tensor]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return [plain for name, tensor in named if name != "bias" for plain in plain_tensors(tensor)]


def _codes(module: nn.Module) -> Tensor:
    stored = _stored(module)
    if not stored:
        raise TypeError(f"{kind_name(module)} has neither parameters nor buffers that its weight could be made of")
    sizes = [tensor.numel() * tensor.element_size() for tensor in stored]
    return stored[sizes.index(max(sizes))]  # scales are small


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors that a tensor of a class of its own is made of, or itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [plain for name in names for plain in plain_tensors(getattr(tensor, name))]


def _classes(module: nn.Module) -> tuple[type, type | None]:
    weight = getattr(module, "weight", None)
    plain = not isinstance(weight, Tensor) or type(weight) in (Tensor, nn.Parameter)
    return type(module), None if plain else type(weight)


def kind_of_classes(of_module: type, of_weight: type | None) -> Kind | None:
    """How layers of a class store weights, or weights of a class of their own, if either is known."""
    classes = of_module, of_weight
    if classes not in _found:
        _found[classes] = _find(classes)
    return _found[classes]


# What `_find` has found. Not by functools, of which torch.compile warns.
_found: dict[tuple[type, type | None], Kind | None] = {}


def _find(classes: tuple[type, type | None]) -> Kind | None:
    ancestors = [each for cls in classes if cls is not None for each in cls.__mro__]
    for kind in reversed(_registered):
        if any(_is_called(each, kind) for each in ancestors):
            return _registered[kind]
    for each in ancestors:
        for name, known in _library_kinds(_library(each)).items():
            if _is_called(each, name):
                return known
    return None


def _is_called(cls: type, kind: type | str) -> bool:
    return kind is cls or kind in (cls.__name__, f"{cls.__module__}.{cls.__qualname__}")


def _library(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _library_kinds(library: str) -> Mapping[str, Kind]:
    if library not in _LIBRARIES:
        return {}
    return importlib.import_module(f".integrations.{library}", __package__).KINDS


def frozen_linear(x: Tensor, weight: Tensor | FrozenWeight, bias: Tensor | None) -> Tensor:
    """`F.linear` with a weight that needs no gradient; of a handle nothing dense is kept for backward."""
    if not isinstance(weight, FrozenWeight):
        return F.linear(x, weight, bias)
    dtype = compute_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    return _FrozenProduct.apply(x.to(dtype), weight, bias)  # type: ignore[no-untyped-call]


class _FrozenProduct(torch.autograd.Function):
    """x W^T + bias, of which only x has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.weight.to(grad.dtype), None, None
