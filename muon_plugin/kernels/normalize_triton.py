"""Triton kernels that normalize matrices for Newton-Schulz: X scale / max(||X||_F, eps), in fp16, in two launches.

The bits of a matrix depend on its shape alone, not on the batch: its squares are summed by so many programs as its size
says, each in one order, and the sums of these programs are added in one order.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Elements that are loaded at a time, and rows and columns of a tile that is written, perhaps transposed.
BLOCK, TILE = 1024, 64
#: Elements of a program that sums squares, as long as there are no more such programs of a matrix than this.
CHUNK, MOST = 8192, 1024
WARPS = 4


def normalized(x: Tensor, eps: float, scale: float) -> Tensor:
    """(batch, rows, cols) or (rows, cols), bf16, contiguous -> the same in fp16; (cols, rows) where rows are more."""
    rows, cols = x.shape[-2:]
    batch = x.numel() // (rows * cols)
    out = torch.empty(*x.shape[:-2], min(rows, cols), max(rows, cols), dtype=torch.float16, device=x.device)
    parts = min(triton.cdiv(rows * cols, CHUNK), MOST)
    sums = torch.empty(batch, parts, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(rows, TILE) * triton.cdiv(cols, TILE)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        options = {"num_warps": WARPS, "enable_fp_fusion": False}
        blocks = triton.cdiv(triton.cdiv(rows * cols, parts), BLOCK)
        squares_kernel[(batch * parts,)](x, sums, rows * cols, parts, blocks, BLOCK=BLOCK, **options)
        power = triton.next_power_of_2(parts)
        normalize_kernel[(batch * tiles,)](
            x, sums, out, rows, cols, parts, eps, scale, TALL=rows > cols, TILE=TILE, PARTS=power, **options
        )
    return out


@triton.jit
def squares_kernel(x, sums, numel, parts, blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of squares of one part of a matrix: of so many blocks."""
    program = tl.program_id(0)
    matrix = (program // parts).to(tl.int64)
    first = (program % parts).to(tl.int64) * blocks * BLOCK
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for block in range(blocks):
        at = first + block * BLOCK + tl.arange(0, BLOCK)
        each = tl.load(x + matrix * numel + at, mask=at < numel, other=0.0).to(tl.float32)
        total += each * each
    tl.store(sums + program, tl.sum(total))


@triton.jit
def normalize_kernel(  # type: ignore[no-untyped-def]
    x, sums, out, rows, cols, parts, eps, scale, TALL: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr
):
    """One tile of a matrix over its norm; TALL: written transposed."""
    across = tl.cdiv(cols, TILE)
    tiles = tl.cdiv(rows, TILE) * across
    program = tl.program_id(0)
    matrix = (program // tiles).to(tl.int64)
    tile = program % tiles
    part = tl.arange(0, PARTS)
    total = tl.sum(tl.load(sums + matrix * parts + part, mask=part < parts, other=0.0))
    norm = tl.maximum(tl.sqrt_rn(total), eps) / scale  # a power of two: exact
    row = (tile // across * TILE + tl.arange(0, TILE)).to(tl.int64)
    col = (tile % across * TILE + tl.arange(0, TILE)).to(tl.int64)
    there = (row[:, None] < rows) & (col[None, :] < cols)
    each = tl.load(x + matrix * rows * cols + row[:, None] * cols + col[None, :], mask=there, other=0.0)
    result = tl.div_rn(each.to(tl.float32), tl.zeros_like(each).to(tl.float32) + norm).to(tl.float16)
    if TALL:
        there = (col[:, None] < cols) & (row[None, :] < rows)
        tl.store(out + matrix * rows * cols + col[:, None] * rows + row[None, :], result.T, mask=there)
    else:
        tl.store(out + matrix * rows * cols + row[:, None] * cols + col[None, :], result, mask=there)
