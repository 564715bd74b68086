"""Terminates a hung job and prints the rank, node, step and phase; see `watchdog`."""

from .watchdog import EXIT_CODE, VARIABLE, limits, start, stop

__all__ = ["EXIT_CODE", "VARIABLE", "limits", "start", "stop"]
