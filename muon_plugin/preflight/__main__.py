"""Whether a job of many nodes can start: run on all its nodes, with its layout, before it.

    torchrun ... -m muon_plugin.preflight --checkpoints DIR --checkpoint-bytes 240G --tp 8 -- PLANNER'S ARGUMENTS
    srun python -m muon_plugin.preflight ...                                  (with MASTER_ADDR and MASTER_PORT)

Are all ranks there? The same versions and the same source of muon_plugin on every node? GPUs alike, and free? Is the
checkpoints' folder one that all nodes share, can write to, and large enough? Does every kind of communication that a
step uses give right results over every group? With arguments after ``--``, also the planner's report of this model.

Rank 0 prints a table and a line for each problem. A rank that does not answer in time is named, with its node. Exit
code 0 on every rank if all is well, else 1 on every rank.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import watchdog
from ..command_line import Parser, positive, positive_number, split_at_dashes
from ..watchdog.nodes import node_name
from . import disk, facts, links, table
from .rounds import GRACE, Rounds, Stop, rendezvous
from .table import counted


@dataclass(frozen=True)
class Place:
    """This process in the job, as the launcher's environment tells it.

    Attributes:
        rank, world: among all processes.
        host, port: where rank 0's store is.
    """

    rank: int
    world: int
    host: str
    port: int


def main() -> None:
    began = time.monotonic()
    warnings.simplefilter("ignore", FutureWarning)  # newer names of collectives that torch 2.6 does not have
    mine, planned = split_at_dashes(sys.argv[1:])
    try:
        own = _parser().parse_args(mine)
        place = _place(own)
    except ValueError as error:
        print(f"preflight: {error}", file=sys.stderr)  # once a rank: one line
        raise SystemExit(2) from None
    check = None
    try:
        check = Check(rendezvous(place.rank, place.world, place.host, place.port, own.rendezvous), own, planned)
        check.run()
        _leave(check.conclude(began))
    except Stop as stop:
        if str(stop):
            _say(f"problem: rank {place.rank} ({node_name()}) {stop}", sys.stderr)
            _leave(1)
        # A launcher ends all of a node's ranks with the first that fails: not before rank 0 has spoken.
        _leave(check.conclude(began) if check is not None else 1)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "python -m muon_plugin.preflight",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoints", type=Path, help="the folder for checkpoints, shared by all nodes")
    parser.add_argument("--checkpoint-bytes", type=_bytes, default=0, help="of one checkpoint, such as 240G")
    parser.add_argument("--tp", type=positive, default=1, help="tensor parallel size")
    parser.add_argument("--pp", type=positive, default=1, help="pipeline parallel size")
    parser.add_argument("--ranks-per-node", type=positive, help="where neither torchrun nor Slurm tells it")
    parser.add_argument(
        "--rendezvous", type=positive_number, default=60.0, help="seconds in which all ranks must come (60)"
    )
    parser.add_argument("--timeout", type=positive_number, default=60.0, help="seconds for each kind of check (60)")
    return parser


def _place(own: argparse.Namespace) -> Place:
    """This process's place, out of the environment.

    Raises:
        ValueError: for a variable that is not set as a launcher does, or a layout that does not fit the ranks.
    """
    rank, world = _number("RANK", "SLURM_PROCID"), _number("WORLD_SIZE", "SLURM_NTASKS")
    if world % (own.tp * own.pp):
        raise ValueError(f"--tp {own.tp} x --pp {own.pp} does not divide the {counted(world, 'rank')} of this job")
    return Place(rank, world, os.environ.get("MASTER_ADDR", "localhost"), _number("MASTER_PORT", default=29500))


def _bytes(text: str) -> int:
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "")
    try:
        return round(float(number) * units[unit])
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not valid; allowed: bytes, or with K, M, G, T, such as 240G"
        ) from None


def _number(*names: str, default: int | None = None) -> int:
    """The first of these environment variables that is set.

    Raises:
        ValueError: if that is no number, or none is set and there is no default.
    """
    text = next((os.environ[name] for name in names if os.environ.get(name)), None)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise ValueError(f"{' or '.join(names)} is {text!r}: run this under torchrun or srun, which set it to a number")
    return int(text)


def _say(text: str, file: Any = None) -> None:
    print(f"preflight: {text}", file=file or sys.stdout, flush=True)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread may hang in what was checked


class Check:
    """All rounds, in order; on rank 0 with what they found."""

    def __init__(self, rounds: Rounds, own: argparse.Namespace, planned: list[str]) -> None:
        self.rounds, self.own, self.planned = rounds, own, planned
        self.rank, self.world = rounds.rank, rounds.world
        self.nodes: list[str] = []  # by rank
        self.problems: list[str] = []
        self.found = table.Found()
        self.local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))

    def run(self) -> None:
        """Raises Stop where nothing more can be checked."""
        self._all_there()
        first = self.nodes.index(self.nodes[self.rank]) == self.rank  # of its node
        self._facts(first)
        if self.own.checkpoints is not None:
            self._disk(first)
        self._links()
        if self.planned:
            self._plan()

    def conclude(self, began: float) -> int:
        """The exit code, the same on all ranks; rank 0 prints what was found."""
        if self.rank:
            try:
                return int(self.rounds.told("conclusion", 2 * GRACE + self.own.timeout))
            except Stop as stop:
                _say(f"problem: rank {self.rank} ({node_name()}) {stop}", sys.stderr)
                return 1
        code = int(bool(self.problems))
        if self.nodes:
            print(table.text(self.found, self.nodes), flush=True)
        for problem in self.problems:
            _say(f"problem: {problem}")
        outcome = f"{counted(len(self.problems), 'problem')}: the job must not start" if code else "all is well"
        _say(f"{self._size()}, {time.monotonic() - began:.0f} s: {outcome}")
        self.rounds.tell("conclusion", code)
        time.sleep(1)  # the store may be this process's: the others must read it first
        return code

    def _ask(self, name: str, work: Any, seconds: float | None = None) -> list[Any]:
        """Values by rank on rank 0, None where there is a problem; the others get None. Stops if a rank is silent."""
        seconds = seconds or self.own.timeout
        answers = self.rounds.ask(name, work, seconds)
        if self.rank:
            if not self.rounds.told(name, seconds + 3 * GRACE):
                raise Stop
            return []
        silent = [rank for rank, answer in enumerate(answers) if not answer]
        late = {rank: answer["late"] for rank, answer in enumerate(answers) if "late" in answer}
        errors = {rank: answer["error"] for rank, answer in enumerate(answers) if "error" in answer}
        if silent:
            self.problems.append(
                f"{table.who(silent, self.nodes)} did not answer within {seconds:.0f} s ({name}): the process died or "
                "stands still; see that node"
            )
        self.problems += [f"{table.who(ranks, self.nodes)}: {text}" for text, ranks in table.by_value(errors)]
        for step, ranks in table.by_value(late):
            self.problems.append(f"{table.who(ranks, self.nodes)}: no end within {seconds:.0f} s: {step}")
        goes_on = not silent and not late
        self.rounds.tell(name, goes_on)
        if not goes_on:
            raise Stop
        return [answer.get("value") for answer in answers]

    def _all_there(self) -> None:
        seconds = self.own.rendezvous
        self.rounds.store.set(f"here/{self.rank}", json.dumps({"node": node_name()}))
        if self.rank:
            told = self.rounds.told("here", seconds + 2 * GRACE)
            if not told:
                raise Stop
            self.nodes = told
            return
        answers = self.rounds.collect("here", seconds)
        missing = [rank for rank, answer in enumerate(answers) if not answer]
        self.nodes = [answer.get("node", "") for answer in answers]
        if missing:
            self.problems.append(
                f"{self._expected(missing)} did not come within {seconds:.0f} s: see whether the launcher runs there, "
                "and what it says about the master's address"
            )
            self.nodes = [node or "missing" for node in self.nodes]
        self.rounds.tell("here", [] if missing else self.nodes)
        if missing:
            raise Stop
        everyone = f"all {self.world} ranks are" if self.world > 1 else "the only rank is"
        _say(f"{everyone} here, on {counted(len(set(self.nodes)), 'node')}", sys.stderr)

    def _size(self) -> str:
        return f"{counted(self.world, 'rank')}, {counted(len(set(self.nodes)), 'node')}"

    def _expected(self, missing: list[int]) -> str:
        """Ranks that did not come, with the node they would be on."""
        each = self.own.ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", 0))
        slurm = os.environ.get("SLURM_NTASKS_PER_NODE", "")
        each = each or (int(slurm) if slurm.isdigit() else 0)
        if not each:
            return table.who(missing, [])
        names = _slurm_nodes()
        there = {rank // each: node for rank, node in enumerate(self.nodes) if node}
        parts = []
        for index in sorted({rank // each for rank in missing}):
            name = there.get(index) or (names[index] if index < len(names) else "")
            of_node = [rank for rank in missing if rank // each == index]
            count = -(-self.world // each)
            parts.append(f"{table.who(of_node, [])} (node {index} of {count}{name and f', {name}'})")
        return ", ".join(parts)

    def _facts(self, first: bool) -> None:
        def work() -> dict[str, Any]:
            _, folder = facts.source()
            watchdog.limits(os.environ.get(watchdog.VARIABLE, ""))
            return {
                "versions": facts.versions(engines=first),
                "folder": folder,
                "gpu": facts.gpu(self.local_rank),
                "arguments": " ".join(sys.argv[1:]),
            }

        answers = self._ask("versions and GPUs", work)
        if self.rank == 0:
            self.found.facts = answers
            self.problems += table.differences(answers, self.nodes)

    def _disk(self, first: bool) -> None:
        folder = self.own.checkpoints
        name = f".muon_plugin_preflight_{uuid.uuid4().hex[:8]}"
        try:
            self._shared(folder, name, first)
        finally:
            if self.rank == 0:  # in a thread: a file system that stands still would keep this process for ever
                thread = threading.Thread(target=disk.remove, args=(folder, name), daemon=True)
                thread.start()
                thread.join(GRACE)

    def _shared(self, folder: Path, name: str, first: bool) -> None:
        seconds = self.own.timeout
        left = self._ask("the checkpoints' folder", lambda: self.rank > 0 or disk.leave(folder, name))
        if self.rank == 0:
            if left[0] == disk.MADE:
                _say(f"{folder.absolute()} was not there, and has been made")
            self.rounds.tell("file", name if left[0] else "")
        name = self.rounds.told("file", seconds)
        if not name:
            return
        answers = self._ask("the shared folder", lambda: disk.find(folder, name, seconds / 2) if first else None)
        if self.rank:
            return
        self.found.free = {self.nodes[r]: a["free"] for r, a in enumerate(answers) if a}
        for node, free in self.found.free.items():
            if free < self.own.checkpoint_bytes:
                self.problems.append(
                    f"{folder} has {table.size(free)} free on {node}, a checkpoint needs "
                    f"{table.size(self.own.checkpoint_bytes)}: make room, or give another --checkpoints"
                )

    def _links(self) -> None:
        device = torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        groups = links.groups_of(self.world, self.own.tp, self.own.pp)
        if not groups:
            return
        seconds = self.own.timeout
        answers = self._ask(
            "communication", lambda: links.exercise_all(self.rounds, groups, device, 0.8 * seconds), seconds
        )
        if self.rank == 0:
            self.found.speeds = answers
            self.found.groups = groups

    def _plan(self) -> None:
        def work() -> str | None:
            if self.rank:
                return None
            from .. import planner

            return planner.report(self._of_this_job(self.planned))

        plans = self._ask("the plan", work, max(120.0, self.own.timeout))
        if self.rank == 0:
            self.found.plan = plans[0] or ""

    def _of_this_job(self, planned: list[str]) -> list[str]:
        """The planner's arguments, with this job's nodes, GPUs and layout where they name none.

        The planner refuses another layout than the one whose groups were checked. Megatron's arguments have their own,
        which is not replaced: training would start with them.

        Raises:
            ValueError: where they name other nodes or GPUs.
            argparse.ArgumentError: for one without its number.
        """
        mine, megatron = split_at_dashes(planned)
        count = len(set(self.nodes))
        each = self.world // count
        layout = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        layout.add_argument("--nodes", default=str(count))
        layout.add_argument("--gpus-per-node", default=str(each))
        layout.add_argument("--tp")
        layout.add_argument("--pp")
        found, rest = layout.parse_known_args(mine)
        sizes = ["--nodes", found.nodes, "--gpus-per-node", found.gpus_per_node]
        if sizes[1::2] != [str(count), str(each)]:
            raise ValueError(
                f"the planner's {' '.join(sizes)}: this job has {counted(count, 'node')} of {counted(each, 'rank')}; "
                "allowed: these, or neither argument"
            )
        sizes += ["--checked", str(self.own.tp), str(self.own.pp)]
        of_megatron = megatron or any(word.partition("=")[0] == "--megatron" for word in rest)
        sizes += ["--strict"] if of_megatron and "--strict" not in rest else []
        for flag, given, checked in (("--tp", found.tp, self.own.tp), ("--pp", found.pp, self.own.pp)):
            if given is not None or not of_megatron:
                sizes += [flag, str(checked) if given is None else given]
        return [*sizes, *rest, *(["--", *megatron] if megatron else [])]


def _slurm_nodes() -> list[str]:
    """The job's nodes in order, by Slurm; empty without it."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return []
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []


if __name__ == "__main__":
    main()
