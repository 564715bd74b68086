"""Where the elements of every matrix lie: in the whole parameter, in this rank's tensors, on the other ranks.

A `Strided` is a set of positions in a flat tensor: runs of equal length, a stride apart. A `Block` pairs two of them
that hold the same elements in the same order, such as "here in this rank's tensor, there in the whole parameter".
Everything below follows from two questions about such positions: which do two of them have in common (`common`), and
where do these lie in another tensor (`compose`)?

A worked example. Two TP ranks cut a 4 x 6 parameter by columns. TP rank 1 holds the right half as a tensor of 4 x 3
elements, of which ZeRO gives elements 2 to 9 (of its flattened part) to one DP rank. The upper two rows of the
parameter are one matrix, the lower two rows another one, as in a fused projection::

    positions in the parameter      in TP rank 1's part      what the DP rank holds, by position in the parameter

     0  1  2 |  3  4  5                 0  1  2                  .  .  5
     6  7  8 |  9 10 11                 3  4  5                  9 10 11      upper matrix
    ---------+---------             ------------             ---------------
    12 13 14 | 15 16 17                 6  7  8                 15 16 17      lower matrix
    18 19 20 | 21 22 23                 9 10 11                 21  .  .

1. `Partition.of` says what TP rank 1 holds: four runs of three elements. They lie at Strided(0, 3, 3, 4) of its part
   and at Strided(3, 3, 6, 4) of the parameter.
2. `cut_shards` cuts ZeRO's range, Strided(2, 8), out of these. A range seldom begins or ends with a row, so there are
   up to three parts: a part of a row at Strided(5, 1), the whole rows at Strided(9, 3, 6, 2), a part of a row at
   Strided(21, 1). In the DP rank's own tensor they lie one after the other, from 0, from 1 and from 7 on.
3. `pieces` cuts these at the border of the matrices, after position 11. Of the whole rows, the first lies in the upper
   matrix and the second in the lower one, where it begins at 15 - 12 = 3.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from torch import Tensor


class Strided(NamedTuple):
    """`count` runs of `run` elements, `stride` apart, from `start`: positions in a flat tensor.

    One run for rows of a matrix; one run a row for columns; one run a query group for an interleaved projection.
    A start at scale makes a million of these: a named tuple is made in less than half of a dataclass's time.
    """

    start: int
    run: int
    stride: int = 0
    count: int = 1  # type: ignore[assignment]  # hides tuple.count, which nothing here uses

    @property
    def numel(self) -> int:
        return self.run * self.count

    @property
    def end(self) -> int:
        """The position after the last one."""
        return self.start + (self.count - 1) * self.stride + self.run

    def view(self, flat: Tensor) -> Tensor:
        """These positions of a contiguous 1-D tensor: (count, run), sharing memory."""
        stride = self.run if self.count == 1 else self.stride
        return flat.as_strided((self.count, self.run), (stride, 1), flat.storage_offset() + self.start)

    def before(self, position: int) -> int:
        """How many of the elements lie below `position` of the flat tensor."""
        if self.count == 1:  # whatever its stride
            return min(max(position - self.start, 0), self.run)
        full, rest = divmod(max(position - self.start, 0), self.stride)
        return min(full * self.run + min(rest, self.run), self.numel)

    def at(self, ordinal: int) -> int:
        """The position of the element before which so many others come: the inverse of `before`."""
        index, inside = divmod(ordinal, self.run)
        return self.start + index * self.stride + inside

    def mapped(self, source: Strided, target: Strided) -> Strided:
        """These positions lie in `source`: where `target` has the same elements, in as many runs of the same length."""
        start = target.at(source.before(self.start))
        stride = target.at(source.before(self.start + self.stride)) - start if self.count > 1 else 0
        return Strided(start, self.run, stride, self.count)

    def cut(self, first: int, last: int) -> list[Strided]:
        """The elements `first` to `last` (exclusive), in order: the rest of a run, whole runs, the start of a run."""
        parts = []
        while first < last:
            inside = first % self.run
            run = min(self.run - inside, last - first)
            count = max((last - first) // self.run, 1) if inside == 0 else 1
            parts.append(Strided(self.at(first), run, self.stride if count > 1 else 0, count))
            first += run * count
        return parts


class Block(NamedTuple):
    """The same elements in the same order, in two flat tensors: in as many runs in both, or in a single one.

    Attributes:
        local: where in what this rank holds.
        inside: where in the whole: the parameter, or the matrix.
    """

    local: Strided
    inside: Strided


@dataclass(frozen=True)
class Partition:
    """How tensor parallelism partitions a parameter.

    Attributes:
        name: the parameter's.
        shape: of the whole parameter.
        ranks: for each TP rank, where the elements of its flattened part lie in the flattened parameter. A single entry
            where every TP rank holds the whole parameter.
    """

    name: str
    shape: tuple[int, ...]
    ranks: tuple[tuple[Block, ...], ...]

    @staticmethod
    def of(name: str, shape: Iterable[int], dim: int | None = None, size: int = 1, parts: int = 1) -> Partition:
        """Partitioned along one dimension, or not at all.

        Args:
            name: the parameter's.
            shape: of the whole parameter.
            dim: the dimension, which `size` times `parts` divides; None where every TP rank holds the whole parameter.
            size: how many TP ranks share the parameter.
            parts: so many equal parts lie one after the other along `dim`, each of them shared by all TP ranks: 2 for
                gate and up in one parameter (Megatron's ``partition_stride``).

        Raises:
            ValueError: for a dimension that they do not divide.
        """
        return Partition(name, tuple(shape), _along(tuple(shape), dim, size, parts))

    def in_whole(self, rank: int, held: Block) -> list[Block]:
        """`held` lies inside the flattened part of TP rank `rank`: where the same elements lie in the parameter."""
        blocks = self.ranks[rank % len(self.ranks)]
        if len(blocks) == 1 and blocks[0].local == blocks[0].inside:  # as of a whole parameter
            return [held]
        return [found for block in blocks for found in compose(held, block)]


@cache
def _along(shape: tuple[int, ...], dim: int | None, size: int, parts: int) -> tuple[tuple[Block, ...], ...]:
    """The blocks of `Partition.of`; parameters of one shape share them."""
    if dim is None or size == 1:
        return ((Block(whole := Strided(0, math.prod(shape)), whole),),)
    if shape[dim] % (size * parts):
        raise ValueError(f"dimension {dim} of {list(shape)} is not {parts} x {size} equal parts: TP cannot cut it")
    # The parameter is `count` times `period` elements, of which a TP rank holds `parts` runs each.
    count, period = math.prod(shape[:dim]), math.prod(shape[dim:])
    run, held = period // (size * parts), period // size

    def block(rank: int, part: int) -> Block:
        return Block(Strided(part * run, run, held, count), Strided((part * size + rank) * run, run, period, count))

    return tuple(tuple(block(rank, part) for part in range(parts)) for rank in range(size))


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
    """Elements of a parameter that this rank holds: where in the flattened parameter, and where in a tensor.

    Attributes:
        parameter: its name.
        where: positions in the whole parameter; before `cut_shards`, in this TP rank's part, as the engine knows it.
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


def lies_in(part: Tensor, whole: Tensor, start: int) -> bool:
    """Whether `part` is the elements of `whole` from `start` on, in the same memory; both are contiguous.

    Told from addresses. Values tell nothing where weights are equal, and differ from themselves where they are NaN, as
    they may be before a checkpoint is loaded.
    """
    if part.dtype is not whole.dtype or not 0 <= start <= whole.numel() - part.numel():
        return False
    if not (part.is_contiguous() and whole.is_contiguous()):
        return False
    return part.numel() == 0 or part.data_ptr() == whole.data_ptr() + start * whole.element_size()


@dataclass(frozen=True)
class Piece:
    """What this rank holds of one matrix in one tensor (both by their number)."""

    matrix: int
    tensor: int
    blocks: tuple[Block, ...]

    @property
    def inside(self) -> tuple[Strided, ...]:
        return tuple(block.inside for block in self.blocks)


def by_parameter(matrices: Sequence[Matrix]) -> dict[str, list[int]]:
    """Parameter name -> the numbers of its matrices."""
    found: dict[str, list[int]] = {}
    for number, matrix in enumerate(matrices):
        found.setdefault(matrix.parameter, []).append(number)
    return found


def cut_shards(partition: Partition, rank: int, shard: Shard) -> list[Shard]:
    """A shard of the flattened part of TP rank `rank`, as shards of the whole parameter."""
    blocks = partition.in_whole(rank, Block(shard.local, shard.where))
    return [Shard(shard.parameter, block.inside, shard.tensor, block.local) for block in blocks]


def pieces(matrices: Sequence[Matrix], shards: Iterable[Shard], tensors: Mapping[int, int]) -> list[Piece]:
    """Cuts this rank's shards of whole parameters at the borders of the matrices.

    Args:
        matrices: all matrices, in the order in which every rank counts them; those of a parameter in their own order.
        shards: what this rank holds; shards of other parameters are passed over.
        tensors: id of a tensor -> its number.
    """
    of_parameter = by_parameter(matrices)
    found: dict[tuple[int, int], list[Block]] = {}
    for shard in shards:
        held = Block(shard.local, shard.where)
        for number, blocks in in_matrices(held, of_parameter.get(shard.parameter, ()), matrices):
            found.setdefault((number, tensors[id(shard.tensor)]), []).extend(blocks)
    return [Piece(number, tensor, tuple(blocks)) for (number, tensor), blocks in found.items()]


def in_matrices(held: Block, numbers: Sequence[int], matrices: Sequence[Matrix]) -> Iterator[tuple[int, list[Block]]]:
    """`held` lies inside a parameter, whose matrices have these numbers: (number, where in that matrix)."""
    # A batch of experts has hundreds of matrices; they begin and end in their order.
    first = bisect_right(numbers, held.inside.start, key=lambda n: matrices[n].where.end) if len(numbers) > 1 else 0
    for number in numbers[first:]:
        matrix = matrices[number]
        if matrix.where.start >= held.inside.end:
            return
        if blocks := compose(held, Block(matrix.where, Strided(0, matrix.numel))):
            yield number, blocks


def check_once(what: str, numel: int, parts: Sequence[Strided], holders: str = "the ranks") -> None:
    """Checks that these parts make up something of `numel` elements: each of them once, none beside.

    Raises:
        ValueError: with `what` it is and who has the parts, if they do not.
    """
    covered = sum(part.numel for part in parts)
    overlap = next(overlaps(parts), None)
    outside = any(part.start < 0 or part.end > numel for part in parts)
    if covered != numel or overlap or outside:
        twice = f", {overlap[0]} and {overlap[1]} overlap" if overlap else ""
        raise ValueError(
            f"{holders} hold {covered} of the {numel} elements of {what}{twice}: the layout that was read from the "
            "engine is not the one it uses. Please report the engine's release and settings"
        )


def overlaps(parts: Iterable[Strided]) -> Iterator[tuple[Strided, Strided]]:
    """Pairs of these that share a position."""
    reaching: list[Strided] = []  # those that have begun and may not have ended
    for part in sorted(parts, key=lambda part: part.start):
        reaching = [other for other in reaching if other.end > part.start]
        yield from ((other, part) for other in reaching if common(other, part))
        reaching.append(part)


def merged(parts: Iterable[Strided]) -> tuple[Strided, ...]:
    """The same positions in as few runs as can be, where the parts are runs one after the other."""
    found: list[Strided] = []
    for part in sorted(parts, key=lambda part: part.start):
        run = Strided(part.start, part.numel) if part.count == 1 or part.stride == part.run else part
        if found and run.count == found[-1].count == 1 and found[-1].end == run.start:
            before = found.pop()
            run = Strided(before.start, before.run + run.run)
        found.append(run)
    return tuple(found)


def compose(first: Block, second: Block) -> list[Block]:
    """From `first.local` to `second.inside`, by way of the positions that `first.inside` and `second.local` share."""
    via, to = first.inside, second.local
    if via.count == first.local.count == to.count == second.inside.count == 1:  # most are: the same in fewer steps
        start = max(via.start, to.start)
        run = min(via.start + via.run, to.start + to.run) - start
        local, inside = first.local.start + start - via.start, second.inside.start + start - to.start
        return [Block(Strided(local, run), Strided(inside, run))] if run > 0 else []
    return [
        Block(part.mapped(first.inside, first.local), part.mapped(second.local, second.inside))
        for part in common(first.inside, second.local)
    ]


def common(a: Strided, b: Strided) -> list[Strided]:
    """The positions in both, in order; each run of a part lies in one run of `a` and in one run of `b`."""
    if b.count == 1:
        return a.cut(a.before(b.start), a.before(b.end))
    if a.count == 1 or a.stride != b.stride:
        return [part for i in range(a.count) for part in common(b, Strided(a.start + i * a.stride, a.run))]
    # Run i of `a` meets run i + shift of `b`, for two shifts at most; each overlap repeats with the common stride.
    stride, found = a.stride, []
    for shift in ((a.start - b.start) // stride, (a.start - b.start) // stride + 1):
        low = max(a.start, b.start + shift * stride)
        high = min(a.start + a.run, b.start + shift * stride + b.run)
        first, last = max(0, -shift), min(a.count, b.count - shift)
        if low < high and first < last:
            found.append(Strided(low + first * stride, high - low, stride, last - first))
    return found
