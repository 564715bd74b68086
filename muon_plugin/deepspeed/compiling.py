"""What DeepSpeed says nothing about: it compiles an operator, or waits for the lock of another process that does.

torch keeps the lock open while it compiles, and waits for a lock of others without an end: one that a killed start has
left keeps all later ones.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils import cpp_extension


def jit_load(original: Callable[..., Any], builder: Any, verbose: bool = True) -> Any:
    """One line on each node, before an operator is compiled or waited for."""
    with suppress(AttributeError, OSError):  # torch's private names: what is only told must not stop a start
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _tell(builder.name)
    return original(builder, verbose)


def _tell(name: str) -> None:
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    lock = folder / "lock"
    try:
        age = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        if not (folder / f"{name}{cpp_extension.LIB_EXT}").exists():
            say(f"DeepSpeed compiles {name} in {folder}, which takes a minute or two, once")
        return
    if _is_open(lock):
        say(f"DeepSpeed waits until another process has compiled {name} in {folder}")
    else:
        say(
            f"DeepSpeed waits for the lock {lock}, which is {age:.0f} s old, and which no process that is seen here "
            "holds. Delete it, unless another node compiles there now: a start that was killed has left it"
        )


def _is_open(file: Path) -> bool:
    """Whether a process of this node has the file open, as far as this one may see."""
    wanted = str(file.resolve())
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's, or it has ended
            for descriptor in os.listdir(process / "fd"):
                with suppress(OSError):
                    if os.readlink(process / "fd" / descriptor) == wanted:
                        return True
    return False


def say(text: str) -> None:
    print(f"muon_plugin: {text}", file=sys.stderr, flush=True)
