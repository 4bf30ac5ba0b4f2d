"""How much of an adapter arrives, whichever way it is served: `fidelity_report`."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _torch_private
from .adapt import disabled, merge, remove_genft
from .arguments import check_type, told
from .files.lora import export_lora
from .files.lora_check import answer, frozen_copy, load_into_peft, quantised_layer, relative

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Fidelity(NamedTuple):
    """One way of serving the adapted model in one dtype, beside the exact answer, which is float64's."""

    way: str
    dtype: torch.dtype
    drift: float  # |y - exact y| / |exact y| of the logits, rounding of the whole model included
    gain: float  # <y - frozen y, d> / <d, d> with d the update's exact effect; 1: all of it arrives; nan: it has none


@dataclasses.dataclass(frozen=True)
class FidelityReport:
    """The rows, and why there are none of the export if there are none; as a string, a table."""

    rows: list[Fidelity]
    not_exported: str | None

    def __str__(self) -> str:
        lines = [f"{'served':<12}{'dtype':<10}{'logit drift':>12}{'delta gain':>12}"]
        for way, dtype, drift, gain in self.rows:
            lines.append(f"{way:<12}{str(dtype).removeprefix('torch.'):<10}{drift:>12.1e}{gain:>12.4f}")
        return "\n".join(lines if self.not_exported is None else [*lines, f"not exported: {self.not_exported}"])


def fidelity_report(model: nn.Module, inputs: Any) -> FidelityReport:
    """The effect of merging (`merge`), exporting (`export_lora`, loaded by PEFT) and rounding on an adapter.

    In each dtype the adapted model answers `inputs` as it is, merged in its own dtype, and as PEFT's LoRA; "frozen" is
    the model without the adapter. The model itself stays as it is; each row takes a copy in the row's dtype.

    Args:
        inputs: of the model, as `export_lora` takes them.

    Raises:
        RuntimeError: the model has no adapter, or is merged.
        ValueError: a layer is over a quantised weight, which has one dtype: dequantise a copy of the model first.
    """
    check_type("model", model, nn.Module)
    if (path := quantised_layer(model)) is not None:
        raise ValueError(f"{path!r} is over a quantised weight, which has no other dtypes: dequantise a copy first")
    exact = frozen_copy(model).double()
    set_experts = getattr(exact, "set_experts_implementation", None)
    if callable(set_experts):
        set_experts("eager")  # transformers' grouped_mm, often the default, has no float64
    expected = _answer(exact, inputs, torch.float64)
    with disabled(exact):
        frozen = _answer(exact, inputs, torch.float64)
    del exact
    effect = expected - frozen
    norm = effect.square().sum()

    def row(way: str, dtype: torch.dtype, make: Callable[[torch.dtype], nn.Module]) -> Fidelity:
        found = _answer(make(dtype), inputs, dtype)
        gain = ((found - frozen) * effect).sum() / norm  # nan for an update without an effect
        return Fidelity(way, dtype, relative(found, expected), gain.item())

    with tempfile.TemporaryDirectory() as directory:
        not_exported = _export(model, directory)
        ways = _ways(model, None if not_exported else directory)
        rows = [row(way, dtype, make) for way, make in ways for dtype in DTYPES]
    return FidelityReport(rows, not_exported)


def _ways(model: nn.Module, exported: str | None) -> Iterator[tuple[str, Callable[[torch.dtype], nn.Module]]]:
    """(name, what makes the model that is served in a dtype)."""
    yield "frozen", lambda dtype: remove_genft(frozen_copy(model)).to(dtype)
    yield "unmerged", lambda dtype: frozen_copy(model).to(dtype)
    yield "merged", lambda dtype: _merged(model).to(dtype)
    if exported is not None:
        yield "exported", lambda dtype: load_into_peft(remove_genft(frozen_copy(model)).to(dtype), exported)


def _merged(model: nn.Module) -> nn.Module:
    """A plain copy with the update in its weights; whether that ends a tie is nothing to a report."""
    with told():
        return remove_genft(merge(frozen_copy(model)), keep_update=True)


def _export(model: nn.Module, directory: str) -> str | None:
    """Why the adapter cannot be exported, or None if it is in `directory` now."""
    try:
        export_lora(model, directory)
        import peft  # noqa: F401
    except (ValueError, ImportError) as error:
        return str(error)
    return None


def _answer(model: nn.Module, inputs: Any, dtype: torch.dtype) -> Tensor:
    """The logits in float64, of inputs whose floating-point tensors are cast to the model's dtype."""

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    # PyTorch takes a mapping of a class of its own, as a processor's is, for a leaf.
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    return answer(model, _torch_private.map_leaves(cast, inputs)).double()
