"""Megatron's optimizers of dense layers and experts are stepped in turns, once each."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from muon_plugin.core.messages import Wire
from tests.support.megatron_model import Layout, build, optimizer_for, set_gradients


def test_the_messages_of_dense_layers_and_experts_are_in_flight_together(ranks):
    """TP 2 and EP 2: matrices of both kinds are cut."""
    for steps in ranks(4, "0.19.2").run(posted, Layout("moe", tp=2, ep=2)):
        for seen in steps:
            first_wait = next(i for i, (what, _) in enumerate(seen) if what == "wait")
            assert len({wire for _, wire in seen[:first_wait]}) == 2
        assert steps[0] == steps[1]  # and in every step the same: none was left out, none was made twice


def posted(rank: int, layout: Layout) -> list[list[tuple[str, int]]]:
    """In the order of two steps: what was posted or waited for, and by which exchange."""
    chunks = build(layout)
    optimizer = optimizer_for(chunks, layout)
    wires: dict[int, int] = {}
    seen: list[tuple[str, int]] = []
    post, arrived = Wire.post, Wire.arrived

    def noted(what: str, original: Any) -> Any:
        def call(self: Wire, *args: Any, **kwargs: Any) -> Any:
            seen.append((what, wires.setdefault(id(self), len(wires))))
            return original(self, *args, **kwargs)

        return call

    Wire.post, Wire.arrived = noted("post", post), noted("wait", arrived)  # type: ignore[method-assign]
    try:
        found = []
        for number in range(2):
            seen.clear()
            set_gradients(chunks, layout, number)
            optimizer.step()
            found.append(list(seen))
    finally:
        Wire.post, Wire.arrived = post, arrived  # type: ignore[method-assign]
    dist.barrier()
    return found
