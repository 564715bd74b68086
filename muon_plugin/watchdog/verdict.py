"""Decides whether a job hangs, which ranks caused it, and what the message says. Reads no clock, store or process.

All ranks begin a step together, since the engine reduces gradients first. So a rank that stays in one phase for long
while others have moved on is behind. If all ranks are in the same phase outside the optimizer, they may be evaluating
or saving, and get a longer limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .nodes import named

RUNNING, FINISHED = "running", "finished"
#: States of a rank that end the job: its process is gone; its node does not respond; it raised an error.
GONE, CUT_OFF, FAILED = "gone", "cut off", "failed"
#: Optimizer steps by which healthy ranks can differ: one, plus one that is still queued on a GPU.
APART = 2


@dataclass(frozen=True)
class Standing:
    """What is known about a rank.

    Attributes:
        step: number of optimizer steps that it has begun.
        phase: name of the phase it is in; see `core.phases`.
        outside: it is not in the optimizer's step.
        seconds: time since it entered the phase.
        life: RUNNING, FINISHED (after a clean exit), GONE, CUT_OFF or FAILED.
        silent: seconds since its last heartbeat; 0 while heartbeats arrive on time.
        error: of a rank that failed.
        order: of a rank that failed: its place among the failures, 1 for the first.
        at: file, line and function that its main thread executes, once it has made no progress for some time.
        waits: the main thread is in a collective, as far as Python can tell.
    """

    rank: int
    node: str
    step: int
    phase: str
    outside: bool
    seconds: float
    life: str = RUNNING
    silent: float = 0.0
    error: str = ""
    order: int = 0
    at: str = ""
    waits: bool = False

    @property
    def position(self) -> tuple[int, bool]:
        return self.step, self.outside


@dataclass(frozen=True)
class Verdict:
    """Attributes: the message; the ranks that it blames."""

    text: str
    blamed: tuple[int, ...]


def judge(me: Standing, others: Sequence[Standing], world: int, patience: float, longer: float) -> Verdict | None:
    """The reason to terminate the job, or None.

    Args:
        me: a rank that has made no progress for some time.
        others: the other ranks that have published a heartbeat.
        world: number of ranks.
        patience: seconds without progress after which a rank counts as hung.
        longer: the same limit where no rank is behind and all are outside the optimizer.
    """
    if me.seconds < patience:
        return None
    if ended := _ended(others):
        return _verdict(me, others, ended, world)
    behind = [r for r in others if _behind(r, me)]
    if behind:
        if any(_moves(r, patience) for r in behind):
            return None
        last = min(r.position for r in behind)
        return _verdict(me, others, [r for r in behind if r.position == last], world)
    if me.outside and (me.seconds < longer or any(_moves(r, longer) or r.life == FINISHED for r in others)):
        return None
    if any(_moves(r, patience) for r in others):
        return None
    return _verdict(me, others, _last(me, others), world)


def _last(me: Standing, others: Sequence[Standing]) -> list[Standing]:
    """The ranks that the others seem to wait for, where no rank makes progress and none is behind `me`."""
    everyone = (me, *others)
    if me.outside:
        busy = [r for r in everyone if not r.waits]
        return busy if len(busy) < len(everyone) else []
    ahead = any(r.position > me.position for r in others)
    return [r for r in everyone if r.position == me.position] if ahead else []


def cause_of(me: Standing, others: Sequence[Standing], world: int) -> Verdict | None:
    """Why this rank failed, if another rank caused its error ("connection closed"); otherwise None."""
    # If all ranks raise the same error, none of them is the cause.
    earlier = [r for r in others if r.life != FAILED or (r.order < me.order and r.error != me.error)]
    left = [r for r in others if r.life == FINISHED and r.position <= me.position]
    causes = _ended(earlier) or left
    return _verdict(me, others, causes, world) if causes else None


def _ended(ranks: Sequence[Standing]) -> list[Standing]:
    """Ranks that died or are unreachable, and the first that failed: later failures follow from it."""
    failed = sorted((r for r in ranks if r.life == FAILED), key=lambda r: r.order)
    return [r for r in ranks if r.life in (GONE, CUT_OFF)] + failed[:1]


def _behind(other: Standing, me: Standing) -> bool:
    if other.position >= me.position or (me.outside and other.life == FINISHED):
        return False  # a finished rank keeps its position, while the others may still be saving
    # A rank whose steps are not counted (it holds no matrix) seems to stand where it began.
    return not me.outside or me.step - other.step <= APART


def _moves(rank: Standing, patience: float) -> bool:
    return rank.life == RUNNING and rank.seconds < patience


def _verdict(me: Standing, others: Sequence[Standing], blamed: Sequence[Standing], world: int) -> Verdict:
    head = [f"{named(ranks)} of {world} ({', '.join(nodes)}) {text}" for text, ranks, nodes in _alike(blamed, _fault)]
    rest = [r for r in (me, *others) if r not in blamed and r.life not in (FINISHED, FAILED)]
    waits = "hang{}" if not blamed else "wait{}"
    tail = [
        f"{named(ranks)} ({', '.join(nodes)}) {waits.format('s' * (len(ranks) == 1))} {text}"
        for text, ranks, nodes in _alike(rest, _where)
    ]
    if not blamed:
        network = ": the network may be down" * (not me.outside)
        head = [f"no rank is behind, but none makes progress{network}" if others else "no other rank has reported"]
    return Verdict("; ".join([*head, *tail[:8]]), tuple(r.rank for r in blamed))


def _alike(ranks: Sequence[Standing], text: Callable[[Standing], str]) -> list[tuple[str, list[int], list[str]]]:
    """(Text, ranks, nodes), one for all ranks whose text differs in its times alone; the longest time is shown."""
    found: dict[tuple[object, ...], list[Standing]] = {}
    for r in ranks:
        found.setdefault((r.position, r.phase, r.life, r.error, r.at), []).append(r)
    return [
        (text(max(same, key=lambda r: (r.silent, r.seconds))), [r.rank for r in same], _few({r.node for r in same}))
        for same in found.values()
    ]


def _few(nodes: set[str]) -> list[str]:
    names = sorted(nodes)
    return names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"]


def _place(r: Standing) -> str:
    return f'{"before" if r.outside else "in"} step {r.step + r.outside}, phase "{r.phase}"'


def _where(r: Standing) -> str:
    at = f", at {r.at}" if r.at else ""
    return f"{_place(r)}{at}, for {r.seconds:.0f} s"


def _fault(r: Standing) -> str:
    if r.life == FINISHED:
        return f"finished training after step {r.step}"
    if r.life == FAILED:
        return f"failed first, {_place(r)}: {r.error}"
    if r.life == GONE:
        return f"died: its process no longer exists; its last heartbeat came {r.silent:.0f} s ago {_place(r)}"
    if r.life == CUT_OFF:
        return f"stopped responding {r.silent:.0f} s ago {_place(r)}; its node does not respond: down or disconnected"
    quiet = f" (its process is alive, but sent no heartbeat for {r.silent:.0f} s)" if r.silent else ""
    return f"held up the others {_where(r)}{quiet}"
