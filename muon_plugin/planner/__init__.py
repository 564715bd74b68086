"""What a run would hold, compute and send, before it starts: ``python -m muon_plugin.planner``, or `report` in Python.

Needs no GPU and no processes; see `command.USAGE` and docs/planner.md.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["report"]


def report(arguments: Sequence[str]) -> str:
    """The text that ``python -m muon_plugin.planner`` prints for these arguments.

    Megatron models are planned in a subprocess, because that patches torch.cuda (see `on_meta`); so are others where
    torch.distributed runs, as a step is counted in process groups of its own (see `counts`).

    Raises:
        ValueError: for a bad argument, with its value and what is allowed.
    """
    import torch.distributed as dist

    from .command import in_own_process, printed, run

    own = list(arguments)
    apart = "--megatron" in own or "--" in own or dist.is_initialized()
    return in_own_process(own) if apart else printed(run(own))
