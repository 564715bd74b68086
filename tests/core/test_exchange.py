"""Messages between the ranks that share matrices, as one of them posts them, on meta tensors and without the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from muon_plugin.core.coefficients import coefficients_for
from muon_plugin.core.exchange import ended, in_turns
from muon_plugin.core.holders import Index
from muon_plugin.core.layout import Matrix, Shard, Strided
from muon_plugin.core.messages import Leg, Wire
from muon_plugin.core.orthogonalize import NewtonSchulz
from muon_plugin.core.plan import make_plan
from muon_plugin.core.update import Update
from muon_plugin.planner.counts import META, Counter, as_rank

pytestmark = pytest.mark.fast
NEWTON_SCHULZ = NewtonSchulz(coefficients_for(5, "simple"))
GROUP = {"lr": 0.5, "weight_decay": 0.5, "momentum": 0.5, "nesterov": True}


def update_of(rank: int, rows: int, holders: int) -> Update:
    """Of one matrix, of which each of the first ranks holds a row."""
    cols = 64
    matrix = Matrix("w", "w", rows, cols, Strided(0, rows * cols))
    each = rows // holders * cols
    lists = [[(0, (Strided(r * each, each),))] if r < holders else [] for r in range(torch_world())]
    shards = []
    if rank < holders:
        shards = [Shard.of_range("w", rank * each, each, torch.empty(each, device=META))]
    plan = make_plan([matrix], Index.of_lists(lists), NEWTON_SCHULZ.flops)
    return Update([matrix], shards, None, META, NEWTON_SCHULZ, lambda _: 0.5, False, plan)


def torch_world() -> int:
    return torch.distributed.get_world_size()


def turns(update: Update) -> Any:
    for p in update.tensors:
        p.grad = torch.empty_like(p)
    return update.turns([GROUP] * len(update.tensors), [torch.empty_like(p) for p in update.tensors])


def test_all_calls_post_their_messages_before_one_waits(monkeypatch):
    seen: list[str] = []
    post, arrived = Wire.post, Wire.arrived
    monkeypatch.setattr(Wire, "post", lambda self, *a, **kw: seen.append("post") or post(self, *a, **kw))
    monkeypatch.setattr(Wire, "arrived", lambda self, transfer: seen.append("wait") or arrived(self, transfer))
    with as_rank(1, 4):
        both = [update_of(1, rows, 2) for rows in (8, 16)]
        seen.clear()
        ended(in_turns(map(turns, both)))
    # gathers, then updates
    assert seen == ["post", "post", "wait", "post", "wait", "post", "wait", "wait"]


def test_at_most_256_messages_are_posted_together():
    with as_rank(0, 1000):
        update = update_of(0, 300, 300)
        owner = update.plan.routes[0].owner
    with as_rank(owner, 1000):
        update = update_of(owner, 300, 300)
        with Counter() as counter:
            ended(turns(update))
    found = counter.counts
    assert found.messages == 2 * 299
    assert found.batch == 128  # this rank only receives, then only sends; others do both


def test_pairs_are_connected_at_start(monkeypatch):
    """NCCL connects two ranks at their first message."""
    posted: list[Leg] = []
    post = Wire.post
    monkeypatch.setattr(Wire, "post", lambda self, leg, *a, **kw: posted.append(leg) or post(self, leg, *a, **kw))
    with as_rank(0, 16):
        update = update_of(0, 8, 4)
        at_start = list(posted)
        posted.clear()
        ended(turns(update))
    assert [(set(leg.sent.sizes), set(leg.received.sizes)) for leg in at_start] == [
        (set(leg.sent.sizes), set(leg.received.sizes)) for leg in posted
    ]
    assert {size for leg in at_start for side in (leg.sent, leg.received) for size in side.sizes.values()} == {1}
