"""The matrix products of Newton-Schulz. Whatever computes them, the iteration reads the same.

A matrix X is (..., m, n) with m <= n. R = X X^T and its polynomials are (..., m, m), symmetric, and commute. Sums are
in fp32, and a result is rounded once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Products:
    """torch's products."""

    def gram(self, x: Tensor) -> Tensor:
        """X X^T: (..., m, n) -> (..., m, m)."""
        return x @ x.mT

    def symmetric(self, c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
        """beta C + alpha A B of symmetric matrices that commute, (..., m, m)."""
        return _addmm(c, a, b, beta, alpha)

    def apply(self, polynomial: Tensor, x: Tensor, beta: float = 0.0) -> Tensor:
        """beta X + P X: (..., m, m) and (..., m, n) -> (..., m, n)."""
        return _addmm(x, polynomial, x, beta) if beta else polynomial @ x


@dataclass(frozen=True)
class Widened(Products):
    """torch's products of the same numbers in fp32, rounded to the operands' dtype.

    For CPUs that have neither AVX-512 nor other instructions for bf16: on one of them torch multiplied bf16 at
    1 GFLOP/s a core, fp32 at 80. The same for fp16.
    """

    def gram(self, x: Tensor) -> Tensor:
        return super().gram(x.float()).to(x.dtype)

    def symmetric(self, c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
        return super().symmetric(c.float(), a.float(), b.float(), beta, alpha).to(c.dtype)

    def apply(self, polynomial: Tensor, x: Tensor, beta: float = 0.0) -> Tensor:
        return super().apply(polynomial.float(), x.float(), beta).to(x.dtype)


TORCH, WIDENED = Products(), Widened()


def products_on(device: torch.device, dtype: str) -> Products:
    """The fastest ones of matrices in "bf16" or "fp16" on a device."""
    return WIDENED if device.type == "cpu" and not _cpu_multiplies(dtype) else TORCH


@functools.cache
def _cpu_multiplies(dtype: str) -> bool:
    """What torch itself asks before it hands a product to oneDNN, which not every build of torch has."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    supported: bool = getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported")()
    return supported


def _addmm(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    product = torch.addmm if c.dim() == 2 else torch.baddbmm
    return product(c, a, b, beta=beta, alpha=alpha)
