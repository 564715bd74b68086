"""Triton's interpreter: kernels run on the CPU, program by program, in a process that has started with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest

from tests.support import ROOT

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None and not os.environ.get("REQUIRE_RELEASES"),
    reason="Triton is not installed (torch for CUDA brings it, and pip install triton)",
)


def repair_bf16() -> None:
    """Lets the interpreter multiply bf16, whose bits it keeps in uint16, and round to it.

    Its `tl.dot` multiplies these bits as integers, and it cuts fp32 where a GPU rounds.
    """
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_dot

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    cast = InterpreterBuilder.cast_impl

    def rounded(self: Any, source: Any, kind: Any) -> Any:
        if (source.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, kind)
        values = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16).numpy()
        return TensorHandle(values.view(np.uint16), tl.bfloat16)

    InterpreterBuilder.cast_impl = rounded
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: original(self, wide(a), wide(b), *rest)


def interpreted(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a module's function returns there; arguments and result as JSON has them."""
    call = f"from {function.__module__} import {function.__name__} as f; import json, sys"
    code = f"{call}; print('result:', json.dumps(f(*json.loads(sys.argv[1]))))"
    ran = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.partition("result:")[2])
