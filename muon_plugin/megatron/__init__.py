"""Muon under Megatron-Core: `register` makes ``--optimizer muon --use-distributed-optimizer`` mean this Muon.

See `hooks` for the functions of Megatron that are wrapped.
"""

from .hooks import TESTED, register, unregister

__all__ = ["TESTED", "register", "unregister"]
