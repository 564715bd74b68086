"""What ranks publish, and the plans made of it, are those of lists of every part of every matrix on every rank."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from muon_plugin.core import holders
from muon_plugin.core.holders import Even, Index, Pieces
from muon_plugin.core.layout import Matrix, Partition, Shard, Strided, by_parameter, cut_shards, pieces
from muon_plugin.core.messages import legs
from muon_plugin.core.plan import make_plan
from muon_plugin.core.routing import route
from tests.support.plan_by_lists import legs_by_lists, plan_by_lists
from tests.support.ranks import RankError

pytestmark = pytest.mark.fast

Span = tuple[str, int, int]


@dataclass(frozen=True)
class Layout:
    """Random matrices, and what each rank holds of them."""

    matrices: tuple[Matrix, ...]
    shards: tuple[tuple[Shard, ...], ...]

    @property
    def world(self) -> int:
        return len(self.shards)

    def lists(self) -> list[Pieces]:
        return [
            [(p.matrix, p.inside) for p in pieces(self.matrices, held, {id(s.tensor): 0 for s in held})]
            for held in self.shards
        ]


def model(draw: random.Random) -> tuple[Matrix, ...]:
    """Parameters that hold one matrix, several one after the other, or several that take turns."""
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(draw.randint(1, 12)):
        kind = draw.choice(["w", "w", "fused", "turns", "experts.gate_up_proj"])
        rows, cols = 16 if kind == "turns" else 4 * draw.randint(1, 6), draw.randint(2, 9)
        shape = (draw.randint(1, 4), rows, cols) if kind.startswith("experts") else (rows, cols)
        shapes[f"layers.{number}.{kind}"] = shape
        shapes |= {f"layers.{number}.{i}.w": shape for i in range(draw.choice([0, 0, 5])) if len(shape) == 2}
    splits = {"fused": 2, "turns": {"sizes": [3, 1], "groups": 4}}
    return route(shapes, split={k: of for k, of in splits.items() if any(k in name for name in shapes)}).matrices


def numels(matrices: Sequence[Matrix]) -> dict[str, int]:
    return {name: max(matrices[n].where.end for n in of) for name, of in by_parameter(matrices).items()}


def in_equal_parts(sizes: dict[str, int], world: int, draw: random.Random) -> list[list[Span]]:
    """ZeRO-3: each parameter."""
    rules = {name: Even(-(-numel // world), -(-numel // world)) for name, numel in sizes.items()}
    parts = [[(name, of.part(rank, sizes[name])) for name, of in rules.items()] for rank in range(world)]
    return [[(name, part.start, part.run) for name, part in held if part.run] for held in parts]


def replicas(sizes: dict[str, int], world: int, draw: random.Random) -> list[list[Span]]:
    return [[(name, 0, numel) for name, numel in sizes.items()]] * world


def of_a_flat_buffer(sizes: dict[str, int], world: int, draw: random.Random) -> list[list[Span]]:
    """ZeRO-1, Megatron."""
    part = -(-sum(sizes.values()) // world)
    found: list[list[Span]] = []
    for rank in range(world):
        offset, held = 0, []
        for name, numel in sizes.items():
            first, last = max(offset, rank * part), min(offset + numel, (rank + 1) * part)
            held += [(name, first - offset, last - first)] * (first < last)
            offset += numel
        found.append(held)
    return found


def by_chance(sizes: dict[str, int], world: int, draw: random.Random) -> list[list[Span]]:
    """Every parameter in one of these ways, or on one rank alone."""
    found: list[list[Span]] = [[] for _ in range(world)]
    for name, numel in sizes.items():
        way = draw.choice([in_equal_parts, replicas, of_a_flat_buffer, None])
        if way is None:
            found[draw.randrange(world)].append((name, 0, numel))
        else:
            for held, spans in zip(found, way({name: numel}, world, draw)):
                held += spans
    return found


CUTS = (in_equal_parts, replicas, of_a_flat_buffer, by_chance)


def layouts(seed: int, count: int, world: int | None = None, tp: bool = True) -> Iterator[Layout]:
    draw = random.Random(seed)
    for number in range(count):
        matrices, ranks = model(draw), world or draw.choice([1, 2, 3, 4, 7, 16, 40])
        if tp and number % 4 == 3 and ranks % 2 == 0:
            yield tensor_parallel(matrices, ranks, draw)
            continue
        spans = CUTS[number % 4](numels(matrices), ranks, draw)
        tensor = torch.empty(0)
        held = ((Shard(name, Strided(a, n), tensor, Strided(0, n)) for name, a, n in of) for of in spans)
        yield Layout(matrices, tuple(map(tuple, held)))


def tensor_parallel(matrices: tuple[Matrix, ...], ranks: int, draw: random.Random) -> Layout:
    """Two TP ranks, which share or repeat parameters; a flat buffer on each, cut over data parallel ranks."""
    sizes, tensor = numels(matrices), torch.empty(0)
    partitions = {}
    for name, numel in sizes.items():
        rows = next(d for d in (4, 2, 1) if numel % d == 0)
        dims = [None] + [dim for dim, size in enumerate((rows, numel // rows)) if size % 2 == 0]
        partitions[name] = Partition.of(name, (rows, numel // rows), draw.choice(dims), 2)
    local = {name: sum(block.local.numel for block in p.ranks[0]) for name, p in partitions.items()}
    found = []
    for spans in of_a_flat_buffer(local, ranks // 2, draw):
        for rank in range(2):
            shards = [Shard.of_range(name, start, length, tensor) for name, start, length in spans]
            found.append(tuple(whole for s in shards for whole in cut_shards(partitions[s.parameter], rank, s)))
    return Layout(matrices, tuple(found))


class Waits(Exception):
    """For what the ranks after this one give."""


class Collectives:
    """Those of one rank, in a process with all of them: the ranks run again and again, each time one further."""

    def __init__(self, given: Sequence[Sequence[torch.Tensor]], now: list[torch.Tensor]) -> None:
        self._given, self._now = iter(given), now

    def gather_rows(self, rows: torch.Tensor, group: object) -> Sequence[torch.Tensor]:
        """What all ranks gave, once they have."""
        for of_all in self._given:
            return of_all
        self._now.append(rows.clone())
        raise Waits

    def largest(self, tensor: torch.Tensor, group: object) -> None:
        tensor.copy_(torch.stack(list(self.gather_rows(tensor, group))).amax(0))


def published(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Matrix], Index]]:
    """What every rank gets from `publish`."""
    given: list[list[torch.Tensor]] = []
    while True:
        found, now = [], []
        for rank, shards in enumerate(layout.shards):
            of_rank = Collectives(given, now)
            monkeypatch.setattr(holders, "largest", of_rank.largest)
            monkeypatch.setattr(holders, "gather_rows", of_rank.gather_rows)
            monkeypatch.setattr(holders, "world_of", lambda group, rank=rank: (rank, layout.world))
            with contextlib.suppress(Waits):
                found.append(holders.publish(layout.matrices, shards, None, torch.device("cpu")))
        if not now:
            return found
        given.append(now)


def cost(rows: int, cols: int) -> int:
    return min(rows, cols) ** 2 * (20 * max(rows, cols) + 7)


def test_every_rank_gets_what_all_ranks_hold(monkeypatch):
    """By a rule or in lists, and with every plan the same as from lists alone."""
    ruled = listed = 0
    for number, layout in enumerate(layouts(1, 80)):
        (kept, index), *others = published(layout, monkeypatch)
        assert all(other == (kept, index) for other in others)
        assert kept == list(layout.matrices)
        ruled, listed = ruled + len(index.even), listed + len(index.listed)
        by_lists = plan_by_lists(layout.matrices, layout.lists(), cost, number % 3)
        plan = make_plan(kept, index, cost, number % 3)
        assert [route.owner for route in plan.routes] == by_lists.owners
        assert [route.round for route in plan.routes] == by_lists.rounds
        assert list(plan.flops) == by_lists.flops
        assert list(plan.bytes_sent) == by_lists.bytes_sent
        for route_, held, sources, everywhere in zip(
            plan.routes, by_lists.holders, by_lists.sources, by_lists.everywhere
        ):
            assert dict(route_.holders) == held
            assert list(dict(route_.holders)) == sorted(held)
            assert (set(route_.sources), route_.everywhere) == (sources, everywhere)
            assert [rank for rank in held if route_.is_source(rank)] == [rank for rank in held if rank in sources]
        sent = [(n, of) for n, of in enumerate(plan.routes) if of.round >= 0]
        numbers = [n for n, _ in sent]
        for rank in range(layout.world):
            found = legs(sent, rank, layout.world, bool(number % 2))
            assert found == legs_by_lists(by_lists, numbers, rank, layout.world, bool(number % 2))
    assert ruled > 300
    assert listed > 300


@pytest.mark.parametrize("world", [32, 36, 50])
def test_owners_at_many_ranks(world):
    """Loads that leave no room on the holders of most, and the search for balance."""
    draw = random.Random(world)
    shapes = {f"layers.{i}.w": (draw.choice([32, 40, 64]), draw.choice([48, 64, 100])) for i in range(2 * world)}
    shapes |= {f"layers.{i}.experts.gate_up_proj": (6, 24 + 2 * i, 10) for i in range(3)}
    shapes |= {f"layers.{i}.turns": (96, 16) for i in range(3)}
    matrices = route(shapes, split={"turns": {"sizes": [2, 4], "groups": 16}}).matrices
    for cut in (in_equal_parts, replicas):
        spans, tensor = cut(numels(matrices), world, draw), torch.empty(0)
        shards = tuple(tuple(Shard.of_range(name, a, n, tensor) for name, a, n in of) for of in spans)
        lists = Layout(matrices, shards).lists()
        rules = {
            name: Even(numel, 0) if cut is replicas else Even(-(-numel // world), -(-numel // world))
            for name, numel in numels(matrices).items()
        }
        by_lists = plan_by_lists(matrices, lists, cost)
        for index in (Index(world, rules, {}), Index.of_lists(lists)):
            plan = make_plan(matrices, index, cost)
            assert [(of.owner, of.round) for of in plan.routes] == list(zip(by_lists.owners, by_lists.rounds))
            assert (list(plan.flops), list(plan.bytes_sent)) == (by_lists.flops, by_lists.bytes_sent)


def test_what_the_ranks_publish_is_what_they_hold(ranks):
    """In real processes."""
    expected = [plan_by_lists(of.matrices, of.lists(), cost).holders for of in layouts(2, 12, 4)]
    assert ranks(4).run(publish_all, 12) == [expected] * 4


def publish_all(rank: int, count: int) -> list[list[dict[int, tuple[Strided, ...]]]]:
    found = []
    for layout in layouts(2, count, dist.get_world_size()):
        kept, index = holders.publish(layout.matrices, layout.shards[rank], None, torch.device("cpu"))
        held = holders.holders(kept, index)
        found.append([dict(zip(of.ranks, map(of.inside, of.ranks))) for of in held])
    return found


@pytest.mark.parametrize("fault", ["part missing", "part twice", "too short", "another model"])
def test_shards_that_do_not_make_up_a_matrix_are_an_error_on_every_rank(ranks, fault):
    with pytest.raises(RankError) as error:
        ranks(3).run(faulty, fault)
    message = "disagree about the matrices" if fault == "another model" else "of the 24 elements of layers.1.w"
    assert all(message in found[1] for found in error.value.errors), error.value.errors


def faulty(rank: int, fault: str) -> None:
    """Rank 1 does not hold what the rule of the others says."""
    names = [f"layers.{i}.w" for i in range(3)]
    matrices = [Matrix(name, name, 4, 6, Strided(0, 24)) for name in names]
    spans = dict.fromkeys(names, (8 * rank, 8))
    if fault == "too short":  # on every rank: by a rule that ends too early
        spans["layers.1.w"] = (7 * rank, 7)
    elif rank == 1 and fault == "part missing":
        del spans["layers.1.w"]
    elif rank == 1 and fault == "part twice":
        spans["layers.1.w"] = (4, 8)
    elif rank == 1 and fault == "another model":
        matrices[2] = Matrix(names[2], names[2], 6, 4, Strided(0, 24))
    shards = [Shard.of_range(name, start, length, torch.empty(24)) for name, (start, length) in spans.items()]
    make_plan(*holders.publish(matrices, shards, None, torch.device("cpu")), cost)
