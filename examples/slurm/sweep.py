"""The results of a sweep as one table: python examples/slurm/sweep.py OUTPUT

OUTPUT is that of the array's job: each task writes OUTPUT/lr_RATE/metrics.jsonl.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def last_values(file: Path) -> dict[str, float]:
    """Of each value, the last one; without the line that a running task is writing."""
    found: dict[str, float] = {}
    for line in (file.read_text() if file.exists() else "").rpartition("\n")[0].splitlines():
        found |= json.loads(line)
    return found


def table(output: Path) -> str:
    """A row for each learning rate, in their order.

    Raises:
        ValueError: if there is none.
    """
    tasks = sorted((float(folder.name[len("lr_") :]), folder) for folder in output.glob("lr_*"))
    if not tasks:
        raise ValueError(f"{output}: no folder lr_RATE in it; allowed: the OUTPUT of a job with --array and LRS")
    rows = [f"{'LR':>8}  {'steps':>7}  {'final loss':>10}  {'validation':>10}"]
    for rate, folder in tasks:
        last = last_values(folder / "metrics.jsonl")
        losses = (f"{last[name]:10.4f}" if name in last else f"{'-':>10}" for name in ("loss", "val_loss"))
        rows.append("  ".join([f"{rate:8g}", f"{last.get('step', 0):7d}", *losses]))
    return "\n".join(rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    try:
        print(table(Path(sys.argv[1])))
    except ValueError as error:
        raise SystemExit(str(error)) from None
