"""How the rows of a fused weight are cut into blocks, and which of the blocks are adapted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .arguments import is_integer, shown


class RowBlocks(NamedTuple):
    """Blocks of consecutive rows of a weight [out, in]; the whole weight unless said otherwise."""

    cut: int | tuple[int, ...] = 1  # the number of equal blocks, or the rows of each
    adapted: tuple[int, ...] = (0,)

    @classmethod
    def checked(cls, name: str, value: object) -> RowBlocks:
        """`value` with the adapted blocks in their order; ValueError that names it `name` if it is no such thing."""
        problem = f"{name} must be (number of blocks, or the rows of each; blocks to adapt), got {shown(value)}"
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
            raise ValueError(problem)
        cut, adapted = value
        sizes = (cut,) if is_integer(cut) else cut
        if not isinstance(sizes, Sequence) or not sizes or not all(is_integer(n) and n >= 1 for n in sizes):
            raise ValueError(problem)
        if not isinstance(adapted, Sequence) or not adapted:
            raise ValueError(problem)
        count = cut if is_integer(cut) else len(sizes)
        if not all(is_integer(n) and 0 <= n < count for n in adapted) or len(set(adapted)) != len(adapted):
            raise ValueError(f"{name}: blocks must be distinct numbers in 0..{shown(count - 1)}, got {shown(adapted)}")
        equal = int(cut) if is_integer(cut) else tuple(int(n) for n in sizes)
        return cls(equal, tuple(sorted(int(n) for n in adapted)))

    @property
    def count(self) -> int:  # type: ignore[override]
        """The number of blocks, adapted or not."""
        return self.cut if isinstance(self.cut, int) else len(self.cut)

    def rows(self, out_features: int) -> list[int]:
        """The rows of each block of `out_features`; ValueError if they do not make them up."""
        if isinstance(self.cut, int):
            if out_features % self.cut:
                raise ValueError(f"its {out_features} rows cannot be cut into {self.cut} equal blocks")
            return [out_features // self.cut] * self.cut
        if sum(self.cut) != out_features:
            raise ValueError(f"its {out_features} rows are not those of the blocks, {'+'.join(map(str, self.cut))}")
        return list(self.cut)

    def adapted_rows(self, out_features: int) -> list[range]:
        """The rows of each adapted block; ValueError as `rows` has it."""
        rows = self.rows(out_features)
        return [range(sum(rows[:index]), sum(rows[: index + 1])) for index in self.adapted]

    def by_rows(self, out_features: int) -> dict[int, RowBlocks]:
        """The adapted blocks by how many rows they have: blocks of one size share a generator and a layer's units."""
        rows, found = self.rows(out_features), dict[int, tuple[int, ...]]()
        for index in self.adapted:
            found[rows[index]] = (*found.get(rows[index], ()), index)
        return {size: RowBlocks(self.cut, indices) for size, indices in found.items()}

    def split(self, tensor: Any, dim: int = 0) -> tuple[Any, ...]:
        """Views of the blocks of a tensor, or of a handle of W, that has W's rows at `dim`."""
        return (tensor,) if self.cut == 1 else tensor.split(self.rows(tensor.shape[dim]), dim)

    def __str__(self) -> str:
        return f"{list(self.adapted)} of {self.cut if isinstance(self.cut, int) else '+'.join(map(str, self.cut))}"


def checked_fused_blocks(value: object) -> dict[str, RowBlocks] | None:
    """`GenFTConfig.fused_blocks` in a form of its own; ValueError that names the entry that is wrong."""
    if value is None:
        return None
    problem = f"fused_blocks must map a name to (blocks, blocks to adapt), got {shown(value)}"
    if not isinstance(value, Mapping) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError(problem)
    return {name: RowBlocks.checked(f"fused_blocks[{shown(name)}]", entry) for name, entry in value.items()}
