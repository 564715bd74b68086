"""The matrix products of Newton-Schulz. Whatever computes them, the iteration reads the same.

A matrix X is (..., m, n) with m <= n. R = X X^T and its polynomials are (..., m, m), symmetric, and commute. Sums are
in fp32, and a result is rounded once.

On CUDA devices symmetric products are computed by half, where a library can: quack (`muon_plugin[gpu]`), or our Triton
kernel. Which one is a function of the shape, the kind of GPU and the releases alone. Before a library is used for a
shape it is tried on the device, and torch takes its place if it fails. Each rank tries all shapes at start, and what it
found is compared with the other ranks' (`Symmetric.describe`): a rank that took torch's place alone would compute other
bits.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .launches import count

META = torch.device("meta")
#: Rows and columns of a library's tiles. quack's are those of its clusters.
TILES = {"quack": 256, "triton": 128}
#: The oldest compute capability that a library is used on. (quack's kernels for 8.0 are newer, and untried.)
OLDEST = {"quack": 90, "triton": 80}
#: Sizes must be multiples of this: rows then begin where wide loads do.
MULTIPLE = 16
#: A library is used where its tiles on and below the diagonal make up at most this part of the product, since larger
#: products are faster by the element.
WORTH = 0.8
#: quack's instructions are larger and faster; ours are taken where its larger tiles compute this much more.
QUACK_MARGIN = 1.25
#: The releases of quack that have `gemm_symmetric` as it is called here.
QUACK = ((0, 6, 5), (0, 7))


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

    def normalized(self, x: Tensor, eps: float, scale: float) -> Tensor:
        """scale X / max(||X||_F, eps) of (..., rows, cols) in bf16: fp16, and transposed where rows are more.

        A matrix has the same bits in any batch: each norm is of its own, in fp32.
        """
        wide = x.mT if x.shape[-2] > x.shape[-1] else x
        norms = _norms(x.unbind() if x.dim() == 3 else [x]).clamp_(min=eps).div_(scale)
        out = torch.empty(wide.shape, dtype=torch.float16, device=x.device)
        # Divided in fp32, and rounded once.
        return torch.div(wide, norms.view(-1, 1, 1) if x.dim() == 3 else norms.view(1, 1), out=out)

    def flops(self, m: int, k: int) -> int:
        """Floating-point operations of a symmetric product of (m, k) by (k, m)."""
        return 2 * m * m * k

    def describe(self, shapes: Iterable[tuple[int, int]]) -> str:
        """What computes the products of matrices of these shapes, and of which release it is."""
        return f"torch {torch.__version__}"


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


@dataclass(frozen=True)
class Symmetric(Products):
    """torch's products, but symmetric ones by half where it is worth it.

    Attributes:
        capability: the GPU's compute capability, 90 for 9.0.
        releases: of the libraries that run on it.
        device, dtype: where a library is tried before it is taken; on "meta" none is, for a job that is only planned.
    """

    capability: int
    releases: tuple[tuple[str, str], ...] = ()
    device: torch.device = META
    dtype: torch.dtype = torch.float16

    def gram(self, x: Tensor) -> Tensor:
        found: Tensor = self._library(x).gram(x)
        return found

    def symmetric(self, c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
        found: Tensor = self._library(a).symmetric(c, a, b, beta, alpha)
        return found

    def normalized(self, x: Tensor, eps: float, scale: float) -> Tensor:
        """By our Triton kernels, if they run here."""
        if "triton" not in dict(self.releases):
            return super().normalized(x, eps, scale)
        if x.is_meta:
            count(x.nbytes)
            count(2 * x.nbytes)
            rows, cols = sorted(x.shape[-2:])
            return torch.empty(*x.shape[:-2], rows, cols, dtype=torch.float16, device=x.device)
        found: Tensor = _library("triton").normalized(x, eps, scale)
        return found

    def flops(self, m: int, k: int) -> int:
        return 2 * m * m * k if self.taken(m, k) == "torch" else m * m * k

    def chosen(self, m: int, k: int) -> str:
        """The library for a product of (m, k) by (k, m), if it works there."""
        if m % MULTIPLE or k % MULTIPLE:
            return "torch"
        parts = {name: computed(m, TILES[name]) for name, _ in self.releases}
        if "triton" in parts and parts.get("quack", 1.0) > QUACK_MARGIN * parts["triton"]:
            parts.pop("quack", None)
        return next((name for name in ("quack", "triton") if parts.get(name, 1.0) <= WORTH), "torch")

    def taken(self, m: int, k: int) -> str:
        """What computes a product of (m, k) by (k, m)."""
        name = self.chosen(m, k)
        if name == "torch" or self.device.type == "meta":
            return name
        return name if works(name, dict(self.releases)[name], m, k, self.dtype, self.device) else "torch"

    def _library(self, x: Tensor) -> Any:
        """What computes a product of x with its transposed."""
        name = self.taken(*x.shape[-2:])
        return TORCH if name == "torch" or x.is_meta else _library(name)

    def describe(self, shapes: Iterable[tuple[int, int]]) -> str:
        sides: dict[str, set[int]] = {}
        for m, n in map(sorted, shapes):
            for k in (n, m):  # X X^T, and polynomials of it
                sides.setdefault(self.taken(m, k), set()).add(m)
        each = [
            f"{name} {release}" + (f" (short side {', '.join(map(str, sorted(sides[name])))})" if sides else "")
            for name, release in (*self.releases, ("torch", torch.__version__))
            if not sides or name in sides
        ]
        gpu = f"{self.capability // 10}.{self.capability % 10}"
        return f"symmetric products on compute capability {gpu} by {', '.join(each)}"


#: Of a CUDA device that is not here: an H100's without quack. Triton comes with torch.
PLANNED = Symmetric(90, (("triton", ""),))


def computed(m: int, tile: int) -> float:
    """How much of an m x m product its tiles on and below the diagonal are; tiles reach beyond its borders."""
    tiles = -(-m // tile)
    return tile * tile * tiles * (tiles + 1) / 2 / max(m * m, 1)


def products_on(device: torch.device, dtype: str) -> Products:
    """The fastest ones of matrices in "bf16" or "fp16" on a device; "meta" stands for a CUDA device."""
    if device.type == "meta":
        return PLANNED
    if device.type == "cuda" and torch.version.hip is None:
        return replace(symmetric_on(device), dtype=torch.float16 if dtype == "fp16" else torch.bfloat16)
    return WIDENED if device.type == "cpu" and not _cpu_multiplies(dtype) else TORCH


@functools.cache
def _cpu_multiplies(dtype: str) -> bool:
    """What torch itself asks before it hands a product to oneDNN, which not every build of torch has."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    supported: bool = getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported")()
    return supported


