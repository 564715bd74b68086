"""Muon under DeepSpeed: `register` makes ``"optimizer": {"type": "Muon"}`` mean this Muon; see `hooks`.

Importing the package lets the setting ``adamw`` be "deepspeed" (`adamw`). Without an engine that is not known.
"""

from . import adamw as adamw
from .hooks import TESTED, register, unregister

__all__ = ["TESTED", "register", "unregister"]
