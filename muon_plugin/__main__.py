"""``python -m muon_plugin SCRIPT ...`` (or ``-m MODULE ...``): register with the installed engines, then run it.

For launchers: ``torchrun ... -m muon_plugin train.py ...``, ``deepspeed --module muon_plugin train.py ...``.
"""

from __future__ import annotations

import os
import runpy
import sys

from . import register

USAGE = "usage: python -m muon_plugin SCRIPT [ARGUMENT ...]\n       python -m muon_plugin -m MODULE [ARGUMENT ...]"


def main() -> None:
    arguments = sys.argv[1:]
    if arguments and arguments[0].startswith("--local_rank"):
        # The DeepSpeed launcher puts its own argument first; the script expects it among its arguments.
        arguments = arguments[1:] + arguments[:1]
    module = bool(arguments) and arguments[0] == "-m"
    target = arguments[module : module + 1]
    if target and target[0] in ("-h", "--help"):
        print(f"{USAGE}\n\n{__doc__}")
        return
    if not target:
        raise SystemExit(USAGE)
    if target[0].startswith("-"):
        raise SystemExit(f"{target[0]!r} is not a script or a module\n{USAGE}")
    if not module and not os.path.exists(target[0]):
        raise SystemExit(f"script {target[0]!r} does not exist (for a module: python -m muon_plugin -m {target[0]})")
    sys.argv = arguments[module:]
    # Before the engines are imported: a script in a source tree of Megatron means that tree.
    sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.abspath(target[0]))
    register()
    if module:
        runpy.run_module(target[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(target[0], run_name="__main__")


if __name__ == "__main__":
    main()
