"""What starting the optimizer costs one rank of thousands: seconds, bytes and memory. No other rank runs.

    python benchmarks/startup.py --out benchmarks/results/startup.md

Each case runs in a process of its own, on one core. The engine's own start, which shards the model, is not in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from muon_plugin.core.plan import Plan
from muon_plugin.core.routing import Routing, route
from muon_plugin.core.settings import Settings
from muon_plugin.megatron.routing import is_expert
from muon_plugin.planner import shapes
from muon_plugin.planner.calls import PlannedCall, Zero, zero_calls
from muon_plugin.planner.startup import Start, under_megatron, under_zero

#: Seconds, bytes received and bytes of memory that a start may cost a rank.
LIMITS = (10.0, 100 * 10**6, 2**30)


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts with latent attention: Moonlight, DeepSeek-V3, Kimi K2.

    Attributes:
        layers, dense: layers, of which so many first ones have no experts.
        hidden, inner, inner_expert: sizes of the model, of those layers' MLP and of an expert.
        experts, shared: experts of a layer; shared ones, which are one MLP.
        heads: each with 128 + 64 numbers for queries and keys and 128 for values.
        latent: the queries' latent, if there is one.
    """

    layers: int
    dense: int
    hidden: int
    inner: int
    inner_expert: int
    experts: int
    shared: int
    heads: int
    latent: int | None

    def parameters(self) -> dict[str, Any]:
        """As the planner's --shapes takes them, with the names of transformers."""
        hidden, values = self.hidden, 128 * self.heads
        attention = {"kv_a_proj_with_mqa": (576, None), "kv_b_proj": (2 * values, 0), "o_proj": (hidden, 1)}
        inputs = {"kv_b_proj": 512, "o_proj": values}
        if self.latent is None:
            attention |= {"q_proj": (192 * self.heads, 0)}
        else:
            attention |= {"q_a_proj": (self.latent, None), "q_b_proj": (192 * self.heads, 0)}
            inputs["q_b_proj"] = self.latent
        found: dict[str, Any] = {"embed_tokens.weight": {"shape": [163840, hidden], "tp": 0}}
        for name, (outputs, tp) in attention.items():
            found |= self._in_layers(f"self_attn.{name}", [outputs, inputs.get(name, hidden)], tp)
        found |= self._mlp("mlp", self.inner, 0, self.dense)
        found |= self._in_layers("mlp.gate", [self.experts, hidden], None, self.dense)
        found |= self._mlp("mlp.shared_experts", self.shared * self.inner_expert, self.dense)
        for name, entry in self._mlp("mlp.experts.*", self.inner_expert, self.dense).items():
            found[name] = {**entry, "count": [*entry["count"], self.experts], "tp": None}
        for name, size in (("input_layernorm", hidden), ("post_attention_layernorm", hidden), ("kv_a_norm", 512)):
            found |= self._in_layers(name, [size])
        return found | {"norm.weight": [hidden], "lm_head.weight": {"shape": [163840, hidden], "tp": 0}}

    def _mlp(self, name: str, inner: int, first: int, end: int | None = None) -> dict[str, Any]:
        up = {f"{name}.{part}": ([inner, self.hidden], 0) for part in ("gate_proj", "up_proj")}
        down = {f"{name}.down_proj": ([self.hidden, inner], 1)}
        parts = (up | down).items()
        return {k: v for part, of in parts for k, v in self._in_layers(part, *of, first, end).items()}

    def _in_layers(
        self, name: str, shape: list[int], tp: int | None = None, first: int = 0, end: int | None = None
    ) -> dict[str, Any]:
        count = (self.layers if end is None else end) - first
        return {f"layers.*.{name}.weight": {"shape": shape, "count": [count], "first": first, "tp": tp}}


MOONLIGHT = Mixture(27, 1, 2048, 11264, 1408, 64, 2, 16, None)
#: Kimi K2's sizes.
TRILLION = Mixture(61, 1, 7168, 18432, 2048, 384, 1, 64, 1536)


