"""Newton-Schulz orthogonalization of matrices, alone or in batches, in bf16. Knows no ranks and no engines.

The iteration (paper, Eq. 2) drives the singular values of a matrix towards 1 and keeps its singular vectors::

    X_0 = M / ||M||_F
    X_k = a X + b (X X^T) X + c (X X^T)^2 X

Two forms compute the same polynomial. Both give the same bits for a matrix whatever batch it is in.

- ``standard`` multiplies the Gram matrix X X^T into X at every step, as ``torch.optim.Muon`` does, bit for bit.
- ``gram`` takes two steps at a time on the small square Gram matrix R = X X^T, and multiplies into X once::

      Z_1 = b_1 R + c_1 R^2        R' = (a_1 I + Z_1) R (a_1 I + Z_1)
      Z_2 = b_2 R' + c_2 R'^2      X  = (a_2 I + Z_2)(a_1 I + Z_1) X

  That is fewer operations once the long side exceeds 1.5 times the short one. More than two steps between products
  with X would be cheaper still, but bf16 then loses the small singular values. Relative error against float64 with
  the paper's coefficients, 512x2048, on a Gaussian matrix and on one with singular values from 1 to 1e-4: standard
  1.2% and 5.8%, pairs 1.4% and 5.0%, all five steps on R 1.4% and 52%. (Idea: Dao-AILab's gram-newton-schulz, which
  restarts at one point instead, and computes in fp16.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Triple = tuple[float, float, float]

#: Named coefficient sets, one (a, b, c) a step; the last one repeats when there are more steps.
COEFFICIENT_SETS: dict[str, tuple[Triple, ...]] = {
    # Keller Jordan's quintic, used by the paper (Eq. 2) and by torch.optim.Muon.
    "simple": ((3.4445, -4.7750, 2.0315),),
    # Tuned for five steps with less spread around 1: https://leloykun.github.io/ponder/muon-opt-coeffs/
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Polar Express (arXiv 2505.16932), its safety factor of 1.01 divided in.
    "polar_express": (
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.8750, -1.2500, 0.3750),
    ),
}
#: The most by which a pair of steps may stretch a small singular value before bf16's rounding of the product of the
#: two polynomials shows: at 33 (Polar Express' first pair) the error doubles, at 16 (quintic's) it does not.
MAX_GAIN = 20.0
METHODS = ("auto", "standard", "gram")


@dataclass(frozen=True)
class NewtonSchulz:
    """The iteration with its settings: call it on bf16 matrices, or ask what a matrix costs.

    Args:
        coefficients: one (a, b, c) for each step, so its length is the number of steps.
        method: ``"standard"``, ``"gram"``, or ``"auto"``: the form with fewer FLOPs for the shape, as long as the
            coefficients let it be as exact. The choice depends on nothing else, so every rank and every layout makes
            the same one.
        eps: smallest Frobenius norm to divide by (``torch.optim.Muon`` has the same 1e-7).
    """

    coefficients: tuple[Triple, ...]
    method: str = "auto"
    eps: float = 1e-7

    @torch.no_grad()
    def __call__(self, matrices: Tensor) -> Tensor:
        """Orthogonalizes a batch.

        Args:
            matrices: (batch, rows, cols), bf16, contiguous; scaled in place. Contiguous because a product may round
                differently for another memory layout.

        Returns:
            (batch, rows, cols), bf16: approximately U V^T of each matrix's SVD.
        """
        rows, cols = matrices.shape[-2:]
        # One reduction a matrix: a batched one may sum in another order, and one bit of the norm moves every bit after.
        norms = torch.stack([matrix.norm() for matrix in matrices])
        x = matrices.div_(norms.clamp_(min=self.eps).view(-1, 1, 1))
        if rows > cols:
            x = x.mT
        left = self.coefficients
        while left:
            if len(left) > 1 and self._form(rows, cols) == "gram":
                x, left = _two_steps(x, *left[:2]), left[2:]
            else:
                x, left = _one_step(x, left[0]), left[1:]
        return x.mT if rows > cols else x

    def _form(self, rows: int, cols: int) -> str:
        if self.method != "auto":
            return self.method
        # Two standard steps cost 8 m^2 n + 4 m^3, a pair on the Gram matrix 4 m^2 n + 10 m^3 (m the short side).
        fewer = 2 * max(rows, cols) > 3 * min(rows, cols)
        pairs = zip(self.coefficients[::2], self.coefficients[1::2])
        return "gram" if fewer and all(first[0] * second[0] <= MAX_GAIN for first, second in pairs) else "standard"

    def flops(self, rows: int, cols: int) -> int:
        """Floating-point operations of the matrix products for one rows x cols matrix (2 per multiply-add)."""
        m, n = sorted((rows, cols))
        steps = len(self.coefficients)
        pairs = steps // 2 if self._form(rows, cols) == "gram" else 0
        return pairs * (4 * m * m * n + 10 * m**3) + (steps - 2 * pairs) * (4 * m * m * n + 2 * m**3)


def coefficients_for(steps: int, which: str | Triple | tuple[Triple, ...]) -> tuple[Triple, ...]:
    """One triple for each step, from a set's name, one triple, or a sequence of triples (the last one repeats).

    Raises:
        ValueError: for an unknown name, or anything that is not made of triples of finite numbers.
    """
    allowed = f"[a, b, c], a list of such triples, or one of {sorted(COEFFICIENT_SETS)}"
    if isinstance(which, str):
        if which not in COEFFICIENT_SETS:
            raise ValueError(f"ns_coefficients={which!r} is not a known set; allowed: {allowed}")
        triples = COEFFICIENT_SETS[which]
    else:
        try:
            rows = [which] if isinstance(which[0], (int, float)) else list(which)
            triples = tuple((float(a), float(b), float(c)) for a, b, c in rows)  # type: ignore[misc]
        except (TypeError, ValueError, IndexError, KeyError):
            raise ValueError(f"ns_coefficients={which!r} is not made of triples; allowed: {allowed}") from None
        if not all(math.isfinite(value) for triple in triples for value in triple):
            raise ValueError(f"ns_coefficients={which!r} holds a number that is not finite; allowed: {allowed}")
    return tuple(triples[min(step, len(triples) - 1)] for step in range(steps))


def _one_step(x: Tensor, triple: Triple) -> Tensor:
    """(batch, m, n) -> (batch, m, n): a X + (b R + c R^2) X with R = X X^T."""
    a, b, c = triple
    gram = torch.bmm(x, x.mT)
    polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    return torch.baddbmm(x, polynomial, x, beta=a)


def _two_steps(x: Tensor, first: Triple, second: Triple) -> Tensor:
    """(batch, m, n) -> (batch, m, n): two steps on R = X X^T, then one product with X."""
    a1, b1, c1 = first
    a2, b2, c2 = second
    gram = torch.bmm(x, x.mT)
    z1 = torch.baddbmm(gram, gram, gram, beta=b1, alpha=c1)
    half = torch.baddbmm(gram, gram, z1, beta=a1)  # R (a_1 I + Z_1)
    gram = torch.baddbmm(half, z1, half, beta=a1)  # (a_1 I + Z_1) R (a_1 I + Z_1)
    z2 = torch.baddbmm(gram, gram, gram, beta=b2, alpha=c2)
    z1.diagonal(dim1=-2, dim2=-1).add_(a1)
    q = torch.baddbmm(z1, z2, z1, beta=a2)
    return torch.bmm(q, x)
