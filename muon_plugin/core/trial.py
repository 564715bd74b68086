"""Kernels of our own are tried on the device before they are used: they must have the bits of plain torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch


def usable(what: str, device: torch.device, alone: Callable[[], list[bytes]], ours: Callable[[], list[bytes]]) -> bool:
    """Whether a kernel has the bits of plain torch on this device; a warning tells if it has not.

    Args:
        what: the kernel's name.
        device: where both run.
        alone, ours: what plain torch and the kernel make of the same numbers.
    """
    try:
        why = "" if alone() == ours() else "does not round as torch does"
    except Exception as error:  # of an import, a compiler, a driver
        why = f"fails with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if why:
        warnings.warn(
            f"muon_plugin: the {what} {why} on {device}: torch takes its place, in more launches and more passes over "
            "memory",
            stacklevel=3,
        )
    return not why
