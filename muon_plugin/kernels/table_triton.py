"""Triton kernels that go over a table of runs: momentum, Nesterov and pack; scale, decay and apply.

They do what `core/elementwise.py` does in plain torch, with its bits on CUDA: each line below rounds as torch's kernels
do there, which nvcc lets multiply and add in one rounding. A program takes BLOCK elements of one run.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4  # BLOCK is that of core/by_table.py
#: Of a run in its table: the number of its tensor, elements, elements in a row; start and stride, in the tensor and in
#: the flat buffer.
FIELDS = 7


def pack(table: Any, pointers: Tensor, numbers: Tensor, flat: Tensor, average: bool, nesterov: bool) -> None:
    """Directions of runs to `flat`, bf16; `average`: of momenta that are updated with the gradients before.

    Args:
        table: `blocks` and `runs`, on the device.
        pointers: (tensors, 2): addresses of gradient and momentum.
        numbers: (tensors, 2): the weights of the average and of Nesterov's.
        flat: the buffer.
        average, nesterov: for all tensors alike.
    """
    with torch.cuda.device(flat.device) if flat.is_cuda else nullcontext():
        pack_kernel[(len(table.blocks),)](
            table.blocks,
            table.runs,
            pointers,
            numbers,
            flat,
            AVERAGE=average,
            NESTEROV=nesterov,
            FIELDS=FIELDS,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def apply(table: Any, pointers: Tensor, numbers: Tensor, flat: Tensor) -> None:
    """Decays the weights of runs, and adds the updates in `flat`, bf16.

    Args:
        table: `blocks`, `runs` and `scales`, on the device.
        pointers: (tensors, 1): addresses of weights.
        numbers: (tensors, 2): the factor of the decay, and minus the rate.
        flat: the buffer.
    """
    with torch.cuda.device(flat.device) if flat.is_cuda else nullcontext():
        apply_kernel[(len(table.blocks),)](
            table.blocks,
            table.runs,
            table.scales,
            pointers,
            numbers,
            flat,
            FIELDS=FIELDS,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


@triton.jit
def lerp(a, b, weight):  # type: ignore[no-untyped-def]
    """torch's a + weight (b - a), from the nearer end, in which each multiplication and addition is one operation."""
    return tl.where(tl.abs(weight) < 0.5, tl.fma(weight, b - a, a), tl.fma(a - b, 1.0 - weight, b))


@triton.jit
def _places(blocks, runs, FIELDS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The run of this program and its tensor, where its elements lie in the tensor and in the buffer, and which are."""
    program = tl.program_id(0)
    run = tl.load(blocks + 2 * program).to(tl.int64)
    row = runs + run * FIELDS
    number = tl.load(blocks + 2 * program + 1) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(row + 2).to(tl.int32)
    which = number // length
    inside = number - which * length
    local = tl.load(row + 3) + which.to(tl.int64) * tl.load(row + 4) + inside
    at = tl.load(row + 5) + which.to(tl.int64) * tl.load(row + 6) + inside
    return run, tl.load(row), local, at, number < tl.load(row + 1)


@triton.jit
def pack_kernel(  # type: ignore[no-untyped-def]
    blocks,
    runs,
    pointers,
    numbers,
    flat,
    AVERAGE: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See `pack`."""
    _, tensor, local, at, there = _places(blocks, runs, FIELDS, BLOCK)
    gradients = tl.load(pointers + 2 * tensor).to(tl.pointer_type(tl.float32))
    momenta = tl.load(pointers + 2 * tensor + 1).to(tl.pointer_type(tl.float32))
    direction = tl.load(momenta + local, mask=there, other=0.0)
    if AVERAGE or NESTEROV:
        gradient = tl.load(gradients + local, mask=there, other=0.0)
    if AVERAGE:
        direction = lerp(direction, gradient, tl.load(numbers + 2 * tensor))
        tl.store(momenta + local, direction, mask=there)
    if NESTEROV:
        direction = lerp(gradient, direction, tl.load(numbers + 2 * tensor + 1))
    tl.store(flat + at, direction.to(tl.bfloat16), mask=there)


@triton.jit
def apply_kernel(  # type: ignore[no-untyped-def]
    blocks, runs, scales, pointers, numbers, flat, FIELDS: tl.constexpr, BLOCK: tl.constexpr
):
    """See `apply`."""
    run, tensor, local, at, there = _places(blocks, runs, FIELDS, BLOCK)
    weights = tl.load(pointers + tensor).to(tl.pointer_type(tl.float32))
    change = tl.load(flat + at, mask=there, other=0.0).to(tl.float32) * tl.load(scales + run)
    weight = tl.load(weights + local, mask=there, other=0.0) * tl.load(numbers + 2 * tensor)
    tl.store(weights + local, tl.fma(tl.load(numbers + 2 * tensor + 1), change, weight), mask=there)
