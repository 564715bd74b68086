"""Which rank holds which elements of every matrix: equal on all ranks, and small at any number of them.

Where all ranks hold a parameter by one rule (`Even`: the equal parts of ZeRO-3, replicas), the rule is all that they
tell each other, and what a rank holds is computed where it is asked for. At 1,024 ranks lists of such parts would be
hundreds of megabytes. Elsewhere, every rank lists its pieces: of a flat buffer that is cut in equal parts (ZeRO-1), a
rank holds few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from .agreement import agree, gather_rows, largest, wire_of, world_of
from .layout import Block, Matrix, Shard, Strided, by_parameter, check_once, compose, pieces

#: What a rank lists: (matrix, where inside it) of every piece.
Pieces = Sequence[tuple[int, tuple[Strided, ...]]]


@dataclass(frozen=True)
class Even:
    """Rank r holds elements `step` r to `step` r + `length` of a parameter, as far as it has so many.

    Attributes:
        length: elements of every rank.
        step: `length` where each rank holds a part of its own; 0 where each holds everything.
    """

    length: int
    step: int

    def part(self, rank: int, numel: int) -> Strided:
        """What a rank holds of a parameter of `numel` elements, if it is anything."""
        start = min(self.step * rank, numel)
        return Strided(start, min(self.length, numel - start))


@dataclass(frozen=True)
class Index:
    """What every rank of a group holds of every matrix. Equal on all ranks.

    Attributes:
        world: the number of ranks.
        even: parameter -> the rule by which all ranks hold it.
        listed: the pieces of the other parameters on each rank that has any.
    """

    world: int
    even: Mapping[str, Even]
    listed: Mapping[int, Pieces]

    @staticmethod
    def of_lists(lists: Sequence[Pieces]) -> Index:
        """Of the pieces of every rank."""
        return Index(len(lists), {}, dict(enumerate(lists)))


@dataclass(frozen=True, eq=False)
class Share:
    """How ranks share a matrix; matrices that are cut alike have one `Share`. Ranks are counted from the first of them.

    Attributes:
        numel: of the matrix.
        world: the number of ranks of the group, which may hold nothing.
        sizes: rank -> how many elements it holds; ascending ranks, of which each holds some.
        insides: rank -> where inside the matrix.
        distinct: how many different parts there are; others are replicas of these.
    """

    numel: int
    world: int
    sizes: Mapping[int, int]
    insides: Mapping[int, tuple[Strided, ...]]
    distinct: int

    @staticmethod
    def listed(matrix: Matrix, world: int, insides: Mapping[int, tuple[Strided, ...]]) -> Share:
        sizes = {rank: sum(part.numel for part in inside) for rank, inside in sorted(insides.items())}
        return Share(matrix.numel, world, sizes, insides, len(set(insides.values())))

    @staticmethod
    def by_rule(where: Strided, rule: Even, first: int, world: int) -> Share:
        """Of a matrix that lies at `where` of its parameter, counted from the part of rank `first` on."""
        if rule.step == 0:
            size = where.before(rule.length)
            return Share(where.numel, world, dict.fromkeys(range(world), size), _ByRule(where, rule), 1)
        count = min((where.end - 1) // rule.step + 1, world - first)
        ends = [where.before(rank * rule.step) for rank in range(count + 1)]
        held = enumerate(after - before for before, after in pairwise(ends))
        sizes = {rank: size for rank, size in held if size}
        return Share(where.numel, world, sizes, _ByRule(where, rule), len(sizes))

    @cached_property
    def total(self) -> int:
        """Elements on all ranks, replicas among them."""
        return sum(self.sizes.values())

    @property
    def parts(self) -> Sequence[Strided]:
        """Everything that is held, without replicas."""
        if isinstance(self.insides, _ByRule):  # one part after the other: they may only end too early
            return [Strided(0, self.total * self.distinct // max(len(self.sizes), 1))]
        return [part for inside in dict.fromkeys(self.insides.values()) for part in inside]

    @cached_property
    def evenly(self) -> bool:
        """Whether every rank of the group holds as many elements."""
        return len(self.sizes) == self.world and len(set(self.sizes.values())) == 1

    @cached_property
    def everywhere(self) -> bool:
        """Whether every rank of the group holds the same elements."""
        return len(self.sizes) == self.world and self.distinct == 1

    @cached_property
    def by_size(self) -> tuple[tuple[int, ...], ...]:
        """The ranks that hold most, then those that hold the next smaller number of elements, and so on."""
        largest_first = sorted(self.sizes, key=lambda rank: (-self.sizes[rank], rank))
        return tuple(tuple(ranks) for _, ranks in groupby(largest_first, key=self.sizes.__getitem__))


class _ByRule(dict[int, tuple[Strided, ...]]):
    """`Share.insides` of a rule, computed when they are asked for."""

    def __init__(self, where: Strided, rule: Even) -> None:
        self._matrix, self._rule = Block(where, Strided(0, where.numel)), rule

    def __missing__(self, rank: int) -> tuple[Strided, ...]:
        held = Strided(rank * self._rule.step, self._rule.length)
        self[rank] = tuple(block.inside for block in compose(Block(held, held), self._matrix))
        return self[rank]


@dataclass(frozen=True)
class Holders:
    """The ranks that hold a matrix.

    Attributes:
        first: the rank from which `share` counts.
        share: what they hold.
    """

    first: int
    share: Share

    def __len__(self) -> int:
        return len(self.share.sizes)

    @property
    def ranks(self) -> list[int]:
        """Ascending."""
        return [self.first + rank for rank in self.share.sizes]

    def elements(self, rank: int) -> int:
        return self.share.sizes.get(rank - self.first, 0)

    def inside(self, rank: int) -> tuple[Strided, ...]:
        """Where inside the matrix a rank holds elements; nothing where it has none."""
        rank -= self.first
        return self.share.insides[rank] if rank in self.share.sizes else ()

    def returned(self, owner: int, scalars: int) -> int:
        """bf16 numbers that an owner sends: parts of the update, and `scalars` with each, to the other holders."""
        own = self.elements(owner)
        return self.share.total - own + scalars * (len(self) - (own > 0))


def holders(matrices: Sequence[Matrix], index: Index) -> list[Holders]:
    """The holders of every matrix.

    Raises:
        ValueError: for a matrix of which the ranks do not hold every element exactly once (replicas apart).
    """
    listed: dict[int, dict[int, tuple[Strided, ...]]] = {}
    for rank, held in index.listed.items():
        for number, inside in held:
            of_rank = listed.setdefault(number, {})
            of_rank[rank] = of_rank.get(rank, ()) + inside
    shares: dict[tuple[int, ...], Share] = {}
    found = []
    for number, matrix in enumerate(matrices):
        where, rule = matrix.where, index.even.get(matrix.parameter)
        if rule is None:
            of = Holders(0, Share.listed(matrix, index.world, listed.get(number, {})))
            check_once(matrix.name, matrix.numel, of.share.parts)
        else:
            first = where.start // rule.step if rule.step else 0
            # Counted from the first rank's part, so that equal matrices share what is found.
            start = where.start - first * rule.step
            # Only a matrix that reaches the last ranks depends on how many ranks there are.
            reach = min(index.world - first, (where.end - 1) // rule.step - first + 1) if rule.step else 0
            key = start, where.run, where.stride, where.count, rule.length, rule.step, reach
            if key not in shares:
                counted = Strided(start, where.run, where.stride, where.count)
                shares[key] = Share.by_rule(counted, rule, first, index.world)
                check_once(matrix.name, matrix.numel, shares[key].parts)
            of = Holders(first, shares[key])
        found.append(of)
    return found


def publish(
    matrices: Sequence[Matrix], shards: Sequence[Shard], group: Any, device: torch.device
) -> tuple[list[Matrix], Index]:
    """Tells the other ranks what this one holds. Collective.

    Args:
        matrices: the same on every rank.
        shards: of whole parameters; those of other parameters are passed over.
        group: the ranks that hold these matrices between them: a process group, or None.
        device: of this rank.

    Returns:
        The matrices of which some rank holds elements, and what every rank holds of these.

    Raises:
        ValueError: on every rank, if the matrices differ.
    """
    numbers = by_parameter(matrices)
    agree(
        "the matrices",
        [f"{m.name} {m.rows}x{m.cols} at {m.where.start} of {m.parameter}" for m in matrices],
        "Build the same model from the same configuration on every rank",
        group,
    )
    rank, world = world_of(group)
    if not numbers:
        return [], Index(world, {}, {})
    device = wire_of(group, device)
    mine: dict[str, list[Strided]] = {name: [] for name in numbers}
    for shard in shards:
        if shard.parameter in mine:
            mine[shard.parameter].append(shard.where)
    sizes = [max(matrices[number].where.end for number in of) for of in numbers.values()]
    lengths = _largest([sum(part.numel for part in held) for held in mine.values()], group, device)
    cuts = list(zip(lengths, sizes))
    # A rank that holds everything is one of many replicas, or its parameter is held by no rule.
    rules = {(length, numel): Even(length, 0 if length == numel else length) for length, numel in set(cuts)}
    expected = {cut: rule.part(rank, cut[1]) for cut, rule in rules.items()}
    others = [not _holds(held, expected[cut]) for held, cut in zip(mine.values(), cuts)]
    differing = _largest(others, group, device)
    held_by_any = {name for name, length in zip(mine, lengths) if length}
    found = zip(mine, cuts, differing)
    even = {name: rules[cut] for name, cut, differs in found if name in held_by_any and not differs}
    kept = [matrix for matrix in matrices if matrix.parameter in held_by_any]
    unlike = [shard for shard in shards if shard.parameter in held_by_any and shard.parameter not in even]
    everyone = gather_rows(rows(kept, unlike).to(device), group)
    listed = {
        rank: [(matrix, (Strided(*part),)) for matrix, *part in of_rank.tolist()]
        for rank, of_rank in enumerate(everyone)
        if len(of_rank)
    }
    return kept, Index(world, even, listed)


def _holds(held: Sequence[Strided], part: Strided) -> bool:
    """Whether a rank holds this part of a parameter, as a single shard, and nothing else of it."""
    if not part.run:
        return not held
    return len(held) == 1 and (held[0].start, held[0].run, held[0].count) == (part.start, part.run, 1)


def _largest(values: Sequence[int], group: Any, device: torch.device) -> list[int]:
    """Of each value the largest that a rank has."""
    found = torch.tensor(values, dtype=torch.int64).to(device)
    largest(found, group)
    return [int(value) for value in found.tolist()]


def rows(matrices: Sequence[Matrix], shards: Sequence[Shard]) -> Tensor:
    """What a rank lists of its shards, int64: number of a matrix, and where inside it (start, run, stride, count)."""
    tensors = {tensor: number for number, tensor in enumerate(dict.fromkeys(id(shard.tensor) for shard in shards))}
    found = [
        (piece.matrix, part.start, part.run, part.stride, part.count)
        for piece in pieces(matrices, shards, tensors)
        for part in piece.inside
    ]
    return torch.tensor(found, dtype=torch.int64).view(-1, 5)
