"""A part of benchmarks/gpu.py whose cases end in every way that a case can end. Imports no torch."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.parts.record import Case, Found, Progress, Setup


def _counted(setup: Setup, name: str) -> int:
    """How often this case has begun, this time among them."""
    file = Path(setup.out, f"begun {name}")
    count = int(file.read_text()) + 1 if file.exists() else 1
    file.write_text(str(count))
    return count


def cases(setup: Setup, opened: ExitStack) -> Iterator[Case]:
    def simple(name: str) -> Any:
        return lambda progress: {"begun": _counted(setup, name)}

    def hangs_once(progress: Progress) -> dict[str, Any]:
        if _counted(setup, "hangs") == 1:
            progress.write({"half": 1})
            time.sleep(600)
        return {"before": list(progress.before)}

    def fails_once(progress: Progress) -> dict[str, Any]:
        if _counted(setup, "fails") == 1:
            raise ValueError("not today")
        return {}

    def dies(progress: Progress) -> dict[str, Any]:
        _counted(setup, "dies")
        os.kill(os.getpid(), signal.SIGSEGV)
        return {}

    yield Case("first", simple("first"))
    yield Case("fails", fails_once)
    yield Case("in place of fails", simple("in place of fails"), unless="fails")
    yield Case("in place of first", simple("in place of first"), unless="first")
    yield Case("dies", dies)
    yield Case("hangs", hangs_once)
    yield Case("last", simple("last"))


def report(setup: Setup, found: dict[str, Found], on: dict[str, Any]) -> str:
    return "\n".join(f"{name} {one.state}" for name, one in found.items())
