"""A momentum in bf16 in which small changes are not lost: stochastic rounding without a generator's state.

A momentum of which the nearest bf16 is kept forgets a change below half of its last place, which is a 512th of its
value: an average over twenty steps stands still some per cent away from where it should go. Rounded up with a
probability of what is cut off, it is right on average.

The random bits of an element are a hash of its value and of the step. So they depend on no layout, on no name and on no
order. Two elements of one value in fp32 get the same bits in that step; their next gradients differ.

On CUDA a Triton kernel does in one pass what takes plain torch about twenty (kernels/rounding_triton.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .elementwise import PORTION
from .launches import count
from .layout import Strided
from .trial import usable

#: (momentum, gradient, weight, towards, step): of contiguous tensors; see `average`.
Average = Callable[[Tensor, Tensor, float, "float | None", int], None]


def average(
    momentum: Tensor, gradient: Tensor, parts: Sequence[Strided], weight: float, towards: float | None, step: int
) -> None:
    """M <- M + weight (G - M) in these parts, rounded to bf16; the direction, of the M before it is rounded, to G.

    Args:
        momentum: flat, bf16, updated in place.
        gradient: flat, fp32, on the same device; overwritten by the direction ``G + towards (M - G)``, or M.
        parts: of both.
        weight: the gradient's in the average.
        towards: the momentum's in Nesterov's direction; None without it.
        step: the same number gives the same bits.
    """
    for part in parts:
        if part.count == 1 and by_kernel_on(momentum.device):
            _by_kernel(part.view(momentum), part.view(gradient), weight, towards, step)
            continue
        for first in range(0, part.numel, PORTION):
            for at in part.cut(first, min(first + PORTION, part.numel)):
                _alone(at.view(momentum), at.view(gradient), weight, towards, step)


def _alone(momentum: Tensor, gradient: Tensor, weight: float, towards: float | None, step: int) -> None:
    values = momentum.float().lerp_(gradient, weight)
    momentum.copy_(stochastic(values, step))
    gradient.copy_(values) if towards is None else gradient.lerp_(values, towards)


def _by_kernel(momentum: Tensor, gradient: Tensor, weight: float, towards: float | None, step: int) -> None:
    if momentum.is_meta:
        count(momentum.numel() * 12)
        return
    from ..kernels import rounding_triton

    rounding_triton.average(momentum, gradient, weight, towards, _seed(step))


def by_kernel_on(device: torch.device) -> bool:
    """Whether the Triton kernel does it; on meta the step of a CUDA device is counted."""
    if device.type == "meta":
        return True
    return device.type == "cuda" and torch.version.hip is None and _same_bits(device)


@functools.cache
def _same_bits(device: torch.device) -> bool:
    what = "Triton kernel for momenta in bf16"
    return usable(what, device, lambda: _found(device, _alone), lambda: _found(device, _by_kernel))


def _found(device: torch.device, average: Average) -> list[bytes]:
    """What becomes of random momenta and gradients, infinities and NaN among them; both ways of torch's lerp."""
    found = []
    for step, (weight, towards) in enumerate(((0.05, 0.95), (0.7, 0.3), (0.05, None))):
        generator = torch.Generator(device).manual_seed(step)
        momentum, gradient = torch.randn(2, 5000, generator=generator, device=device)
        gradient[:4] = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
        kept = momentum.bfloat16()
        average(kept, gradient, weight, towards, step)
        gradient[:4] = gradient[:4].nan_to_num()  # NaN has many bits
        kept[:4] = kept[:4].nan_to_num()
        found += [t.cpu().view(torch.uint8).numpy().tobytes() for t in (kept, gradient)]
    return found


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
    noise = mixed(bits ^ _seed(step)).bitwise_and_(0xFFFF)
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


def _seed(step: int) -> int:
    return _signed(step * GOLDEN & 0xFFFFFFFF)


def _signed(number: int) -> int:
    return number - 2**32 if number >= 2**31 else number
