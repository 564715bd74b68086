"""Where the elements of every matrix lie: in the parameter, in this rank's tensors, on the other ranks.

Data first. An engine's folder says which `Shard` of which parameter this rank holds; `pieces` cuts the shards at the
borders of the matrices; what all ranks know of each other (`index`) is the inner side of those pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Strided:
    """`count` runs of `run` elements, `stride` apart, from `start`: positions in a flat tensor.

    One run for rows of a matrix; one run a row for columns; one run a query group for an interleaved projection.
    """

    start: int
    run: int
    stride: int = 0
    count: int = 1

    @property
    def numel(self) -> int:
        return self.run * self.count

    def view(self, flat: Tensor) -> Tensor:
        """These positions of a contiguous 1-D tensor: (count, run), sharing memory."""
        if self.count == 1:
            return flat[self.start : self.start + self.run].view(1, self.run)
        return flat.as_strided((self.count, self.run), (self.stride, 1), flat.storage_offset() + self.start)

    def before(self, position: int) -> int:
        """How many of the elements lie below `position` of the flat tensor."""
        if self.count == 1:
            return min(max(position - self.start, 0), self.run)
        full, rest = divmod(max(position - self.start, 0), self.stride)
        return min(full * self.run + min(rest, self.run), self.numel)

    def cut(self, first: int, last: int) -> list[Strided]:
        """The elements `first` to `last` (exclusive), in order: at most a part run, whole runs, a part run."""
        parts = []
        while first < last:
            index, inside = divmod(first, self.run)
            whole = (last - first) // self.run if inside == 0 else 0
            run = self.run if whole else min(self.run - inside, last - first)
            parts.append(Strided(self.start + index * self.stride + inside, run, self.stride, max(whole, 1)))
            first += parts[-1].numel
        return parts


@dataclass(frozen=True)
class Matrix:
    """One matrix to orthogonalize: a two-dimensional parameter, or a part of a fused or batched one.

    Attributes:
        name: the parameter's name, with the part in brackets where there are several.
        parameter: the parameter's name.
        rows, cols: its shape as stored.
        where: its elements, in row-major order, in the flattened parameter.
        transposed: stored (in, out), as GPT-2's Conv1D; matters to scales that tell rows from columns.
    """

    name: str
    parameter: str
    rows: int
    cols: int
    where: Strided
    transposed: bool = False

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def out_in(self) -> tuple[int, int]:
        """(A, B) of the paper: outputs, inputs."""
        return (self.cols, self.rows) if self.transposed else (self.rows, self.cols)


@dataclass(frozen=True)
class Shard:
    """Elements `start` to `start + length` of the flattened `parameter` lie at `offset` of the flat `tensor`."""

    parameter: str
    start: int
    length: int
    tensor: Tensor
    offset: int = 0


@dataclass(frozen=True)
class Block:
    """The same elements, in the same order: where in this rank's tensor, and where in the matrix."""

    local: Strided
    inside: Strided


@dataclass(frozen=True)
class Piece:
    """What this rank holds of one matrix in one tensor (both by their number)."""

    matrix: int
    tensor: int
    blocks: tuple[Block, ...]

    @property
    def inside(self) -> tuple[Strided, ...]:
        return tuple(block.inside for block in self.blocks)


#: For each rank: (matrix, where inside it) of every piece. Equal on all ranks.
Index = Sequence[Sequence[tuple[int, tuple[Strided, ...]]]]


def by_parameter(matrices: Sequence[Matrix]) -> dict[str, list[int]]:
    """Parameter name -> the numbers of its matrices."""
    found: dict[str, list[int]] = {}
    for number, matrix in enumerate(matrices):
        found.setdefault(matrix.parameter, []).append(number)
    return found


def pieces(matrices: Sequence[Matrix], shards: Iterable[Shard], tensors: Mapping[int, int]) -> list[Piece]:
    """Cuts this rank's shards at the borders of the matrices.

    Args:
        matrices: all matrices, in the order in which every rank counts them.
        shards: what this rank holds; shards of other parameters are passed over.
        tensors: id of a tensor -> its number.
    """
    of_parameter = by_parameter(matrices)
    found = []
    for shard in shards:
        for number in of_parameter.get(shard.parameter, ()):
            where = matrices[number].where
            first, last = where.before(shard.start), where.before(shard.start + shard.length)
            blocks, inside = [], first
            for part in where.cut(first, last):
                local = Strided(part.start - shard.start + shard.offset, part.run, part.stride, part.count)
                blocks.append(Block(local, Strided(inside, part.numel)))
                inside += part.numel
            if blocks:
                found.append(Piece(number, tensors[id(shard.tensor)], tuple(blocks)))
    return found
