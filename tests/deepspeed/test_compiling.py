"""Before DeepSpeed compiles an operator, or waits for a lock, a line says so."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from tests.support import SUPPORT
from tests.support.jobs import TIMEOUT, Process, environment

#: A compiler that is busy until it is told to fail.
COMPILER = """#!/bin/bash
until [[ -e {told} ]]; do sleep 0.1; done
exit 1
"""


def comes(true: Callable[[], object]) -> None:
    until = time.monotonic() + TIMEOUT
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_compiling_waiting_and_a_stale_lock_are_told(tmp_path):
    """The first start compiles, the second waits for it; the first is killed, and the third waits for its lock."""
    folder = tmp_path / "extensions" / "fused_adam"
    lock = folder / "lock"
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(told=tmp_path / "fail"))
    compiler.chmod(0o755)
    variables = environment(TORCH_EXTENSIONS_DIR=str(folder.parent), CXX=str(compiler))

    def start(name: str, **more: str) -> tuple[Process, Path]:
        with open(tmp_path / name, "w") as log:
            return Process([str(SUPPORT / "compiles.py")], variables | more, log), tmp_path / name

    first, told = start("first")
    comes(lock.exists)
    assert (
        f"muon_plugin: DeepSpeed compiles fused_adam in {folder}, which takes a minute or two, once" in told.read_text()
    )
    second, told = start("second")
    comes(lambda: f"DeepSpeed waits until another process has compiled fused_adam in {folder}" in told.read_text())
    first.kill()
    first.wait(timeout=60)
    first.close()
    other, silent = start("other", LOCAL_RANK="1")
    third, told = start("third")
    comes(lambda: "DeepSpeed waits for the lock" in told.read_text())
    (age,) = re.findall(
        rf"lock {lock}, which is (\d+) s old, and which no process that is seen here holds. Delete it", told.read_text()
    )
    assert int(age) < TIMEOUT
    (tmp_path / "fail").touch()
    lock.unlink()
    for process in (second, third, other):  # which have nothing to load: the first has compiled nothing
        assert process.wait(timeout=TIMEOUT) == 1
        process.close()
    assert "muon_plugin: " not in silent.read_text()  # one line a node


def test_what_is_compiled_is_loaded_without_a_line(tmp_path, monkeypatch, capfd):
    from types import SimpleNamespace

    from muon_plugin.deepspeed.compiling import jit_load

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "an_operator").mkdir()
    (tmp_path / "an_operator" / "an_operator.so").touch()
    assert jit_load(lambda builder, verbose: verbose, SimpleNamespace(name="an_operator")) is True
    assert capfd.readouterr().err == ""
