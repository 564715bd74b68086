"""The checkpoints' folder: seen by every node, writable, large enough."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

#: Seconds in which a file that rank 0 wrote must be seen elsewhere: network file systems cache folders.
SEEN_WITHIN = 10.0
THERE, MADE = "there", "made"


def leave(folder: Path, name: str) -> str:
    """Rank 0 makes the folder, if need be, and leaves a file in it; `THERE` or `MADE`."""
    was = THERE if folder.is_dir() else MADE
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "w") as file:
        file.write(name)
        file.flush()
        os.fsync(file.fileno())
    return was


def remove(folder: Path, name: str) -> None:
    """Removes what `leave` and `find` have written: a rank that is stopped or killed meanwhile does not."""
    for file in folder.glob(f"{name}*"):
        file.unlink(missing_ok=True)


def find(folder: Path, name: str, seconds: float) -> dict[str, int]:
    """Another node finds that file, and writes one of its own; bytes that are free there.

    Raises:
        RuntimeError, OSError: with what is wrong.
    """
    until = time.monotonic() + min(seconds, SEEN_WITHIN)
    where = folder.absolute()
    while not (folder / name).exists():
        if time.monotonic() > until:
            what = "is not there" if not folder.is_dir() else "does not have the file that rank 0 wrote into it"
            raise RuntimeError(f"{where} {what}: mount the shared file system, or give a folder that all nodes share")
        time.sleep(0.1)
    if (text := (folder / name).read_text()) != name:
        raise RuntimeError(f"{where}/{name} holds {text[:50]!r}, not what rank 0 wrote: is it the same file system?")
    own = folder / f"{name}.{os.getpid()}"
    try:
        own.write_text(name)
    except OSError as error:
        raise RuntimeError(f"{where} cannot be written to: {error}") from error
    finally:
        own.unlink(missing_ok=True)
    return {"free": shutil.disk_usage(folder).free}