@dataclass(frozen=True)
class Case:
    """A model at a number of ranks: under ZeRO-3, or under Megatron with these parallel sizes."""

    model: Mixture
    ranks: int
    zero_3: bool
    tp: int = 1
    pp: int = 1
    ep: int = 1

    def zero_calls(self, parameters: Sequence[Any], routing: Routing) -> list[PlannedCall]:
        muon = {matrix.parameter for matrix in routing.matrices}
        halves = [[p for p in parameters if (p.name in muon) is matrices] for matrices in (True, False)]
        found = zero_calls("matrices", halves[0], routing.matrices, Zero(3), self.ranks)
        return [*found, *zero_calls("the rest", halves[1], (), Zero(3), self.ranks)]

    def megatron_calls(self, parameters: Sequence[Any], routing: Routing) -> list[PlannedCall]:
        """One for the dense layers and one for the experts, which Megatron shards over other ranks."""
        dp, found = self.ranks // self.tp // self.pp, []
        for experts in (False, True):
            mine = [p for p in parameters if (is_expert(p.name) and self.ep > 1) is experts]
            names = {p.name for p in mine}
            matrices = [matrix for matrix in routing.matrices if matrix.parameter in names]
            ranks, tp = (dp * self.tp // self.ep, 1) if experts else (dp, self.tp)
            (call,) = zero_calls("experts" if experts else "dense", mine, matrices, Zero(1), ranks, tp, self.ep)
            found.append(replace(call, padded=None))  # Megatron makes a tensor of every part
        return found


CASES = {
    "Moonlight 16B, ZeRO-3, 1,024 ranks": Case(MOONLIGHT, 1024, True),
    "1T mixture, ZeRO-3, 1,024 ranks": Case(TRILLION, 1024, True),
    "Moonlight 16B, Megatron, 8,192 ranks: EP 8": Case(MOONLIGHT, 8192, False, ep=8),
    "1T mixture, Megatron, 8,192 ranks: TP 8, PP 16, EP 16": Case(TRILLION, 8192, False, tp=8, pp=16, ep=16),
}


def start_of(case: Case) -> tuple[Start, list[PlannedCall], list[Plan]]:
    """Of a rank in the middle of the largest pipeline stage: what it costs, its calls, the plans of their matrices."""
    of_stages = shapes.stages(case.model.parameters(), case.tp, case.pp, case.ep).values()
    parameters = max(of_stages, key=len)
    begin = time.process_time()
    routing = route({p.name: p.shape for p in parameters})
    seconds = time.process_time() - begin
    rank = case.ranks // case.pp // 2 + 1
    if case.zero_3:
        calls = case.zero_calls(parameters, routing)
        start, muon = under_zero(calls, routing, rank)
        return start, calls, muon.plans
    calls = case.megatron_calls(parameters, routing)
    start, updates = under_megatron(calls, routing, rank, case.ranks, Settings().newton_schulz)
    start = replace(start, seconds=start.seconds + seconds, routing=seconds)
    return start, calls, [update.plan for update in updates]


def table(found: Mapping[str, Start]) -> str:
    head = ("one rank of", "seconds", "of these, routing", "bytes received", "the largest collective", "collectives")
    rows = [(*head, "memory"), ("---", *["---:"] * len(head))]
    for name, of in found.items():
        costs = f"{of.seconds:.1f}", f"{of.routing:.1f}", f"{of.received / 1e6:.1f} MB", f"{of.largest / 1e6:.1f} MB"
        rows.append((name, *costs, str(of.collectives), f"{of.memory / 2**20:.0f} MiB"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", choices=CASES, help="this one alone, in this process, as JSON")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(asdict(start_of(CASES[args.case])[0])))
        return
    found = {}
    for name in CASES:
        ran = subprocess.run([sys.executable, __file__, "--case", name], stdout=subprocess.PIPE, text=True, check=True)
        found[name] = Start(**json.loads(ran.stdout))
    text = table(found)
    if args.out:
        args.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
