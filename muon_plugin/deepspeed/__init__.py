"""Muon under DeepSpeed: `register` makes ``"optimizer": {"type": "Muon"}`` mean this Muon; see `hooks`."""

from .hooks import TESTED, register, unregister

__all__ = ["TESTED", "register", "unregister"]