@functools.cache
def symmetric_on(device: torch.device) -> Symmetric:
    """Those of a CUDA device: what is installed and runs there. Says in one line what is installed and does not."""
    major, minor = torch.cuda.get_device_capability(device)
    capability, found = 10 * major + minor, []
    for name, distribution in (("quack", "quack-kernels"), ("triton", "triton")):
        release = next((d.version for d in importlib.metadata.distributions(name=distribution)), None)
        if release is None or capability < OLDEST[name]:
            continue
        if name == "quack" and not QUACK[0] <= numbers(release) < QUACK[1]:
            allowed = " and below ".join(".".join(map(str, bound)) for bound in QUACK)
            _warn(f"{distribution} {release} is not used; supported: {allowed}")
        elif works(name, release, 2 * TILES[name], 2 * TILES[name], torch.float16, device):
            found.append((name, release))
    return Symmetric(capability, tuple(found), device)


def numbers(release: str) -> tuple[int, ...]:
    """The leading numbers of a release, to compare."""
    return tuple(int(part) for part in re.match(r"[\d.]*\d|", release)[0].split(".") if part)  # type: ignore[index]


def _library(name: str) -> Any:
    """The module with `gram` and `symmetric`. Imported here, since it needs the library."""
    if name == "quack":
        from ..kernels import symmetric_quack

        return symmetric_quack
    from ..kernels import symmetric_triton

    return symmetric_triton


@functools.cache
def works(name: str, release: str, m: int, k: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a library's products of (m, k) by (k, m) are right on this device: torch's up to rounding, and the same
    bits for a matrix alone and in a batch. Tried once; a failure is one line."""
    try:
        why = _trial(_library(name), m, k, dtype, device)
    except Exception as error:  # of an import, a compiler, a driver
        why = f"fail with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if why:
        kind = str(dtype).removeprefix("torch.")
        _warn(f"{name} {release}'s symmetric products of {m}x{k} in {kind} on {device} {why}; torch's take their place")
    return not why


def _trial(library: Any, m: int, k: int, dtype: torch.dtype, device: torch.device) -> str:
    """What is wrong with a library's products; nothing, if they are right."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(2, m, k, generator=generator, device=device, dtype=dtype).div_(k**0.5)
    found, alone = library.gram(x), library.gram(x[0].clone())
    wanted = TORCH.gram(x)
    if m == k:
        c, a = wanted, wanted / 2
        found = torch.cat([found, library.symmetric(c, a, a, 0.5, -2.0)])
        alone = torch.cat([alone, library.symmetric(c[0].clone(), a[0].clone(), a[0].clone(), 0.5, -2.0)])
        wanted = torch.cat([wanted, TORCH.symmetric(c, a, a, 0.5, -2.0)])
    # Each of both roundings is by at most half of this; sums in another order add less.
    error = float((found.float() - wanted.float()).norm() / wanted.float().norm())
    if not error <= torch.finfo(dtype).eps:
        return f"differ from torch's by {error:.1%}"
    same = torch.equal(found[::2].flatten(0, 1), alone)
    for given in (x.bfloat16(), x.bfloat16().mT.contiguous()) if hasattr(library, "normalized") else ():
        normalized, wanted = library.normalized(given, 1e-7, 16.0), TORCH.normalized(given, 1e-7, 16.0)
        if not torch.allclose(normalized.float(), wanted.float(), rtol=2**-9, atol=2**-20):
            return "are right, but its norms differ from torch's"
        same = same and torch.equal(normalized[0], library.normalized(given[0].clone(), 1e-7, 16.0))
    return "" if same else "have other bits in a batch"


def _warn(text: str) -> None:
    warnings.warn(f"muon_plugin: {text}", stacklevel=2)


def _norms(matrices: Sequence[Tensor]) -> Tensor:
    """||X||_F of each, in fp32: each of its own, but on CUDA in one kernel."""
    # torch's sum in fp32 on a CPU is off by 0.5% for 4096x16384.
    dtype = torch.float64 if matrices[0].device.type == "cpu" else torch.float32
    return torch.stack(torch._foreach_norm([aligned(x) for x in matrices], dtype=dtype)).float()


def aligned(x: Tensor) -> Tensor:
    """In memory that is aligned as a matrix of its own is; kernels may depend on that."""
    return x.clone() if x.data_ptr() % 16 else x


def _addmm(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    product = torch.addmm if c.dim() == 2 else torch.baddbmm
    return product(c, a, b, beta=beta, alpha=alpha)
