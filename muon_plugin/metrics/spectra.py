"""Sizes and singular values of a matrix: RMS, SVD entropy."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rms(tensor: Tensor) -> float:
    """Root of the mean square of all elements, summed in float64; nan where there are none.

    Args:
        tensor: of any shape and dtype.

    Examples:
        >>> import torch
        >>> from muon_plugin.metrics import rms
        >>> rms(torch.tensor([[3.0, -3.0], [3.0, 3.0]]))
        3.0
    """
    return float(tensor.detach().double().square().mean().sqrt())


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values of a matrix, computed in float32.

    Args:
        matrix: (rows, cols) of any floating-point dtype.

    Returns:
        (min(rows, cols),) float32, the largest first.

    Raises:
        ValueError: for a tensor that is not a matrix.

    Examples:
        >>> import torch
        >>> from muon_plugin.metrics import singular_values
        >>> singular_values(torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, 0.0]]))
        tensor([3., 2.])
    """
    if matrix.dim() != 2:
        raise ValueError(f"singular_values takes a matrix (rows, cols), not a tensor of shape {list(matrix.shape)}")
    return torch.linalg.svdvals(matrix.detach().float())


def svd_entropy(sigma: Tensor) -> float:
    """How evenly singular values are spread (paper, section 3.4): 1 if all are equal, 0 if only one is not zero.

    H = -(1/log n) sum p_i log p_i with p_i = sigma_i^2 / sum sigma^2.

    Args:
        sigma: (n,) singular values, in any order and scale; n at least 2.

    Returns:
        The entropy, from 0 to 1; nan where all values are zero.

    Raises:
        ValueError: for another shape: with one singular value the entropy is not defined.

    Examples:
        >>> import torch
        >>> from muon_plugin.metrics import svd_entropy
        >>> svd_entropy(torch.ones(8)), round(svd_entropy(torch.tensor([3.0, 1.0])), 3)
        (1.0, 0.469)
    """
    if sigma.dim() != 1 or len(sigma) < 2:
        raise ValueError(f"svd_entropy takes 2 or more singular values (n,), not a tensor of shape {list(sigma.shape)}")
    p = sigma.double().square()
    p = p / p.sum()
    return float(torch.special.entr(p).sum() / math.log(len(p)))
