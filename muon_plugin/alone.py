"""`Muon` without an engine: the core's optimizer, watched by the watchdog where MUON_WATCHDOG is set."""

from __future__ import annotations

from . import attention as attention  # the logits of QK-Clip
from . import deepspeed as deepspeed  # its AdamW and its group keys, for an optimizer that it takes over
from . import watchdog
from .core import phases
from .core.muon import Muon

__all__ = ["Muon"]

phases.at_start(watchdog.start)
