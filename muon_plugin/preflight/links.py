"""One of each kind of communication that a step uses, over each group, checked number by number and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .rounds import Rounds

#: fp32 elements of each rank's part: large enough to time, small enough to take no time.
ELEMENTS = {"cpu": 2**18, "cuda": 2**24}
KINDS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "point to point", "all_gather_object")


def groups_of(world: int, tp: int, pp: int) -> dict[str, list[list[int]]]:
    """Label -> the groups of ranks, TP innermost and pipeline stages outermost, as Megatron and AutoTP have them."""
    stage = world // pp
    stages = [list(range(first, first + stage)) for first in range(0, world, stage)]
    found = {
        "TP": [ranks[i : i + tp] for ranks in stages for i in range(0, stage, tp)],
        "DP": [ranks[i::tp] for ranks in stages for i in range(tp)],
        "DP x TP": stages,
        "world": [list(range(world))],
    }
    unlike: dict[str, list[list[int]]] = {}
    for label, groups in found.items():
        if len(groups[0]) > 1 and groups not in unlike.values():
            unlike[label] = groups
    return unlike


def exercise_all(rounds: Rounds, groups: dict[str, list[list[int]]], device: torch.device, seconds: float) -> Any:
    """Runs every kind over every group that this rank is in.

    Returns:
        Label -> kind -> GB/s (1e9 bytes), as a rank of a ring would see it.

    Raises:
        RuntimeError: for wrong results, or an error of the backend, with kind and group.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    rounds.step = f"joining the process group ({backend})"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("links", rounds.store),
        rank=rounds.rank,
        world_size=rounds.world,
        timeout=timedelta(seconds=seconds),
    )
    found: dict[str, dict[str, float]] = {}
    wrong = []
    for label, all_ranks in groups.items():
        handles = [dist.new_group(ranks) for ranks in all_ranks]
        mine = next(i for i, ranks in enumerate(all_ranks) if rounds.rank in ranks)
        found[label] = {}
        for kind in KINDS:
            rounds.step = f"{kind} over the {label} group of ranks {all_ranks[mine]}"
            try:
                right, found[label][kind] = exercise(kind, handles[mine], all_ranks[mine], rounds.rank, device)
            except Exception as error:
                raise RuntimeError(f"{rounds.step}: {str(error).partition(chr(10))[0]}") from error
            if not right:  # and go on: the others would wait in the next
                wrong.append(rounds.step)
    if wrong:
        raise RuntimeError(f"wrong numbers came from {'; '.join(wrong)}: do not train on these nodes")
    return found


def exercise(kind: str, group: Any, ranks: Sequence[int], me: int, device: torch.device) -> tuple[bool, float]:
    """One kind over one group, twice: whether all numbers were right, and GB/s of the second."""
    run, share = _prepared(kind, group, ranks, me, device)
    right = all(torch.equal(got, wanted) if isinstance(got, Tensor) else got == wanted for got, wanted in run())
    _synchronize(device)
    began = time.perf_counter()
    run()
    _synchronize(device)
    return right, share * 4 * ELEMENTS[device.type] / (time.perf_counter() - began) / 1e9


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _prepared(
    kind: str, group: Any, ranks: Sequence[int], me: int, device: torch.device
) -> tuple[Callable[[], list[tuple[Any, Any]]], float]:
    """(Runs it and gives pairs of what came and what should have; parts of `ELEMENTS` that a ring moves a rank)."""
    size, place = len(ranks), list(ranks).index(me)
    elements = ELEMENTS[device.type]

    def part(rank: int, chunk: int = 0) -> Tensor:  # small whole numbers: sums are exact in any order
        return (torch.arange(elements, device=device) % 97 + 3 * chunk).float() * (rank + 1)

    def total(chunk: int = 0) -> Tensor:
        return part(0, chunk) * sum(rank + 1 for rank in ranks)

    mine, chunks = part(me), torch.cat([part(me, chunk) for chunk in range(size if kind == "reduce_scatter" else 1)])

    def all_reduce() -> list[tuple[Any, Any]]:
        x = mine.clone()
        dist.all_reduce(x, group=group)
        return [(x, total())]

    def reduce_scatter() -> list[tuple[Any, Any]]:
        out = torch.empty(elements, device=device)
        dist.reduce_scatter_tensor(out, chunks, group=group)
        return [(out, total(place))]

    def all_gather() -> list[tuple[Any, Any]]:
        out = torch.empty(size * elements, device=device)
        dist.all_gather_into_tensor(out, mine, group=group)
        return list(zip(out.chunk(size), map(part, ranks)))

    def broadcast() -> list[tuple[Any, Any]]:
        x = mine.clone()
        dist.broadcast(x, ranks[-1], group=group)
        return [(x, part(ranks[-1]))]

    def point_to_point() -> list[tuple[Any, Any]]:
        neighbours = sorted({ranks[place - 1], ranks[(place + 1) % size]})
        came = {rank: torch.empty(elements, device=device) for rank in neighbours}
        ops = [dist.P2POp(dist.irecv, buffer, rank, group) for rank, buffer in came.items()]
        ops += [dist.P2POp(dist.isend, mine, rank, group) for rank in neighbours]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        return [(buffer, part(rank)) for rank, buffer in came.items()]

    def all_gather_object() -> list[tuple[Any, Any]]:
        out: list[Any] = [None] * size
        dist.all_gather_object(out, {"rank": me, "text": "x" * me}, group=group)
        return list(zip(out, ({"rank": rank, "text": "x" * rank} for rank in ranks)))

    moved = (size - 1) / size
    known: dict[str, tuple[Callable[[], list[tuple[Any, Any]]], float]] = {
        "all_reduce": (all_reduce, 2 * moved),
        "reduce_scatter": (reduce_scatter, size * moved),
        "all_gather": (all_gather, size * moved),
        "broadcast": (broadcast, 1),
        "point to point": (point_to_point, min(2, size - 1)),
        "all_gather_object": (all_gather_object, 0),
    }
    return known[kind]
