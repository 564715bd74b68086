"""srun ... python ranks.py SCRIPT ... (or -m MODULE ...): one process a task, with the variables that torchrun sets.

MASTER_ADDR and MASTER_PORT come from the job script.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys

TORCHRUN_TO_SLURM = {
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
}

if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until the script's own handler stands
    missing = [name for name in (*TORCHRUN_TO_SLURM.values(), "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing or len(sys.argv) < 2:
        raise SystemExit(f"{__doc__}\nnot set: {', '.join(missing) or 'SCRIPT'}")
    os.environ |= {name: os.environ[slurm] for name, slurm in TORCHRUN_TO_SLURM.items()}
    module = sys.argv[1] == "-m"
    sys.argv = sys.argv[1 + module :]
    if module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")
