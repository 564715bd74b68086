"""Muon under DeepSpeed: `register` makes ``"optimizer": {"type": "Muon"}`` mean this Muon; see `hooks`.

Importing the package does not import DeepSpeed. It allows ``adamw="deepspeed"`` (`adamw`) and the keys of DeepSpeed's
parameter groups (`host`).
"""

from . import adamw as adamw
from . import host as host
from .hooks import TESTED, register, unregister

__all__ = ["TESTED", "register", "unregister"]
