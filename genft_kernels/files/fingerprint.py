"""The identity of a frozen weight: the update depends on it, so an adapter is worth nothing on another."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..arguments import is_finite
from ..frozen_weight import FrozenWeight, packed_tensors
from .sharded import resident

_SAMPLES = 64


class Fingerprint(NamedTuple):
    """Shape, norm and a few elements of a frozen weight; of a quantised one all its bytes, too."""

    shape: tuple[int, ...]  # [out, in]
    dtype: str
    norm: float
    samples: tuple[float, ...]
    packed: str | None = None  # the SHA-256 of what a quantised one is stored in

    @classmethod
    def of(cls, weight: torch.Tensor | FrozenWeight) -> Fingerprint:
        """The fingerprint of `weight` [out, in]: Frobenius norm and 64 evenly strided elements, and stored bytes."""
        if isinstance(weight, FrozenWeight):
            with resident(weight.module):
                return cls.of(weight.dense())._replace(packed=_digest(packed_tensors(weight.module)))
        count = min(_SAMPLES, weight.numel())
        indices = torch.linspace(0, weight.numel() - 1, count, dtype=torch.float64, device="cpu").long()
        rows, columns = indices // weight.shape[1], indices % weight.shape[1]
        samples = weight[rows.to(weight.device), columns.to(weight.device)].double().tolist()
        norm = torch.linalg.vector_norm(weight, dtype=torch.float64).item()
        return cls(tuple(weight.shape), str(weight.dtype).removeprefix("torch."), norm, tuple(samples))

    @classmethod
    def parsed(cls, entry: object) -> Fingerprint:
        """One from a file; ValueError that names what is wrong with it."""
        *fields, optional = cls._fields
        if not isinstance(entry, dict) or set(entry) - {optional} != set(fields):
            raise ValueError(f"it must have {', '.join(fields)}")
        shape, dtype, norm, samples = (entry[field] for field in fields)
        packed = entry.get(optional)
        if not (packed is None or isinstance(packed, str)):
            raise ValueError("packed must be a string")
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 2**63 for n in shape)):
            raise ValueError("shape must be two sizes")
        if not isinstance(dtype, str):
            raise ValueError("dtype must be a string")
        if not (is_finite(norm) and norm >= 0):
            raise ValueError("norm must be a finite number")
        count = min(_SAMPLES, shape[0] * shape[1])
        if not (isinstance(samples, list) and len(samples) == count and all(map(is_finite, samples))):
            raise ValueError(f"samples must be {count} finite numbers")
        return cls(tuple(shape), dtype, float(norm), tuple(map(float, samples)), packed)

    def entry(self) -> dict[str, object]:
        """Its entry in a file."""
        shown = {"shape": list(self.shape), "dtype": self.dtype, "norm": self.norm, "samples": list(self.samples)}
        return shown if self.packed is None else {**shown, "packed": self.packed}

    @property
    def is_finite(self) -> bool:
        """Whether the weight holds neither NaN nor infinity."""
        return math.isfinite(self.norm)

    def difference(self, other: Fingerprint) -> str | None:
        """In words what tells the two apart, or None. Between dtypes, what a cast to 16 bits may change is allowed."""
        if self.shape != other.shape:
            return f"its shape is {list(other.shape)}, not {list(self.shape)}"
        if self.packed != other.packed and None not in (self.packed, other.packed):
            return (
                "its quantised bytes differ, as where the same weights are quantised in another way or elsewhere: load "
                "the quantised base that it was trained on (its save_pretrained keeps one), or quantise as then"
            )
        tolerance = 1e-6 if self.dtype == other.dtype else 2**-7
        if not abs(self.norm - other.norm) <= tolerance * min(self.norm, other.norm):  # nor if one is NaN or infinite
            return f"its norm is {other.norm:.6g}, not {self.norm:.6g}"
        small = tolerance * self.norm / (self.shape[0] * self.shape[1]) ** 0.5
        for mine, theirs in zip(self.samples, other.samples, strict=True):
            if abs(mine - theirs) > small + tolerance * abs(mine):
                return "its values differ"
        return None


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        stored = tensor.detach().as_subclass(torch.Tensor).cpu().contiguous().reshape(-1)
        digest.update(stored.view(torch.uint8).numpy().data)
    return digest.hexdigest()
