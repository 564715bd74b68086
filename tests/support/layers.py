"""Models of one layer, known by the class of its block and its attribute there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from muon_plugin.core.layout import Matrix


def block(kind: str, attribute: str, outputs: int, config: Mapping[str, Any] | None = None, **sizes: Any) -> nn.Module:
    """A model with one module of class `kind`, in which `attribute` is a Linear with so many outputs."""
    held = type(kind, (nn.Module,), {})()
    setattr(held, attribute, nn.Linear(8, outputs, bias=False))
    for name, value in sizes.items():
        setattr(held, name, value)
    model = nn.Module()
    model.block = held
    model.config = None if config is None else SimpleNamespace(**config)
    return model


def outputs_of(matrices: Iterable[Matrix], model: nn.Module) -> dict[str, list[list[int]]]:
    """Name of a Linear's weight -> for each of its matrices, the outputs that it holds."""
    weights = dict(model.named_parameters())
    found: dict[str, list[list[int]]] = {}
    for matrix in matrices:
        rows, cols = weights[matrix.parameter].shape
        flat = torch.arange(rows)[:, None].expand(rows, cols).reshape(-1)
        held = matrix.where.view(flat).reshape(matrix.rows, matrix.cols)[:, 0]
        found.setdefault(matrix.parameter, []).append(held.tolist())
    return found
