"""What one step of Muon costs one rank: kernels, bytes, messages and memory, counted without a device.

    python benchmarks/counts.py --out benchmarks/results/counts.md

Of each call the rank is counted that holds parts of most matrices and, of those that hold as many, computes most.
AdamW's half is not counted: it is what it is without Muon. A GPU is meant on which our Triton kernels run; "without
Triton" are the same steps where they do not, by torch alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

from muon_plugin.core import elementwise, update
from muon_plugin.core.plan import make_plan
from muon_plugin.core.products import TORCH
from muon_plugin.core.routing import route
from muon_plugin.core.settings import Settings
from muon_plugin.planner import shapes
from muon_plugin.planner.calls import PlannedCall, Zero, zero_calls
from muon_plugin.planner.cost import index_of
from muon_plugin.planner.counts import META, Counts, busiest, count


@dataclass(frozen=True)
class Case:
    """A model at a number of ranks.

    Attributes:
        calls: of the optimizer's step: what is trained in it, in the format of the planner's --shapes; the ranks that
            share it; how fused projections are split, as the setting says it.
        stage: ZeRO's; None for Megatron's distributed optimizer, where every rank's part of a parameter is a tensor.
        ep: expert parallel size.
    """

    calls: Sequence[tuple[Mapping[str, Any], int, Mapping[str, Any]]]
    stage: int | None
    ep: int = 1

    def planned(self) -> list[PlannedCall]:
        found = []
        for of_call, ranks, split in self.calls:
            (parameters,) = shapes.stages(of_call, 1, 1, self.ep).values()
            routing = route({p.name: p.shape for p in parameters}, split=split)
            zero = Zero(1 if self.stage is None else self.stage)
            (call,) = zero_calls("matrices", parameters, routing.matrices, zero, ranks)
            found.append(replace(call, padded=None) if self.stage is None else call)
        return found


def _layers(count: int, first: int = 0, **of: list[int]) -> dict[str, Any]:
    return {f"layers.*.{name}.weight": {"shape": shape, "count": count, "first": first} for name, shape in of.items()}


H, LLAMA, MOONLIGHT = 1024, 4096, 2048
GPT_24 = _layers(24, q=[H, H], k=[H, H], v=[H, H], o=[H, H], up=[4 * H, H], down=[H, 4 * H])
LLAMA_8B = _layers(
    32,
    q=[LLAMA, LLAMA], k=[1024, LLAMA], v=[1024, LLAMA], o=[LLAMA, LLAMA],
    gate=[14336, LLAMA], up=[14336, LLAMA], down=[LLAMA, 14336],
)  # fmt: skip
#: Latent attention without a query latent; gate and up in one parameter, as in Megatron.
MOONLIGHT_DENSE = {
    "embed_tokens.weight": [163840, MOONLIGHT],
    **_layers(27, q=[3072, MOONLIGHT], kv_down=[576, MOONLIGHT], kv_up=[4096, 512], o=[MOONLIGHT, MOONLIGHT]),
    **_layers(1, gate_up_proj=[22528, MOONLIGHT], down=[MOONLIGHT, 11264]),
    **_layers(26, 1, router=[64, MOONLIGHT]),
    **_layers(26, 1, **{"shared.gate_up_proj": [5632, MOONLIGHT], "shared.down": [MOONLIGHT, 2816]}),
    "lm_head.weight": [163840, MOONLIGHT],
}
MOONLIGHT_EXPERTS = {
    f"layers.*.experts.*.{name}.weight": {"shape": shape, "count": [26, 64], "first": 1}
    for name, shape in {"gate_up_proj": [2816, MOONLIGHT], "down": [MOONLIGHT, 1408]}.items()
}
LATENT = {
    "*.q.*": {"sizes": [128, 64], "groups": 16},
    "*.kv_down.*": {"sizes": [512, 64]},
    "*.kv_up.*": {"sizes": [128, 128], "groups": 16},
}
CASES = {
    "GPT 24 x 1024, ZeRO-1, DP 8": Case([(GPT_24, 8, {})], 1),
    "Llama 8B, ZeRO-3, DP 64": Case([(LLAMA_8B, 64, {})], 3),
    "Moonlight 16B, Megatron, DP 64, EP 8": Case(
        [(MOONLIGHT_DENSE, 64, LATENT), (MOONLIGHT_EXPERTS, 8, {})], None, ep=8
    ),
}


def counted(case: Case, triton: bool = True) -> Counts:
    """Of all calls, one after the other; `triton`: whether our kernels run."""
    newton_schulz, found = Settings().newton_schulz.on(META), Counts()
    on = elementwise.by_table_on if triton else (lambda device: False)
    if not triton:
        newton_schulz = replace(newton_schulz, products=TORCH)
    for call in case.planned():
        plan = make_plan(call.matrices, index_of(call), newton_schulz.flops)
        with mock.patch.object(elementwise, "by_table_on", on), mock.patch.object(update, "by_table_on", on):
            found += count(call, plan, busiest(plan), newton_schulz)
    return found


def table(found: Mapping[str, Counts]) -> str:
    head = ("one rank of", "kernels", "views", "allocations", "elementwise traffic", "messages", "collective calls")
    head = (*head, "largest batch", "bytes sent", "extra memory")
    rows = [head, ("---", *["---:"] * (len(head) - 1))]
    for name, of in found.items():
        counts = f"{of.kernels:,}", f"{of.views:,}", f"{of.allocations:,}"
        traffic = f"{of.bytes_each:.1f} B an element, {of.elementwise / 1e9:.2f} GB"
        messages = str(of.messages), str(of.collectives), str(of.batch)
        rows.append((name, *counts, traffic, *messages, f"{of.sent / 1e6:.1f} MB", f"{of.peak / 2**20:.0f} MiB"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    found = {name: counted(case) for name, case in CASES.items()}
    text = table(found | {f"{name}, without Triton": counted(case, triton=False) for name, case in CASES.items()})
    print(text)
    if out:
        out.write_text(text)


if __name__ == "__main__":
    main()
