"""Loads DeepSpeed's AdamW, which compiles it where that has not been done."""

from __future__ import annotations

import muon_plugin

if __name__ == "__main__":
    muon_plugin.register()
    from deepspeed.ops.op_builder import FusedAdamBuilder

    FusedAdamBuilder().load()
