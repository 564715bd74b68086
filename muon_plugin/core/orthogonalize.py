"""Newton-Schulz orthogonalization of matrices, alone or in batches, in bf16. Knows no ranks and no engines.

The iteration (paper, Eq. 2) drives the singular values of a matrix towards 1 and keeps its singular vectors::

    X_0 = M / ||M||_F
    X_k = a X + b (X X^T) X + c (X X^T)^2 X

Two forms compute the same polynomial.

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

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .coefficients import Triple

#: The most by which a pair of steps may stretch a small singular value before bf16's rounding of the product of the
#: two polynomials shows: at 33 (Polar Express' first pair) the error doubles, at 16 (quintic's) it does not.
MAX_GAIN = 20.0
#: The most by which a step after the first pair may magnify the relative error of a singular value near 1, which is
#: |p'(1) / p(1)|. Where a set starts over ("aol" 8, "quintic" 17), the error of the pairs, larger there, shows.
MAX_MAGNIFICATION = 5.0
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
    def __call__(self, matrices: Tensor) -> list[Tensor]:
        """Orthogonalizes a batch; the bits of each matrix do not depend on the batch it is in.

        Args:
            matrices: (batch, rows, cols), bf16, contiguous: a product may round differently for another memory layout.

        Returns:
            For each matrix (rows, cols), bf16: approximately U V^T of its SVD.
        """
        if _batch_is_exact(self, tuple(matrices.shape), matrices.device):
            return list(self._together(matrices))
        return [self._alone(matrix) for matrix in matrices]

    def _alone(self, matrix: Tensor) -> Tensor:
        return self._iterate(_normalized(matrix, self.eps))

    def _together(self, matrices: Tensor) -> Tensor:
        # One norm a matrix: a batched sum may go in another order, and one bit of the norm moves every bit after.
        norms = torch.stack([_norm(matrix) for matrix in matrices]).clamp_(min=self.eps)
        return self._iterate(matrices / norms.view(-1, 1, 1))

    def _iterate(self, x: Tensor) -> Tensor:
        """(..., rows, cols) -> the same: all steps, on the wide orientation."""
        rows, cols = x.shape[-2:]
        if rows > cols:
            return self._iterate(x.mT).mT
        if self._form(rows, cols) == "standard":
            for triple in self.coefficients:
                x = _one_step(x, triple)
            return x
        x = x.contiguous()  # a transposed view slows the products; the standard form keeps it, to have torch's bits
        for first, second in zip(self.coefficients[::2], self.coefficients[1::2]):
            x = _two_steps(x, first, second)
        return _one_step(x, self.coefficients[-1]) if len(self.coefficients) % 2 else x

    def _form(self, rows: int, cols: int) -> str:
        if self.method != "auto":
            return self.method
        # Two standard steps cost 8 m^2 n + 4 m^3, a pair on the Gram matrix 4 m^2 n + 10 m^3 (m the short side).
        fewer = 2 * max(rows, cols) > 3 * min(rows, cols)
        pairs = zip(self.coefficients[::2], self.coefficients[1::2])
        exact = all(first[0] * second[0] <= MAX_GAIN for first, second in pairs) and all(
            abs(a + 3 * b + 5 * c) <= MAX_MAGNIFICATION * abs(a + b + c) for a, b, c in self.coefficients[2:]
        )
        return "gram" if fewer and exact else "standard"

    def flops(self, rows: int, cols: int) -> int:
        """Floating-point operations of the matrix products for one rows x cols matrix (2 per multiply-add)."""
        m, n = sorted((rows, cols))
        steps = len(self.coefficients)
        pairs = steps // 2 if self._form(rows, cols) == "gram" else 0
        return pairs * (4 * m * m * n + 10 * m**3) + (steps - 2 * pairs) * (4 * m * m * n + 2 * m**3)


@functools.cache
def _batch_is_exact(newton_schulz: NewtonSchulz, shape: tuple[int, ...], device: torch.device) -> bool:
    """Whether a batch of this shape gives the bits of one matrix at a time, tried once with random matrices.

    Libraries choose kernels by the batch too. On CPU torch does so for small matrices, and a batch is not faster there.
    """
    if device.type == "cpu" or shape[0] == 1:
        return False
    if device.type == "meta":  # there are no bits: a step is only counted
        return True
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=device).bfloat16()
    return torch.equal(newton_schulz._together(x), torch.stack([newton_schulz._alone(matrix) for matrix in x]))


def _normalized(x: Tensor, eps: float) -> Tensor:
    """X / ||X||_F, in memory of its own, which is aligned wherever x lay in a batch; kernels may depend on that."""
    return x / _norm(x).clamp_(min=eps)


def _norm(x: Tensor) -> Tensor:
    """||X||_F, of memory that is aligned as a matrix of its own is."""
    norm: Tensor = (x.clone() if x.data_ptr() % 16 else x).norm()
    return norm


def _addmm(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """beta C + alpha A B, for one matrix or a batch: rounded to bf16 once."""
    product = torch.addmm if c.dim() == 2 else torch.baddbmm
    return product(c, a, b, beta=beta, alpha=alpha)


def _one_step(x: Tensor, triple: Triple) -> Tensor:
    """(..., m, n) -> (..., m, n): a X + (b R + c R^2) X with R = X X^T."""
    a, b, c = triple
    gram = x @ x.mT
    polynomial = _addmm(gram, gram, gram, beta=b, alpha=c)
    return _addmm(x, polynomial, x, beta=a)


def _two_steps(x: Tensor, first: Triple, second: Triple) -> Tensor:
    """(..., m, n) -> (..., m, n): two steps on R = X X^T, then one product with X."""
    a1, b1, c1 = first
    a2, b2, c2 = second
    gram = x @ x.mT
    z1 = _addmm(gram, gram, gram, beta=b1, alpha=c1)
    half = _addmm(gram, gram, z1, beta=a1)  # R (a_1 I + Z_1)
    gram = _addmm(half, z1, half, beta=a1)  # (a_1 I + Z_1) R (a_1 I + Z_1)
    z2 = _addmm(gram, gram, gram, beta=b2, alpha=c2)
    z1.diagonal(dim1=-2, dim2=-1).add_(a1)
    return _addmm(z1, z2, z1, beta=a2) @ x
