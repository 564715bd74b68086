"""Whether a standstill is a rank's fault, and the message that says whose. Pure: knows no clock, store or process.

All ranks begin a step together, since the engine reduces gradients first. So a rank that stands for long where others
have gone on is behind; but ranks that all stand at one place outside the optimizer may well evaluate or save.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .nodes import named

RUNNING, FINISHED = "running", "finished"
#: What ends a job: its process is not there; its node does not answer; it raised an error.
GONE, CUT_OFF, FAILED = "gone", "cut off", "failed"
#: Steps by which ranks can be apart: one, and one that a GPU has still to do.
APART = 2


@dataclass(frozen=True)
class Standing:
    """What is known of a rank.

    Attributes:
        step: optimizer steps that it began.
        phase: its name.
        outside: it is not in the optimizer's step.
        seconds: since it entered the phase.
        life: see above; "finished" after a clean end.
        silent: seconds without a sign of its Python; 0 while there are signs.
        error: of a rank that failed.
        order: of a rank that failed: how many failed before.
        at: where its main thread's Python is, once it stands for some time.
        waits: that is in a collective, as far as Python can tell.
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
    """The reason to end the job, if there is one.

    Args:
        me: a rank that has made no progress for some time.
        others: those about which something is known.
        world: number of ranks.
        patience: seconds without progress in which a rank may still come.
        longer: the same where no rank is behind and all are outside the optimizer.
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
    """Of ranks none of which moves and none is behind me: those for which the rest seems to wait."""
    everyone = (me, *others)
    if me.outside:
        busy = [r for r in everyone if not r.waits]
        return busy if len(busy) < len(everyone) else []
    ahead = any(r.position > me.position for r in others)
    return [r for r in everyone if r.position == me.position] if ahead else []


def cause_of(me: Standing, others: Sequence[Standing], world: int) -> Verdict | None:
    """Why this rank failed with an error, where that is another rank's doing ("connection closed")."""
    # The same error on all ranks is nobody's fault.
    earlier = [r for r in others if r.life != FAILED or (r.order < me.order and r.error != me.error)]
    left = [r for r in others if r.life == FINISHED and r.position <= me.position]
    causes = _ended(earlier) or left
    return _verdict(me, others, causes, world) if causes else None


def _ended(ranks: Sequence[Standing]) -> list[Standing]:
    """Those that are gone, and the first that failed: others fail because of it."""
    failed = sorted((r for r in ranks if r.life == FAILED), key=lambda r: r.order)
    return [r for r in ranks if r.life in (GONE, CUT_OFF)] + failed[:1]


def _behind(other: Standing, me: Standing) -> bool:
    if other.position >= me.position or (me.outside and other.life == FINISHED):
        return False  # who finished stays there, while others may have much to save
    # A rank whose steps are not counted (it holds no matrix) seems to stand where it began.
    return not me.outside or me.step - other.step <= APART


def _moves(rank: Standing, patience: float) -> bool:
    return rank.life == RUNNING and rank.seconds < patience


def _verdict(me: Standing, others: Sequence[Standing], blamed: Sequence[Standing], world: int) -> Verdict:
    head = [f"{named(ranks)} of {world} ({', '.join(nodes)}) {text}" for text, ranks, nodes in _alike(blamed, _fault)]
    rest = [r for r in (me, *others) if r not in blamed and r.life not in (FINISHED, FAILED)]
    waits = "stand{}" if not blamed else "wait{}"
    tail = [
        f"{named(ranks)} ({', '.join(nodes)}) {waits.format('s' * (len(ranks) == 1))} {text}"
        for text, ranks, nodes in _alike(rest, _where)
    ]
    if not blamed:
        network = ": the network may be down" * (not me.outside)
        head = [f"no rank is behind, but none makes progress{network}" if others else "nothing is known of other ranks"]
    return Verdict("; ".join([*head, *tail[:8]]), tuple(r.rank for r in blamed))


def _alike(ranks: Sequence[Standing], text: Callable[[Standing], str]) -> list[tuple[str, list[int], list[str]]]:
    """(Text, ranks, nodes) of ranks of which the same is to be said, but for the time: that of the longest."""
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
        return f"ended its training after step {r.step}"
    if r.life == FAILED:
        return f"failed first, {_place(r)}: {r.error}"
    if r.life == GONE:
        return f"died: there is no process any more; its last sign came {r.silent:.0f} s ago {_place(r)}"
    if r.life == CUT_OFF:
        return f"stopped answering {r.silent:.0f} s ago {_place(r)}, and its node does not answer: down or cut off"
    quiet = f" (its process lives, but gave no sign for {r.silent:.0f} s)" if r.silent else ""
    return f"held up the others {_where(r)}{quiet}"
