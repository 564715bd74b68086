"""Releases of torch: what older ones lack, and where what is compiled for one of them is kept.

python -m tests.support.torch_releases      # compiles DeepSpeed's AdamW for the torch that Python finds
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

#: For tests that compare with it; the plugin itself does not need it.
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is in torch 2.9 and later")


def extensions() -> Path:
    """Where `make test` compiles DeepSpeed's kernels: beside the torch that they are for, which no other can load."""
    return Path(torch.__file__).parents[1] / "torch_extensions"


if __name__ == "__main__":
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions())
    from deepspeed.ops.op_builder import FusedAdamBuilder

    FusedAdamBuilder().load(verbose=False)
