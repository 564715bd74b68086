"""What a part has found so far: a file with a line for each event, written while it runs, from which it goes on.

Lines are JSON objects. A `run` line says on what the following ran; its results count for later runs on the same. Then,
for each case, `began`, any number of `partial` lines, and `passed`, `failed`, `died` (the process ended) or `late`
(stopped at the time limit); `again` before a case that has failed and is run again. A `left` line, at the end, lists
the cases for which there was no time. A line that was cut off by a kill is passed over.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: A case that ended so is not run again, unless it is asked for.
FINAL = ("passed", "failed", "died")


@dataclass(frozen=True)
class Case:
    """Something to check or to measure.

    Attributes:
        run: returns what was found, which JSON can hold; raises where a check fails. It is given a `Progress`.
        unless: another case, before this one; this one is needed only where that one has not passed.
    """

    name: str
    run: Callable[[Progress], dict[str, Any]]
    unless: str | None = None


@dataclass(frozen=True)
class Setup:
    """How a part runs.

    Attributes:
        device: "cuda" or "cpu".
        size: "full", or "tiny": the same code in seconds.
        out: the folder of the results.
    """

    device: str
    size: str
    out: Path

    @property
    def tiny(self) -> bool:
        return self.size == "tiny"


@dataclass
class Found:
    """What is known of a case: its last state ("began" while it runs), its result or error, its partial results."""

    state: str = ""
    value: dict[str, Any] = field(default_factory=dict)
    partial: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Progress:
    """Lets a case write down what it has found before it ends; `before` is what earlier runs of it have written."""

    write: Callable[[dict[str, Any]], None]
    before: Sequence[dict[str, Any]] = ()


class Record:
    """The file of a part.

    Args:
        file: .jsonl, made if it is not there.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def write(self, **line: Any) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        cut = self.file.exists() and not self.file.read_bytes().endswith(b"\n") and self.file.stat().st_size
        with self.file.open("a") as out:
            out.write(("\n" if cut else "") + json.dumps({**line, "at": round(time.time(), 1)}) + "\n")
            out.flush()
            os.fsync(out.fileno())  # a machine may be taken away at any time

    def lines(self) -> Iterator[dict[str, Any]]:
        for line in self.file.read_text().splitlines() if self.file.exists() else ():
            try:
                yield json.loads(line)
            except ValueError:  # cut off
                continue

    def last_run(self) -> dict[str, Any] | None:
        """On what the last run ran."""
        return next((line["run"] for line in reversed(list(self.lines())) if "run" in line), None)

    def found(self, on: dict[str, Any] | None = None) -> dict[str, Found]:
        """Case -> what the runs found that ran on the same as `on`, by default as the last one."""
        wanted, counts, cases = on or self.last_run(), False, dict[str, Found]()
        for line in self.lines():
            if "run" in line:
                counts = line["run"] == wanted
            if not counts or "case" not in line:
                continue
            one = cases.setdefault(line["case"], Found())
            if line["state"] == "partial":
                one.partial.append(line["value"])
            else:
                one.state, one.value = line["state"], line.get("value", {})
                one.seconds = line.get("seconds", 0.0)
        return cases

    def running(self) -> str | None:
        """The case that the last run began and did not end."""
        return next((name for name, one in self.found().items() if one.state == "began"), None)


def pending(cases: Sequence[Case], found: dict[str, Found]) -> list[Case]:
    """What is left to do, in order: those that were interrupted come last, so that none can hold up the others."""

    def state(name: str | None) -> str:
        return found[name].state if name in found else ""

    left = [case for case in cases if state(case.name) not in FINAL and state(case.unless) != "passed"]
    return [case for case in left if not state(case.name)] + [case for case in left if state(case.name)]
