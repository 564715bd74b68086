"""Where the elements of every matrix lie: in the parameter, in this rank's tensors, on the other ranks.

Data first. An engine's folder says which `Shard` of which parameter this rank holds; `pieces` cuts the shards at the
borders of the matrices; what all ranks know of each other (`index`) is the inner side of those pieces.
"""

from __future__ import annotations

from bisect import bisect_right
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

    @property
    def end(self) -> int:
        """The position after the last one."""
        return self.start + (self.count - 1) * self.stride + self.run

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
            count = max(whole, 1)
            parts.append(Strided(self.start + index * self.stride + inside, run, self.stride * (count > 1), count))
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
    """Elements that this rank holds of a parameter: where in the whole, flattened parameter, and where in a tensor.

    Attributes:
        parameter: its name.
        where: positions in the whole parameter, as if no rank had cut it.
        tensor: this rank's tensor, flat or not.
        local: positions in the flattened tensor, in the same order and the same number of runs.
    """

    parameter: str
    where: Strided
    tensor: Tensor
    local: Strided

    @staticmethod
    def of_range(parameter: str, start: int, length: int, tensor: Tensor, offset: int = 0) -> Shard:
        """Elements `start` to `start + length` lie at `offset` of the tensor, one after the other."""
        return Shard(parameter, Strided(start, length), tensor, Strided(offset, length))


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


def pieces(
    matrices: Sequence[Matrix],
    shards: Iterable[Shard],
    tensors: Mapping[int, int],
    of_parameter: Mapping[str, Sequence[int]] | None = None,
) -> list[Piece]:
    """Cuts this rank's shards at the borders of the matrices.

    Args:
        matrices: all matrices, in the order in which every rank counts them; those of a parameter in their own order.
        shards: what this rank holds; shards of other parameters are passed over.
        tensors: id of a tensor -> its number.
        of_parameter: what `by_parameter` gives, for whoever cuts the shards of many ranks.
    """
    if of_parameter is None:
        of_parameter = by_parameter(matrices)
    found: dict[tuple[int, int], list[Block]] = {}
    for shard in shards:
        numbers = of_parameter.get(shard.parameter, ())
        # A batch of experts has hundreds of matrices; they begin and end in their order.
        for number in numbers[bisect_right(numbers, shard.where.start, key=lambda n: matrices[n].where.end) :]:
            where = matrices[number].where
            if where.start >= shard.where.end:
                break
            blocks = [
                Block(places(shard.local, ordinals(shard.where, part)), ordinals(where, part))
                for part in common(shard.where, where)
            ]
            if blocks:
                found.setdefault((number, tensors[id(shard.tensor)]), []).extend(blocks)
    return [Piece(number, tensor, tuple(blocks)) for (number, tensor), blocks in found.items()]


def common(a: Strided, b: Strided) -> list[Strided]:
    """The positions in both, in order; each run of a part lies in one run of `a` and in one run of `b`."""
    if b.count == 1:
        return a.cut(a.before(b.start), a.before(b.start + b.run))
    if a.count == 1:
        return common(b, a)
    if a.stride != b.stride:
        runs = (Strided(a.start + i * a.stride, a.run) for i in range(a.count))
        return [part for run in runs for part in common(b, run)]
    period, found = a.stride, []
    for shift in ((a.start - b.start) // period, (a.start - b.start) // period + 1):
        # Run i of a against run i + shift of b.
        low = max(a.start, b.start + shift * period)
        high = min(a.start + a.run, b.start + shift * period + b.run)
        first, last = max(0, -shift), min(a.count, b.count - shift)
        if low < high and first < last:
            found.append(Strided(low + first * period, high - low, period, last - first))
    return found


def cut_shards(
    parameter: str, tp: Iterable[tuple[Strided, Strided]], start: int, end: int, tensor: Tensor, offset: int = 0
) -> list[Shard]:
    """Elements `start` to `end` of this TP rank's flattened part of a parameter, which lie at `offset` of `tensor`.

    Args:
        tp: (where in the flattened part of the TP rank, where in the whole parameter): the same elements in order, in
            the same number of runs.
    """
    found = []
    for local, whole in tp:
        for part in common(local, Strided(start, end - start)):
            where = places(whole, ordinals(local, part))
            inside = Strided(part.start - start + offset, part.run, part.stride, part.count)
            found.append(Shard(parameter, where, tensor, inside))
    return found


def ordinals(whole: Strided, part: Strided) -> Strided:
    """Where the positions `part` (of `common`) come in the order of `whole`."""
    apart = whole.count > 1 and part.stride >= whole.stride  # each run of the part in a run of its own
    stride = whole.run if apart else part.stride
    return Strided(whole.before(part.start), part.run, stride if part.count > 1 else 0, part.count)


def places(positions: Strided, ordinals: Strided) -> Strided:
    """The positions that come at these ordinals."""
    index, inside = divmod(ordinals.start, positions.run)
    apart = positions.count > 1 and ordinals.stride >= positions.run
    stride = positions.stride if apart else ordinals.stride
    start = positions.start + index * positions.stride + inside
    return Strided(start, ordinals.run, stride if ordinals.count > 1 else 0, ordinals.count)
