"""The matrix products of Newton-Schulz. Whatever computes them, the iteration reads the same.

A matrix X is (..., m, n) with m <= n. R = X X^T and its polynomials are (..., m, m), symmetric, and commute. Sums are
in fp32, and a result is rounded once.
"""

from __future__ import annotations

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


TORCH = Products()


def _addmm(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    product = torch.addmm if c.dim() == 2 else torch.baddbmm
    return product(c, a, b, beta=beta, alpha=alpha)
