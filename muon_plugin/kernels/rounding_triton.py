"""A Triton kernel that updates a momentum in bf16: average, stochastic rounding and direction in one pass.

It does what `core/rounding.py` does in plain torch, with its bits on CUDA, as `table_triton` does for fp32.
"""

from __future__ import annotations

from contextlib import nullcontext
from ctypes import c_float

import torch
import triton
import triton.language as tl
from torch import Tensor

from .table_triton import BLOCK, WARPS, lerp


def average(momentum: Tensor, gradient: Tensor, weight: float, towards: float | None, seed: int) -> None:
    """As `rounding.average`, of contiguous tensors on one device.

    Args:
        momentum: bf16, updated in place.
        gradient: fp32, overwritten by the direction.
        weight: the gradient's in the average.
        towards: the momentum's in Nesterov's direction; None without it.
        seed: of the step, int32.
    """
    # Kernels get floats in fp32; Triton's interpreter does not round them.
    weight, towards = c_float(weight).value, None if towards is None else c_float(towards).value
    with torch.cuda.device(gradient.device) if gradient.is_cuda else nullcontext():
        average_kernel[(triton.cdiv(momentum.numel(), BLOCK),)](
            momentum,
            gradient,
            momentum.numel(),
            weight,
            0.0 if towards is None else towards,
            seed,
            NESTEROV=towards is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


@triton.jit
def _rounded(values, seed):  # type: ignore[no-untyped-def]
    """`rounding.stochastic`: the hash of unsigned integers, whose products wrap around."""
    bits = values.to(tl.uint32, bitcast=True)
    noise = bits ^ seed.to(tl.uint32, bitcast=True)
    noise = (noise ^ (noise >> 16)) * tl.full(noise.shape, 0x7FEB352D, tl.uint32)
    noise = (noise ^ (noise >> 15)) * tl.full(noise.shape, 0x846CA68B, tl.uint32)
    noise = noise ^ (noise >> 16)
    found = ((bits + (noise & 0xFFFF)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.where(values == values, found, values.to(tl.bfloat16))


@triton.jit(do_not_specialize=["seed"])
def average_kernel(  # type: ignore[no-untyped-def]
    momenta, gradients, numel, weight, towards, seed, NESTEROV: tl.constexpr, BLOCK: tl.constexpr
):
    """See `average`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < numel
    gradient = tl.load(gradients + at, mask=there, other=0.0)
    values = lerp(tl.load(momenta + at, mask=there, other=0.0).to(tl.float32), gradient, weight)
    tl.store(momenta + at, _rounded(values, seed), mask=there)
    tl.store(gradients + at, lerp(gradient, values, towards) if NESTEROV else values, mask=there)
