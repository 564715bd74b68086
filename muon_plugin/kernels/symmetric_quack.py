"""quack's products that are symmetric (quack-kernels, Dao-AILab), for compute capability 9.0 and above.

Its tiles are chosen by the kind of GPU alone (`_symmetric_gemm_config` in quack/gemm_interface.py), so a matrix has the
same bits in any batch. A matrix alone is given as a batch of one: quack compiles other kernels without a batch.
"""

from __future__ import annotations

from quack.gemm_interface import gemm_symmetric
from torch import Tensor


def gram(x: Tensor) -> Tensor:
    """X X^T: (batch, m, k) or (m, k), fp16 or bf16, contiguous."""
    batch = x if x.dim() == 3 else x[None]
    return gemm_symmetric(batch, batch.mT).view(*x.shape[:-1], x.shape[-2])


def symmetric(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """beta C + alpha A B of symmetric matrices that commute: (batch, m, m) or (m, m)."""
    if c.dim() == 2:
        return symmetric(c[None], a[None], b[None], beta, alpha)[0]
    # Not b.mT, which rounding may have made other than b: see symmetric_triton.py.
    return gemm_symmetric(a, b, C=c, alpha=alpha, beta=beta)
