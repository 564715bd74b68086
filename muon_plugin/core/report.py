"""The start-up table: what will happen, before the first step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .adamw import AdamWHalf
from .halves import Halves
from .heads import Heads
from .orthogonalize import NewtonSchulz
from .plan import Plan
from .routing import Routing, by_pattern
from .settings import Settings

#: What the table says where Muon has nothing to do.
NO_MATRIX = "no parameter is a matrix of a hidden layer: AdamW trains all of them"
#: What it says where the heads are frozen, or in other pipeline stages.
NO_HEAD = "per_head_muon changes nothing here: no matrix that is trained now holds heads"


def table(
    routing: Routing,
    options: str,
    newton_schulz: NewtonSchulz,
    halves: Sequence[Halves],
    plans: Iterable[tuple[str, Plan]],
) -> str:
    """Plain text, about as many lines as a layer has parameters.

    Args:
        routing: every parameter's way.
        options: one line about the settings.
        newton_schulz: as it runs on this device.
        halves: of every optimizer that is stepped: which AdamW is in use, and what this rank holds.
        plans: what one step computes and sends: a label, shown where there are several, and a plan.
    """
    numels = {name: math.prod(shape) for name, shape in routing.shapes.items()}
    muon_names = {matrix.parameter for matrix in routing.matrices}
    muon_elements = sum(numels[name] for name in muon_names)
    shapes = {name: "x".join(map(str, shape)) for name, shape in routing.shapes.items()}
    parts = dict.fromkeys(muon_names, 0)
    for matrix in routing.matrices:
        parts[matrix.parameter] += 1
    ways = {name: f"{shapes[name]}, {parts[name]} matrices" if parts[name] > 1 else shapes[name] for name in parts}
    inputs = {matrix.parameter: matrix.out_in[1] for matrix in routing.matrices}
    ways |= {
        name: f"{shapes[name]}, {_heads(routing.by_head[name], inputs[name], numels[name])}"
        for name in muon_names & routing.by_head.keys()
    }
    other = next((each.adamw for each in halves if each.adamw.optimizer is not None), AdamWHalf())
    rows = [
        f"Muon   {len(muon_names)} parameters, {len(routing.matrices)} matrices, {muon_elements:,} elements",
        *_names((name, ways[name]) for name in routing.shapes if name in muon_names),
        f"{other.name:5}  {len(routing.adamw)} parameters, {sum(numels[n] for n in routing.adamw):,} elements "
        f"({other.label})",
        *_names((name, f"{shapes[name]}, {why}") for name, why in routing.adamw.items()),
        *(f"note: {note}" for note in routing.notes),
        options,
        *([newton_schulz.describe((m.rows, m.cols) for m in routing.matrices)] if routing.matrices else []),
    ]
    by_label: dict[str, list[Plan]] = {}
    for label, plan in plans:
        by_label.setdefault(label, []).append(plan)
    for label, of_label in by_label.items():
        flops = [sum(of_rank) for of_rank in zip(*(plan.flops for plan in of_label))]
        sent = [sum(of_rank) for of_rank in zip(*(plan.bytes_sent for plan in of_label))]
        if sum(flops):
            prefix = f"{label}: " if len(by_label) > 1 else ""
            rows.append(
                f"{prefix}Newton-Schulz a step: {si(sum(flops))}FLOP over {len(flops)} rank{'s' * (len(flops) > 1)}, "
                f"the busiest {si(max(flops))}FLOP ({max(flops) * len(flops) / sum(flops):.2f} of the mean)"
            )
            rows.append(
                f"{prefix}exchange a step: {si(sum(sent))}B sent over all ranks, {si(max(sent))}B by the busiest"
            )
    held = [(*each.held(), each.muon.bytes_each, each.adamw.bytes_each) for each in halves]
    state = sum(muon * muon_bytes + rest * rest_bytes for muon, rest, muon_bytes, rest_bytes in held)
    alone = 8 * sum(muon + rest for muon, rest, *_ in held)
    rows.append(f"optimizer state on this rank: {si(state)}B (AdamW alone: {si(alone)}B)")
    width = max(len(row) for row in rows)
    return "\n".join(["muon_plugin ".ljust(width + 2, "-"), *("  " + row for row in rows), "-" * (width + 2)])


def _heads(heads: Heads, inputs: int, numel: int) -> str:
    """How many heads of what shape a parameter of so many elements holds."""
    entries = numel // (heads.outputs * inputs)
    return heads.describe(inputs) + (f" in each of {entries}" if entries > 1 else "")


def _names(named: Iterable[tuple[str, str]]) -> list[str]:
    """Names that differ in their numbers alone as one line."""
    return [f"    {name}  {way}" + (f"  ({count})" if count > 1 else "") for name, way, count in by_pattern(named)]


def options(settings: Settings, groups: Sequence[Mapping[str, Any]]) -> str:
    """One line: the settings, and each group's learning rate and decay."""
    each = "; ".join(f"{label(g, groups)} lr {g['lr']:g} decay {g['weight_decay']:g}" for g in groups)
    return f"{settings.describe()}; {each}"


def label(group: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> str:
    """A group's name; where others have the same, with its half (DeepSpeed's MoE wants one name for both) and place."""
    same = [(i, other) for i, other in enumerate(groups) if other["name"] == group["name"]]
    if len(same) == 1:
        return str(group["name"])
    half = "muon" if group["use_muon"] else "adamw"
    name = str(group["name"]) if str(group["name"]).endswith(half) else f"{group['name']}-{half}"
    alike = [(i, other) for i, other in same if other["use_muon"] == group["use_muon"]]
    return name if len(alike) == 1 else next(f"{name}[{i}]" for i, other in alike if other is group)


def si(amount: float) -> str:
    """Three digits and the prefix of the unit."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if amount >= size:
            return f"{amount / size:.2f} {unit}"
    return f"{amount:.0f} "


def about_matrices(routing: Routing, settings: Settings, one_of_many: bool) -> list[str]:
    """Notes on what Muon was expected to train, and is not there; `one_of_many`: other pipeline stages may have it."""
    if not routing.matrices:
        return [] if one_of_many else [NO_MATRIX]
    return [NO_HEAD] if settings.per_head_muon and not routing.by_head else []


def about_frozen(routing: Routing, waiting: Sequence[str], left_out: int, advice: str) -> list[str]:
    """Notes on frozen parameters: what becomes of them once they are unfrozen.

    Args:
        routing: of all parameters.
        waiting: the names of those that are trained then.
        left_out: the number of those that are not.
        advice: what to do about these.
    """
    found = []
    if waiting:
        rest = sum(name in routing.adamw for name in waiting)
        found.append(
            f"{len(waiting)} parameters ({sum(math.prod(routing.shapes[name]) for name in waiting):,} elements) are "
            f"frozen; once they are unfrozen, Muon trains {len(waiting) - rest} of them and AdamW {rest}"
        )
    if left_out:
        found.append(f"{left_out} parameters are frozen, and unfreezing them later is an error: {advice}")
    return found
