"""A Triton kernel for products that are symmetric: half of the tiles are computed, and each is stored twice.

Newton-Schulz multiplies X by its transpose and polynomials of X X^T with each other. These commute, so all of its
products but the one with X itself are symmetric.

The bits of a matrix depend on its shape and on the kind of GPU alone. The sizes of the tiles are fixed: nothing is
tuned by timing, which may choose otherwise on another rank. A program computes one tile of one matrix, in one order,
whatever else is in the batch. Each sum is in fp32 and is rounded once.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .normalize_triton import normalized as normalized


@dataclass(frozen=True)
class Tiling:
    """How a product is cut.

    Attributes:
        tile: rows and columns of a tile of the result.
        depth: elements along the inner dimension that a program has in shared memory at a time.
        warps: of a program, 32 threads each.
        stages: how many of these slices are loaded ahead.
        programs: how many a processor must have room for.
    """

    tile: int
    depth: int
    warps: int
    stages: int
    programs: int = 1

    @property
    def shared(self) -> int:
        """Bytes of a program's shared memory that the slices of both operands take."""
        return 2 * 2 * self.tile * self.depth * self.stages


#: The first that fits is taken: on H100 and B200 the first, of which one program loads while another one computes; on
#: A100 and on cards for desktops the second.
TILINGS = (Tiling(128, 64, 8, 3, programs=2), Tiling(128, 32, 4, 4), Tiling(64, 32, 4, 3))
#: Bytes of shared memory that the compiler and the driver may want for other things.
RESERVED = 1024
#: Compute capability from which on Triton uses tensor cores.
OLDEST = 80


def tiling_for(shared: int) -> Tiling:
    """The tiles for a GPU with so many bytes of shared memory for a program.

    Raises:
        ValueError: if there are too few.
    """
    for each in TILINGS:
        if each.programs * (each.shared + RESERVED) <= shared:
            return each
    least = TILINGS[-1].shared + RESERVED
    raise ValueError(f"a GPU with {shared} bytes of shared memory for a program; allowed: {least} or more")


@functools.cache
def tiling_of(device: torch.device) -> Tiling:
    """The tiles for this GPU."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack this property
    return tiling_for(properties.shared_memory_per_block_optin)


def gram(x: Tensor) -> Tensor:
    """X X^T: (batch, m, k) or (m, k), fp16 or bf16, contiguous."""
    return product(x, x)


def symmetric(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """beta C + alpha A B of symmetric matrices that commute: (batch, m, m) or (m, m), fp16 or bf16, contiguous."""
    return product(a, b, c, beta, alpha)


def product(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
    tiling: Tiling | None = None,
) -> Tensor:
    """beta C + alpha A B^T, which the caller knows to be symmetric.

    Args:
        a, b: (batch, m, k) or (m, k), fp16 or bf16, contiguous. Of a symmetric matrix B^T is B.
        c: (batch, m, m) or (m, m), symmetric, contiguous.
        tiling: those of the tensors' device, unless given.

    Returns:
        (batch, m, m) or (m, m): the lower triangle of tiles, and its mirror image above.
    """
    tiling = tiling or tiling_of(a.device)
    m, k = a.shape[-2:]
    out = torch.empty(*a.shape[:-1], m, dtype=a.dtype, device=a.device)
    matrices = a.numel() // max(m * k, 1)
    tiles = triton.cdiv(m, tiling.tile)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(a.device) if a.is_cuda else nullcontext():
        symmetric_kernel[(matrices * tiles * (tiles + 1) // 2,)](
            a,
            b,
            out if c is None else c,
            out,
            m,
            k,
            alpha,
            beta,
            TILE=tiling.tile,
            DEPTH=tiling.depth,
            WHOLE=k % tiling.depth == 0,
            ADD=c is not None,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            enable_fp_fusion=False,  # its default changes with Triton's releases, and with it the last bits
        )
    return out


@triton.jit
def symmetric_kernel(  # type: ignore[no-untyped-def]
    a,
    b,
    c,
    out,
    m,
    k,
    alpha,
    beta,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    ADD: tl.constexpr,
):
    """One tile of one matrix of the batch, and its mirror image.

    WHOLE: k is a multiple of DEPTH. ADD: there is a C.
    """
    tiles = tl.cdiv(m, TILE)
    lower = tiles * (tiles + 1) // 2
    program = tl.program_id(0)
    matrix = (program // lower).to(tl.int64)
    number = program % lower
    # Tile (i, j) with j <= i has the number i (i + 1) / 2 + j. The root is rounded, so i may be one off.
    i = ((tl.sqrt(8.0 * number + 1.0) - 1.0) / 2.0).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > number, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= number, i + 1, i)
    j = number - i * (i + 1) // 2

    rows = (i * TILE + tl.arange(0, TILE)).to(tl.int64)
    cols = (j * TILE + tl.arange(0, TILE)).to(tl.int64)
    depth = tl.arange(0, DEPTH)
    # Rows beyond the last are loaded from the first, and never stored: no mask, so that loads stay wide.
    a_at = a + matrix * m * k + tl.where(rows < m, rows, 0)[:, None] * k + depth[None, :]
    b_at = b + matrix * m * k + tl.where(cols < m, cols, 0)[:, None] * k + depth[None, :]
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for first in range(0, k, DEPTH):
        if WHOLE:
            x = tl.load(a_at)
            y = tl.load(b_at)
        else:
            x = tl.load(a_at, mask=depth[None, :] < k - first, other=0.0)
            y = tl.load(b_at, mask=depth[None, :] < k - first, other=0.0)
        total = tl.dot(x, y.T, total)
        a_at += DEPTH
        b_at += DEPTH

    total *= alpha
    inside = (rows[:, None] < m) & (cols[None, :] < m)
    here = matrix * m * m + rows[:, None] * m + cols[None, :]
    if ADD:
        total += beta * tl.load(c + here, mask=inside, other=0.0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    # On and below the diagonal, and its mirror image, within a tile as well: the next product takes B^T for B. Where
    # rounding had made B other than B^T, fp16's error in Newton-Schulz was 0.4 to 0.5% in the place of 0.3%.
    place = tl.arange(0, TILE)
    if i != j:
        tl.store(out + here, result, mask=inside)
    else:
        tl.store(out + here, result, mask=inside & (place[:, None] >= place[None, :]))
    there = matrix * m * m + cols[:, None] * m + rows[None, :]
    above = (cols[:, None] < m) & (rows[None, :] < m)
    if i == j:
        above = above & (place[:, None] < place[None, :])
    tl.store(out + there, result.T, mask=above)
