"""Newton-Schulz orthogonalization of matrices, alone or in batches. Knows no ranks and no engines.

The iteration (paper, Eq. 2) drives the singular values of a matrix towards 1 and keeps its singular vectors::

    X_0 = M / ||M||_F
    X_k = a X + b (X X^T) X + c (X X^T)^2 X

Two forms compute the same polynomial.

- ``standard`` multiplies the Gram matrix X X^T into X at every step, in bf16. It has ``torch.optim.Muon``'s bits
  where it is asked for by name; ``"auto"`` may take other products (products.py).
- ``gram`` takes a run of steps on the small square Gram matrix R = X X^T, and multiplies into X once. Two steps::

      Z_1 = b_1 R + c_1 R^2        R' = (a_1 I + Z_1) R (a_1 I + Z_1)
      Z_2 = b_2 R' + c_2 R'^2      X  = (a_2 I + Z_2)(a_1 I + Z_1) X

  That is fewer operations once the long side exceeds 1.5 times the short one, and for every shape where symmetric
  products cost half (products.py). (Idea: Dao-AILab's gram-newton-schulz.)

A run must be short, since what rounding adds to R grows in every step by as much as the small singular values do. In
bf16 a run has two steps, in fp16, which has 3 bits more, up to three. The longer runs come first: the singular values
are smaller then, and so is what rounding adds. fp16 iterates on a multiple of X (`SCALE`), whose products are in its
range. Errors against float64 are in benchmarks/results/accuracy.md (`python benchmarks/accuracy.py`).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from .coefficients import Triple, coefficients_for
from .products import TORCH, Products, aligned, products_on

#: The most by which two steps may stretch a small singular value before bf16's rounding of the product of the two
#: polynomials shows: at 33 (Polar Express' first pair) the error doubles, at 16 (quintic's) it does not. The same for
#: fp16's runs of three, with 3 bits more.
MAX_GAIN = {"bf16": 20.0, "fp16": 160.0}
#: The most by which a step after the first pair may magnify the relative error of a singular value near 1, which is
#: |p'(1) / p(1)|. Where a set starts over ("aol" 8, "quintic" 17), the error of bf16's pairs, larger there, shows.
MAX_MAGNIFICATION = 5.0
#: The most steps in a run.
MAX_RUN = {"bf16": 2, "fp16": 3}
#: In fp16 the iteration runs on this multiple of X, with b and c scaled to match. Entries of X X^T are 2**-19 for a
#: normal 4096x16384, where fp16 has 5 bits left: that would cost a fifth of the accuracy, and half for 8192x32768.
#: X X^T has room for singular values of X up to 16, and the iteration keeps them below 2.
SCALE = 16.0
#: Matrix with which fp16 is tried on a device, and the relative error against float64 that it may have there. By
#: emulation it is 0.3% or less in fp16 and above 1% in bf16, of which the result's rounding to bf16 is 0.17%.
TRIED, TOLERATED = (512, 2048), 0.005
METHODS = ("auto", "standard", "gram")
DTYPES = ("auto", "bf16", "fp16")


@dataclass(frozen=True)
class NewtonSchulz:
    """The iteration with its settings: call it on bf16 matrices, or ask what a matrix costs.

    Args:
        coefficients: one (a, b, c) for each step, so its length is the number of steps.
        method: ``"standard"``, ``"gram"``, or ``"auto"``: in bf16 the form with fewer FLOPs for the shape, in fp16 the
            Gram form, as long as the coefficients let it be as exact. The choice depends on nothing else, so every rank
            and every layout makes the same one.
        eps: smallest Frobenius norm to divide by (``torch.optim.Muon`` has the same 1e-7).
        dtype: of the Gram form: ``"bf16"``, ``"fp16"``, or ``"auto"``, which `on` replaces by one of them. The standard
            form is in bf16.
        products: what multiplies the matrices; None: see `on`.
        note: why `on` has chosen so, where that needs a word.
    """

    coefficients: tuple[Triple, ...]
    method: str = "auto"
    eps: float = 1e-7
    dtype: str = "bf16"
    products: Products | None = None
    note: str = ""

    def on(self, device: torch.device) -> NewtonSchulz:
        """The iteration as it runs on a device; "meta" stands for a CUDA device of a job that is only planned.

        The dtype "auto" is fp16 on CUDA devices, where the coefficients allow the Gram form and a trial finds fp16 as
        exact as expected; elsewhere, and for the method "standard", it is bf16. Products that are not given are torch's
        for the method "standard", and for others the fastest on the device.
        """
        if self.dtype != "auto" and self.products is not None:
            return self
        standard, dtype, note = self.method == "standard", self.dtype, ""
        if dtype == "auto":
            dtype = "bf16"
            if device.type in ("cuda", "meta") and not standard and replace(self, dtype="fp16").gram_is_exact:
                error = 0.0 if device.type == "meta" else error_in_fp16(device)
                dtype = "fp16" if error <= TOLERATED else "bf16"
                note = f"fp16 has an error of {error:.2%} on this device" if dtype == "bf16" else ""
        products = self.products or (TORCH if standard else products_on(device, dtype))
        return replace(self, dtype=dtype, products=products, note=note)

    def describe(self, shapes: Iterable[tuple[int, int]] = ()) -> str:
        """What decides about the bits of matrices of these shapes, beside the settings. It has to be one on all ranks.

        Each library that computes symmetric products is tried for these shapes.
        """
        on_gram = [shape for shape in shapes if self._form(*shape) == "gram"]
        products = (self.products or TORCH).describe(on_gram)
        return "; ".join([f"Newton-Schulz in {self.dtype}", *filter(None, [self.note, products])])

    @torch.no_grad()
    def __call__(self, matrices: Tensor) -> Tensor | list[Tensor]:
        """Orthogonalizes a batch; the bits of each matrix do not depend on the batch it is in.

        Args:
            matrices: (batch, rows, cols), bf16, contiguous: a product may round differently for another memory layout.

        Returns:
            For each matrix (rows, cols), bf16: approximately U V^T of its SVD. One tensor where they were computed as
            a batch.
        """
        here = self.on(matrices.device)
        if _batch_is_exact(here, tuple(matrices.shape), matrices.device):
            return here._together(matrices)
        return [here._alone(matrix) for matrix in matrices]

    def _alone(self, matrix: Tensor) -> Tensor:
        if self._in_fp16(matrix):
            return self._iterate_in_fp16(matrix)
        return self._iterate(_normalized(matrix, self.eps))

    def _together(self, matrices: Tensor) -> Tensor:
        if self._in_fp16(matrices):
            return self._iterate_in_fp16(matrices)
        # One norm a matrix: a batched sum may go in another order, and one bit of the norm moves every bit after.
        norms = torch.stack([_norm(matrix) for matrix in matrices]).clamp_(min=self.eps)
        return self._iterate(matrices / norms.view(-1, 1, 1))

    def _iterate(self, x: Tensor) -> Tensor:
        """(..., rows, cols) -> the same: all steps, on the wide orientation."""
        rows, cols = x.shape[-2:]
        if rows > cols:
            return self._iterate(x.mT).mT
        if self._form(rows, cols) == "gram":
            x = x.contiguous()  # a transposed view slows the products; the standard form keeps it, to have torch's bits
        products = self.products or TORCH
        for run in self._runs(rows, cols):
            x = _steps_on_gram(x, run, products) if len(run) > 1 else _one_step(x, run[0], products)
        return x

    def _iterate_in_fp16(self, matrices: Tensor) -> Tensor:
        """(..., rows, cols), bf16 -> all steps in fp16, (..., rows, cols) in bf16."""
        scaled = replace(self, coefficients=tuple((a, b / SCALE**2, c / SCALE**4) for a, b, c in self.coefficients))
        x = scaled._iterate((self.products or TORCH).normalized(matrices, self.eps, SCALE))
        out = torch.empty(matrices.shape, dtype=torch.bfloat16, device=matrices.device)
        return torch.mul(x.mT if matrices.shape[-2] > matrices.shape[-1] else x, 1 / SCALE, out=out)

    def _in_fp16(self, x: Tensor) -> bool:
        return self.dtype == "fp16" and self._form(*x.shape[-2:]) == "gram"

    def _form(self, rows: int, cols: int) -> str:
        if self.method != "auto":
            return self.method
        # Two standard steps cost 8 m^2 n + 4 m^3, a pair on the Gram matrix 4 m^2 n + 10 m^3 (m the short side). In
        # fp16 the Gram form is taken for every shape: it is more exact.
        chosen = self.dtype == "fp16" or 2 * max(rows, cols) > 3 * min(rows, cols)
        return "gram" if chosen and self.gram_is_exact else "standard"

    @property
    def gram_is_exact(self) -> bool:
        """Whether the Gram form is as exact as the standard one with these coefficients."""
        runs = runs_of(self.coefficients, MAX_RUN[self.dtype])
        gains = [math.prod(a for a, _, _ in run) for run in runs if len(run) > 1]
        return all(gain <= MAX_GAIN[self.dtype] for gain in gains) and (
            self.dtype == "fp16"
            or all(abs(a + 3 * b + 5 * c) <= MAX_MAGNIFICATION * abs(a + b + c) for a, b, c in self.coefficients[2:])
        )

    def _runs(self, rows: int, cols: int) -> list[tuple[Triple, ...]]:
        """The steps between two products with X, for a matrix of this shape."""
        if self._form(rows, cols) == "standard":
            return runs_of(self.coefficients, 1)
        return runs_of(self.coefficients, MAX_RUN[self.dtype])

    def flops(self, rows: int, cols: int) -> int:
        """Floating-point operations of the matrix products for one rows x cols matrix (2 per multiply-add)."""
        m, n = sorted((rows, cols))
        products, runs = self.products or TORCH, self._runs(rows, cols)
        # A run: X X^T, Z of each step, R twice and the polynomial once for each step but one, and one product with X.
        square = sum(len(run) + 3 * (len(run) - 1) for run in runs) * products.flops(m, m)
        return square + len(runs) * (products.flops(m, n) + 2 * m * m * n)


def check_dtype(dtype: str, method: str, chosen: NewtonSchulz) -> None:
    """Refuses fp16 where the standard form would be taken. `dtype` and `method`: the settings as the user writes them.

    Raises:
        ValueError: with both, and what is allowed.
    """
    if chosen.dtype != "fp16":
        return
    if chosen.method == "standard":
        raise ValueError(
            f"{dtype} with {method} is not valid: the standard form has torch.optim.Muon's bits, in bf16; allowed: "
            "bf16 or auto, or one of the methods auto and gram"
        )
    if chosen.method == "auto" and not chosen.gram_is_exact:
        raise ValueError(
            f"{dtype} with {method} is not valid with these Newton-Schulz coefficients: they stretch small singular "
            "values so much in three steps that the Gram form is not as exact as the standard one, which is in bf16; "
            "allowed: bf16 or auto, or the method gram"
        )


def runs_of(triples: Sequence[Triple], most: int) -> list[tuple[Triple, ...]]:
    """As few runs as can be of at most so many steps, equally long or one apart, the longer ones first."""
    runs = -(-len(triples) // most)
    each, longer = divmod(len(triples), runs)
    steps = iter(triples)
    return [tuple(islice(steps, each + (number < longer))) for number in range(runs)]


@functools.cache
def _batch_is_exact(newton_schulz: NewtonSchulz, shape: tuple[int, ...], device: torch.device) -> bool:
    """Whether a batch of this shape gives the bits of one matrix at a time, tried once with random matrices.

    Libraries choose kernels by the batch too. On CPU torch does so for small matrices, and a batch is not faster there.
    On other devices it is, so a batch that is refused is told.
    """
    if device.type == "cpu" or shape[0] == 1:
        return False
    if device.type == "meta":  # there are no bits: a step is only counted
        return True
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=device).bfloat16()
    exact = torch.equal(newton_schulz._together(x), torch.stack([newton_schulz._alone(matrix) for matrix in x]))
    if not exact:
        batch, rows, cols = shape
        warnings.warn(
            f"muon_plugin: a batch of {batch} matrices of {rows}x{cols} has other bits on {device} than one matrix at "
            "a time in Newton-Schulz: they are orthogonalized one at a time, which is slower",
            stacklevel=2,
        )
    return exact


@functools.cache
def error_in_fp16(device: torch.device) -> float:
    """The error of fp16's Gram form on this device, against float64, tried once; told where it is too large.

    A device may sum products in less than fp32, or have no subnormal numbers.
    """
    newton_schulz = NewtonSchulz(coefficients_for(5, "simple"), "gram", dtype="fp16").on(device)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(TRIED, generator=generator, device=device).bfloat16()
    exact = x.double() / x.double().norm()
    for a, b, c in newton_schulz.coefficients:
        gram = exact @ exact.mT
        exact = a * exact + (b * gram + c * gram @ gram) @ exact
    error = float((newton_schulz._alone(x).double() - exact).norm() / exact.norm())
    if not error <= TOLERATED:
        warnings.warn(
            f"muon_plugin: Newton-Schulz in fp16 has an error of {error:.2%} on {device}, where {TOLERATED:.1%} is "
            "allowed: it runs in bf16",
            stacklevel=2,
        )
    return error


def _normalized(x: Tensor, eps: float) -> Tensor:
    """X / ||X||_F, in memory of its own, which is aligned wherever x lay in a batch; kernels may depend on that."""
    return x / _norm(x).clamp_(min=eps)


def _norm(x: Tensor) -> Tensor:
    """||X||_F, of memory that is aligned as a matrix of its own is."""
    norm: Tensor = aligned(x).norm()
    return norm


def _one_step(x: Tensor, triple: Triple, products: Products) -> Tensor:
    """(..., m, n) -> (..., m, n): a X + (b R + c R^2) X with R = X X^T."""
    a, b, c = triple
    gram = products.gram(x)
    return products.apply(products.symmetric(gram, gram, gram, beta=b, alpha=c), x, beta=a)


def _steps_on_gram(x: Tensor, run: Sequence[Triple], products: Products) -> Tensor:
    """(..., m, n) -> (..., m, n): two steps or more on R = X X^T, then one product with X."""
    gram = products.gram(x)
    polynomial: Tensor  # the product of the steps' a I + Z
    for number, (a, b, c) in enumerate(run):
        z = products.symmetric(gram, gram, gram, beta=b, alpha=c)
        if number < len(run) - 1:
            half = products.symmetric(gram, gram, z, beta=a)  # R (a I + Z)
            gram = products.symmetric(half, z, half, beta=a)  # (a I + Z) R (a I + Z)
        if number == 0:
            z.diagonal(dim1=-2, dim2=-1).add_(a)
            polynomial = z
        else:
            polynomial = products.symmetric(polynomial, z, polynomial, beta=a)
    return products.apply(polynomial, x)
