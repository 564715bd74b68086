"""The plan of a 24-layer GPT at 8 and 64 ranks, without processes: balance, and bytes against ZeRO-1 AdamW."""

from __future__ import annotations

import pytest
import torch

from muon_plugin.core.coefficients import coefficients_for
from muon_plugin.core.holders import Index
from muon_plugin.core.layout import Matrix, Shard, Strided, pieces
from muon_plugin.core.orthogonalize import NewtonSchulz
from muon_plugin.core.plan import make_plan, travels
from muon_plugin.core.routing import route

pytestmark = pytest.mark.fast

HIDDEN, LAYERS = 1024, 24


def gpt() -> tuple[Matrix, ...]:
    shapes = {}
    for layer in range(LAYERS):
        shapes |= {f"layers.{layer}.{name}.weight": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "o")}
        shapes |= {
            f"layers.{layer}.in.weight": (4 * HIDDEN, HIDDEN),
            f"layers.{layer}.out.weight": (HIDDEN, 4 * HIDDEN),
        }
    return route(shapes).matrices


def zero_index(matrices, world):
    """ZeRO's cut: all parameters one after the other, in equal parts."""
    total = sum(m.numel for m in matrices)
    size = -(-total // world)
    tensor = torch.empty(0)
    index = []
    for rank in range(world):
        shards, offset = [], 0
        for m in matrices:
            first, last = max(offset, rank * size), min(offset + m.numel, (rank + 1) * size)
            if first < last:
                shards.append(Shard.of_range(m.parameter, first - offset, last - first, tensor, first - rank * size))
            offset += m.numel
        index.append([(p.matrix, p.inside) for p in pieces(matrices, shards, {id(tensor): 0})])
    return Index.of_lists(index)


@pytest.mark.parametrize("method", ["auto", "standard"])
@pytest.mark.parametrize(("world", "factor"), [(8, 1.05), (64, 1.10)])
def test_the_busiest_rank_has_little_more_than_its_share(world, factor, method):
    matrices = gpt()
    flops = NewtonSchulz(coefficients_for(5, "simple"), method).flops
    plan = make_plan(matrices, zero_index(matrices, world), flops)
    costs = [flops(m.rows, m.cols) for m in matrices]
    assert sum(plan.flops) == sum(costs)
    assert max(plan.flops) <= factor * max(sum(costs) / world, max(costs))


def test_sizes_that_fit_together_badly_are_searched_for():
    """Costs 3, 3, 2, 2, 2 and two ranks: the least loaded rank for each, longest first, ends at 7 for one of them."""
    threes = {f"layers.{i}.up.weight": (1030, 1030) for i in range(8)}
    twos = {f"layers.{i}.down.weight": (900, 900) for i in range(12)}
    matrices = route(threes | twos).matrices
    flops = NewtonSchulz(coefficients_for(5, "simple")).flops
    replicas = [[(i, (Strided(0, m.numel),)) for i, m in enumerate(matrices)]] * 8
    plan = make_plan(matrices, Index.of_lists(replicas), flops)
    assert max(plan.flops) <= 1.01 * sum(plan.flops) / 8


@pytest.mark.parametrize("world", [2, 8, 64])
def test_at_most_four_bytes_an_element_of_what_is_cut(world):
    matrices = gpt()
    plan = make_plan(matrices, zero_index(matrices, world), NewtonSchulz(coefficients_for(5, "simple")).flops)
    moving = sum(m.numel for m, r in zip(matrices, plan.routes) if travels(r))
    assert sum(plan.bytes_sent) <= 4 * moving
    if LAYERS % world == 0:  # the cuts fall on layers: nothing moves
        assert sum(plan.bytes_sent) == 0


def test_a_step_at_64_ranks_sends_at_most_2_percent_more_than_adamw():
    """Ring accounting: reduce-scatter of bf16 gradients and all-gather of bf16 weights, 2 (N - 1) bytes each."""
    world, matrices = 64, gpt()
    plan = make_plan(matrices, zero_index(matrices, world), NewtonSchulz(coefficients_for(5, "simple")).flops)
    adamw = 4 * (world - 1) * sum(m.numel for m in matrices)
    assert (adamw + sum(plan.bytes_sent)) / adamw <= 1.02


def test_only_ranks_that_share_a_matrix_or_balance_it_talk():
    """A dense all-to-all runs network cards out of queue pairs at thousands of ranks."""
    world, matrices = 64, gpt()
    plan = make_plan(matrices, zero_index(matrices, world), NewtonSchulz(coefficients_for(5, "simple")).flops)
    peers = [set() for _ in range(world)]
    for r in plan.routes:
        for rank, _ in r.holders:
            if rank != r.owner:
                peers[rank].add(r.owner)
                peers[r.owner].add(rank)
    assert max(map(len, peers)) <= 8


def test_replicas_are_computed_once_and_shared_evenly():
    matrices = gpt()
    whole = [(i, (Strided(0, m.numel),)) for i, m in enumerate(matrices)]
    plan = make_plan(matrices, Index.of_lists([whole] * 4), NewtonSchulz(coefficients_for(5, "simple")).flops)
    assert plan.balance < 1.01
    assert sum(plan.bytes_sent) == 2 * 3 * sum(m.numel for m in matrices)


def test_a_layout_that_misses_elements_is_refused():
    matrix = Matrix("w", "w", 4, 4, Strided(0, 16))
    with pytest.raises(ValueError, match="hold 12 of the 16 elements of w"):
        make_plan([matrix], Index.of_lists([[(0, (Strided(0, 8),))], [(0, (Strided(8, 4),))]]), lambda *_: 1)


def test_large_matrices_travel_in_rounds():
    matrices = [Matrix(f"w{i}", f"w{i}", 8192, 8192, Strided(0, 2**26)) for i in range(6)]
    half = 2**25
    index = [[(i, (Strided(0, half),)) for i in range(6)], [(i, (Strided(half, half),)) for i in range(6)]]
    plan = make_plan(matrices, Index.of_lists(index), NewtonSchulz(coefficients_for(5, "simple")).flops)
    assert plan.rounds == 3
    for owner in (0, 1):
        assert sorted(r.round for r in plan.routes if r.owner == owner) == [0, 1, 2]


def test_a_large_matrix_and_two_smaller_ones_share_a_rank():
    """Llama-3 8B over 64 ranks, where symmetric products count by half: two large ones on a rank leave no room for the
    squares of the others, and best fit alone ends 10% above the mean."""
    costs = {(14336, 4096): 2405, (4096, 4096): 1374, (1024, 4096): 41}
    counts = {(14336, 4096): 96, (4096, 4096): 64, (1024, 4096): 64}
    shapes = [shape for shape, count in counts.items() for _ in range(count)]
    matrices = [Matrix(f"w{i}", f"w{i}", *s, Strided(0, s[0] * s[1])) for i, s in enumerate(shapes)]
    index = Index.of_lists(
        [[(i, (Strided(0, m.numel),)) for i, m in enumerate(matrices) if i % 64 == r] for r in range(64)]
    )
    assert make_plan(matrices, index, lambda rows, cols: costs[rows, cols]).balance < 1.05
