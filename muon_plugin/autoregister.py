"""Importing this module calls `register`: for clients that start their own processes and import modules by name there.

verl imports it in each of its processes with ``VERL_USE_EXTERNAL_MODULES=muon_plugin.autoregister``.
"""

from __future__ import annotations

from .registration import register

register()
