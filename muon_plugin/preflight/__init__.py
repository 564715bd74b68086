"""Checks before a job of many nodes, on all of them: ``torchrun ... -m muon_plugin.preflight``; see `__main__`."""
