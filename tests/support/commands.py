"""A command of the plugin in a process that has imported Megatron or DeepSpeed already: a job for `ranks.forked`."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys


def command(rank: int, module: str, arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments` with these environment variables: its exit code and what it printed."""
    os.environ |= variables
    sys.argv = [module, *arguments]
    code: object = 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess(sys.argv, int(code or 0), out.getvalue(), err.getvalue())
