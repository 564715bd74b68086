"""What the watchdog reads and writes in this process: the main thread's stack, torch's flight recorder, messages."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
import traceback
from types import FrameType
from typing import Any

import torch


def say(text: str) -> None:
    with contextlib.suppress(Exception):  # whatever happened to stderr, the process must end
        print(f"muon_plugin watchdog: {text}", file=sys.stderr, flush=True)


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)


def main_thread() -> tuple[str, bool]:
    """Where the main thread is, and whether that is in a collective. (Waiting for a GPU does not show.)"""
    stack = traceback.extract_stack(_main_frame())
    if not stack:
        return "", False
    last = stack[-1]
    waits = last.name == "wait" or any(frame.filename.endswith("distributed_c10d.py") for frame in stack)
    return f"{os.path.basename(last.filename)}:{last.lineno} in {last.name}", waits


def main_stack() -> str:
    """The stack trace of the main thread."""
    return "".join(traceback.format_stack(_main_frame())).rstrip()


def dump_flight_recorder(rank: int) -> None:
    """Writes torch's flight recorder where torch itself would, for ``torchfrtrace``."""
    native: Any = torch._C._distributed_c10d
    variables = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    prefix = next(
        filter(None, map(os.environ.get, variables)), f"{tempfile.gettempdir()}/nccl_trace_{os.getpid()}_rank_"
    )
    with contextlib.suppress(Exception):
        dump = getattr(native, "_dump_nccl_trace", None) or native._dump_fr_trace
        trace = dump()
        with open(f"{prefix}{rank}", "wb") as file:
            file.write(trace)
        say(f"torch's flight recorder of rank {rank} is in {prefix}{rank}")
