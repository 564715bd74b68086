"""``python -m muon_plugin.planner``."""

from __future__ import annotations

import gc
import sys
import warnings

from .command import printed, run


def main() -> None:
    gc.disable()  # millions of small objects that live until the end
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # ten of Megatron's imports say what is not installed on a machine without GPUs
    try:
        text = printed(run(sys.argv[1:]))
    except ValueError as error:
        print(f"planner: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    print(text)


if __name__ == "__main__":
    main()
