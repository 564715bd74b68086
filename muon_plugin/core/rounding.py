"""fp32 to bf16 so that small changes are not lost: stochastic rounding without a generator's state.

A momentum of which the nearest bf16 is kept forgets a change below half of its last place, which is a 512th of its
value: an average over twenty steps stands still some per cent away from where it should go. Rounded up with a
probability of what is cut off, it is right on average.

The random bits of an element are a hash of its value and of the step. So they depend on no layout, on no name and on no
order. Two elements of one value in fp32 get the same bits in that step; their next gradients differ.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stochastic(values: Tensor, step: int) -> Tensor:
    """Rounds to one of the two neighbours in bf16; on average over steps, to the value itself.

    What bf16 can represent stays as it is; so do infinities and NaN.

    Args:
        values: fp32, contiguous.
        step: the same number gives the same bits.

    Returns:
        bf16, of the same shape.
    """
    bits = values.view(torch.int32)
    noise = mixed(bits ^ _signed(step * GOLDEN & 0xFFFFFFFF)).bitwise_and_(0xFFFF)
    rounded = noise.add_(bits).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isnan(), values.bfloat16(), rounded)


#: Shifts and factors of a hash of 32 bits in which each bit of the result depends on all (lowbias32 of Chris Wellons'
#: hash-prospector).
SHIFTS, FACTORS = (16, 15, 16), (0x7FEB352D, 0x846CA68B)
#: 2**32 over the golden ratio, odd: its multiples are spread evenly, so that steps differ in many bits.
GOLDEN = 0x9E3779B1


def mixed(bits: Tensor) -> Tensor:
    """Hashes int32, in place."""
    for shift, factor in zip(SHIFTS, (*FACTORS, None)):
        bits ^= (bits >> shift).bitwise_and_((1 << (32 - shift)) - 1)  # shifted in are copies of the sign
        if factor is not None:
            bits *= _signed(factor)
    return bits


def _signed(number: int) -> int:
    return number - 2**32 if number >= 2**31 else number
