"""What a start costs one rank of thousands, counted in the code that every rank runs; the other ranks do not."""

from __future__ import annotations

import pytest

from benchmarks.startup import CASES, LIMITS, start_of
from muon_plugin.core.plan import make_plan
from muon_plugin.core.settings import Settings
from muon_plugin.planner.cost import index_of
from muon_plugin.planner.counts import META

FLOPS = Settings().newton_schulz.on(META).flops


@pytest.mark.parametrize(
    ("name", "received"),
    [
        ("Moonlight 16B, ZeRO-3, 1,024 ranks", 12 * 10**5),
        ("1T mixture, Megatron, 8,192 ranks: TP 8, PP 16, EP 16", 10**6),
    ],
)
def test_bytes_and_plans_of_a_start(name, received):
    """0.1.0 sent 442 MB to each of 1,024 ranks: names and pieces, pickled."""
    start, calls, plans = start_of(CASES[name])
    assert 0 < start.received <= received < LIMITS[1]
    assert start.collectives <= 31
    assert start.memory <= LIMITS[2] / 4
    planned = [make_plan(call.matrices, index_of(call), FLOPS) for call in calls if call.matrices]
    for call, own, plan in zip((call for call in calls if call.matrices), plans, planned, strict=True):
        assert own.describe(call.matrices) == plan.describe(call.matrices)
        assert (own.flops, own.bytes_sent) == (plan.flops, plan.bytes_sent)
