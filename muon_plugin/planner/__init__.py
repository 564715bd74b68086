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

    Args:
        arguments: of the command, without its name.

    Raises:
        ValueError: for a bad argument, with its value and what is allowed.
        RuntimeError: if the subprocess fails.

    Examples:
        A matrix of 4096 x 4096 in each of 32 layers, on 8 ranks under ZeRO-1:

        >>> import json, pathlib, tempfile
        >>> from muon_plugin.planner import report
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "shapes.json"
        >>> _ = file.write_text(json.dumps({"layers.*.up.weight": {"shape": [4096, 4096], "count": 32}}))
        >>> found = json.loads(report(["--shapes", str(file), "--nodes", "1", "--gpus-per-node", "8", "--json"]))
        >>> found["ranks"], [call["matrices"] for call in found["stages"][0]["calls"]]
        (8, [32])
    """
    import torch.distributed as dist

    from .command import in_own_process, printed, run

    own = list(arguments)
    apart = "--megatron" in own or "--" in own or dist.is_initialized()
    return in_own_process(own) if apart else printed(run(own))
