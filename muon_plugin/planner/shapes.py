"""Parameters from names and shapes alone: a JSON file that says how often each occurs and how TP cuts it.

    {
      "embed_tokens.weight":              {"shape": [163840, 2048], "tp": 0},
      "layers.*.self_attn.q_proj.weight": {"shape": [3072, 2048], "count": 27, "tp": 0},
      "layers.*.mlp.experts.*.up_proj.weight": {"shape": [1408, 2048], "count": [26, 64], "first": 1},
      "layers.*.input_layernorm.weight":  {"shape": [2048], "count": 27},
      "lm_head.weight":                   [163840, 2048]
    }

A `*` stands for numbers from 0 (or "first") on, as many as "count" says; the first one counts layers, which pipeline
stages share in equal, contiguous parts. "tp" is the dimension that tensor parallelism cuts; without it, every TP rank
holds all. Names with a part "experts" are the routed experts that expert parallelism shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from ..core.layout import Partition
from ..megatron.routing import is_expert

KEYS = ("shape", "count", "tp", "first")


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    counts: tuple[int, ...]
    tp: int | None
    first: int
    numbers: tuple[int, ...] = ()  # in the place of the first `*`s


def stages(file: Mapping[str, Any], tp: int, pp: int, ep: int) -> dict[tuple[int, ...], tuple[Partition, ...]]:
    """The numbers of pipeline stages that are alike -> the parameters of one of them.

    Raises:
        ValueError: for an entry that is not as the module says, or that tp, pp or ep do not divide.
    """
    entries = [_entry(name, value) for name, value in file.items()]
    if not entries:
        raise ValueError('--shapes holds no parameter; allowed: name: [rows, cols] or name: {"shape": ...}')
    found = list(_expanded([_local(entry, ep) for entry in entries], 0))
    layers = sorted({entry.numbers[0] for entry in found if entry.numbers})
    if pp > 1 and (len(layers) < pp or not layers):
        raise ValueError(f"--pp {pp}: the names have {len(layers)} layers; allowed: at most as many stages")
    stage_of = {layer: position * pp // len(layers) for position, layer in enumerate(layers)}
    of_stages: list[list[_Entry]] = [[] for _ in range(pp)]
    last = 0
    for entry in found:  # what has no layer: the last stage, once a layer was seen; before, the first
        last = stage_of[entry.numbers[0]] if entry.numbers else (pp - 1 if last else 0)
        of_stages[last].append(entry)
    alike: dict[str, list[int]] = {}
    for number, mine in enumerate(of_stages):
        alike.setdefault(repr([(e.name.count("experts"), e.shape, e.tp) for e in mine]), []).append(number)
    return {tuple(numbers): tuple(_partitions(of_stages[numbers[0]], tp)) for numbers in alike.values()}


def _entry(name: str, value: Any) -> _Entry:
    if not isinstance(value, Mapping):
        value = {"shape": value}
    unknown = sorted(set(value) - set(KEYS))
    if unknown:
        raise ValueError(f"--shapes: {name} has {unknown[0]}={value[unknown[0]]!r}; allowed: {', '.join(KEYS)}")

    def whole(x: Any, least: int) -> bool:
        return isinstance(x, int) and not isinstance(x, bool) and x >= least

    shape, counts = value.get("shape"), value.get("count", [])
    counts = [counts] if isinstance(counts, int) else counts
    if not (isinstance(shape, list) and shape and all(whole(n, 1) for n in shape)):
        raise ValueError(f"--shapes: {name} has the shape {shape!r}; allowed: a list of whole numbers from 1 on")
    if not (isinstance(counts, list) and all(whole(n, 1) for n in counts) and len(counts) == name.count("*")):
        raise ValueError(
            f"--shapes: {name} has the count {value.get('count')!r} for its {name.count('*')} stars; allowed: a whole "
            "number from 1 on for each *"
        )
    tp, first = value.get("tp"), value.get("first", 0)
    if tp is not None and not (whole(tp, 0) and tp < len(shape)):
        raise ValueError(f"--shapes: {name} has tp={tp!r}; allowed: a dimension of its shape, 0 to {len(shape) - 1}")
    if not whole(first, 0):
        raise ValueError(f"--shapes: {name} has first={first!r}; allowed: a whole number from 0 on")
    return _Entry(name, tuple(shape), tuple(counts), tp, first)


def _local(entry: _Entry, ep: int) -> _Entry:
    """The experts of one EP rank."""
    if ep == 1 or not is_expert(entry.name):
        return entry
    stars = entry.name.split(".experts")[-1].count("*")
    experts = entry.counts[-1] if stars else entry.shape[0]
    if experts % ep or (not stars and len(entry.shape) < 3):
        raise ValueError(f"--ep {ep} does not divide the {experts} experts of {entry.name}; allowed: a divisor of it")
    if stars:
        return replace(entry, counts=(*entry.counts[:-1], experts // ep))
    return replace(entry, shape=(experts // ep, *entry.shape[1:]))


def _expanded(entries: Sequence[_Entry], depth: int) -> Iterator[_Entry]:
    """In the order of a model: entries that share what comes before a `*` take turns, number by number."""
    for _, group in groupby(entries, key=lambda e: e.name.split("*")[0] if "*" in e.name else e):
        mine = list(group)
        if "*" not in mine[0].name:
            yield from mine
            continue
        start = [e.first if depth == 0 else 0 for e in mine]
        for number in range(min(start), max(s + e.counts[depth] for s, e in zip(start, mine))):
            yield from _expanded(
                [
                    replace(e, name=e.name.replace("*", str(number), 1), numbers=(*e.numbers, number))
                    for s, e in zip(start, mine)
                    if s <= number < s + e.counts[depth]
                ],
                depth + 1,
            )


def _partitions(entries: Sequence[_Entry], tp: int) -> Iterator[Partition]:
    for entry in entries:
        shape, dim = entry.shape, entry.tp if tp > 1 else None
        if dim is not None and shape[dim] % tp:
            raise ValueError(
                f"--tp {tp} does not divide dimension {dim} of {entry.name} {list(shape)}; allowed: a divisor"
            )
        if dim is not None and dim < len(shape) - 2:
            raise ValueError(f"--shapes: {entry.name} has tp={dim}; allowed: one of its last two dimensions")
        yield Partition.of(entry.name, shape, dim, tp)
