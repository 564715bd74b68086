"""What was found, as text: nodes that are alike in one row, the slowest of each kind of communication, differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.report import si
from ..watchdog.nodes import named
from .links import KINDS


@dataclass
class Found:
    """Attributes, by rank: versions and GPU; GB/s. By node: bytes free. The groups; the planner's report."""

    facts: list[Any] = field(default_factory=list)
    speeds: list[Any] = field(default_factory=list)
    free: dict[str, int] = field(default_factory=dict)
    groups: dict[str, list[list[int]]] = field(default_factory=dict)
    plan: str = ""


def counted(number: int, what: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{number} {what}{'s' * (number != 1)}"


def who(ranks: Iterable[int], nodes: Sequence[str]) -> str:
    """``ranks 0-1 (node0)``."""
    ranks = list(ranks)
    names = sorted({nodes[rank] for rank in ranks}) if nodes else []
    return named(ranks) + (f" ({', '.join(names)})" if names else "")


def by_value(values: Mapping[int, str]) -> list[tuple[str, list[int]]]:
    """(Value, the ranks that have it)."""
    found: dict[str, list[int]] = {}
    for rank, value in values.items():
        found.setdefault(value, []).append(rank)
    return list(found.items())


def size(amount: float) -> str:
    return f"{si(amount)}B"


def differences(facts: Sequence[Any], nodes: Sequence[str]) -> list[str]:
    """A problem for everything that is not the same on all ranks that know it."""
    known = {rank: fact for rank, fact in enumerate(facts) if fact}
    problems = []
    keys = sorted({key for fact in known.values() for key in fact["versions"]})
    for key in keys:
        values = {rank: fact["versions"][key] for rank, fact in known.items() if key in fact["versions"]}
        if key == "muon_plugin":
            values = {rank: f"{value} in {known[rank]['folder']}" for rank, value in values.items()}
            differ = len({known[rank]["versions"][key] for rank in values}) > 1
        else:
            differ = len(set(values.values())) > 1
        if differ:
            problems.append(f"{key} differs: {_each(values, nodes)}. Install the same on every node")
    arguments = {rank: fact["arguments"] for rank, fact in known.items()}
    if len(set(arguments.values())) > 1:
        problems.append(f"the arguments differ: {_each(arguments, nodes)}. Start all ranks with the same")
    return problems + _gpus(known, nodes)


def _gpus(known: Mapping[int, Any], nodes: Sequence[str]) -> list[str]:
    problems = []
    for key, advice in (("name", "use nodes of one kind"), ("driver", "install the same on every node")):
        values = {rank: fact["gpu"].get(key, "none") for rank, fact in known.items()}
        if len(set(values.values())) > 1:
            problems.append(f"the GPUs' {key} differs: {_each(values, nodes)}: {advice}")
    taken: dict[tuple[str, str], int] = {}
    for rank, fact in known.items():
        gpu = fact["gpu"]
        if not gpu:
            continue
        other = taken.setdefault((nodes[rank], gpu["id"]), rank)
        if other != rank:
            problems.append(f"ranks {other} and {rank} ({nodes[rank]}) use the same GPU: give each rank one of its own")
        elif gpu["free"] < 0.9 * gpu["memory"]:
            problems.append(
                f"{who([rank], nodes)}: {size(gpu['memory'] - gpu['free'])} of its GPU's {size(gpu['memory'])} are in "
                "use: end what runs there"
            )
    return problems


def _each(values: Mapping[int, str], nodes: Sequence[str]) -> str:
    return "; ".join(f"{value or 'none'} on {who(ranks, nodes)}" for value, ranks in by_value(values))


def text(found: Found, nodes: Sequence[str]) -> str:
    parts = []
    if any(found.facts):
        parts.append(_rows(_of_nodes(found, nodes)))
    if any(found.speeds):
        parts.append(_rows(_of_groups(found, nodes)))
    return "\n\n".join([*parts, *([found.plan] if found.plan else [])])


def _of_nodes(found: Found, nodes: Sequence[str]) -> list[list[str]]:
    """Rows of nodes that are alike; columns that are empty everywhere are left out."""
    like: dict[tuple[str, ...], list[int]] = {}
    names = sorted({key for fact in found.facts if fact for key in fact["versions"]})
    of_node: dict[str, dict[str, str]] = {}
    for rank, fact in enumerate(found.facts):
        if fact:
            of_node.setdefault(nodes[rank], {}).update(fact["versions"])
    for rank, fact in enumerate(found.facts):
        gpu = fact["gpu"] if fact else {}
        gpus = f"{gpu['name']}, {size(gpu['memory'])}, driver {gpu['driver']}" if gpu else "none"
        # Source that differs within a node is a row of its own.
        versions = [(fact["versions"] if fact else {}).get(n, of_node.get(nodes[rank], {}).get(n, "?")) for n in names]
        like.setdefault((*versions, gpus), []).append(rank)
    rows = [["nodes", "ranks", *names, "GPU", *(["free for checkpoints"] if found.free else [])]]
    for values, ranks in like.items():
        here = list(dict.fromkeys(nodes[rank] for rank in ranks))
        free = [found.free[node] for node in here if node in found.free]
        shown = here if len(here) <= 4 else [here[0], here[1], "...", here[-1]]
        row = [f"{len(here)}: {', '.join(shown)}", named(ranks).partition(" ")[2], *values]
        rows.append([*row, *([size(min(free)) if free else "?"] if found.free else [])])
    return rows


def _of_groups(found: Found, nodes: Sequence[str]) -> list[list[str]]:
    rows = [["slowest, GB/s (its rank)", "groups", *(kind for kind in KINDS if kind != "all_gather_object")]]
    for label, groups in found.groups.items():
        row = [label, f"{len(groups)} x {len(groups[0])}"]
        for kind in rows[0][2:]:
            speeds = [(speed[label][kind], rank) for rank, speed in enumerate(found.speeds) if speed]
            row.append("{:.2f} ({})".format(*min(speeds)) if speeds else "?")
        rows.append(row)
    return rows


def _rows(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
