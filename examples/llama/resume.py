"""A run that a signal stops and that goes on by itself: which checkpoint is complete, and whether to stop.

DeepSpeed's rank 0 writes its file `latest` when its own part is saved, before it waits for the others: after a kill it
may name a checkpoint that lacks files. So a checkpoint counts once it holds the file `complete`, which rank 0 makes
when saving has returned on every rank. To go back further, delete the newest folders.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

COMPLETE = "complete"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a run that saves and resumes."""
    parser.add_argument("--save-every", type=int, default=0, help="steps between checkpoints; 0: only at the end")
    parser.add_argument("--keep", type=int, default=2, help="complete checkpoints that stay (default: %(default)s)")
    parser.add_argument(
        "--resume",
        nargs="?",
        choices=["auto", "must"],
        const="must",
        help="continue from the newest complete checkpoint in --out; auto: start anew where there is none",
    )


class StopSignal:
    """SIGUSR1 asks the run to save and stop; SIGTERM ends it at once, since launchers send it after a crash."""

    def __init__(self) -> None:
        self.received = False
        signal.signal(signal.SIGUSR1, self._receive)

    def _receive(self, *_: object) -> None:
        self.received = True

    def on_any_rank(self, device: str | torch.device) -> bool:
        """The same answer on every rank, so that all stop after the same step."""
        asked = torch.tensor([self.received], dtype=torch.int32, device=device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked.item())


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first; their names end in the step."""
    return sorted((file.parent for file in folder.glob(f"*/{COMPLETE}")), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("global_step"))


def newest(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint that every rank loads, None for a new run; rank 0 looks, since shared folders show with delay.

    Raises:
        ValueError: on every rank, if `resume` is "must" and none is complete.
    """
    found = [checkpoints(folder)[-1:] if resume else []]
    dist.broadcast_object_list(found)
    if resume == "must" and not found[0]:
        raise ValueError(f"--resume: no complete checkpoint in {folder}. --resume auto starts anew then.")
    if dist.get_rank() == 0 and resume:
        print(f"goes on from {found[0][0]}" if found[0] else f"starts anew: no complete checkpoint in {folder}")
    return found[0][0] if found[0] else None


def emptied(checkpoint: Path) -> Path:
    """The folder of a checkpoint to be saved, without what a killed run left there."""
    if dist.get_rank() == 0:
        shutil.rmtree(checkpoint, ignore_errors=True)
        checkpoint.mkdir(parents=True)
    dist.barrier()
    return checkpoint


def completed(checkpoint: Path, keep: int) -> None:
    """Marks a checkpoint that every rank has saved as complete, and removes all but the newest `keep`."""
    dist.barrier()
    if dist.get_rank() == 0:
        (checkpoint / COMPLETE).touch()  # there or not: there is nothing in between
        for old in checkpoints(checkpoint.parent)[: -max(1, keep)]:
            (old / COMPLETE).unlink()  # first: half removed is not complete
            shutil.rmtree(old)


def open_metrics(file: Path, start: int) -> tuple[TextIO, float]:
    """A file with a JSON line for each step up to `start` of those that were there, and the seconds they took."""
    there = file.read_text().splitlines() if start and file.exists() else []
    kept = [line for line in there if json.loads(line)["step"] <= start]
    opened = file.open("w")
    opened.writelines(line + "\n" for line in kept)
    return opened, json.loads(kept[-1])["seconds"] if kept else 0.0
