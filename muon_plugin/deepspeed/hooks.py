"""Muon under DeepSpeed: `register` makes ``"optimizer": {"type": "Muon"}`` mean this Muon.

DeepSpeed's functions are wrapped only here, and the wrappers, but for the last, act only when the config asks for Muon:

- ``deepspeed.set_optimizer_flags`` would tag parameters for DeepSpeed's own Muon, which runs in the gradient path. The
  wrapper does not.
- ``DeepSpeedEngine._configure_distributed_model``: before it, the wrapper checks that all ranks of the engine (`ranks`)
  have valid settings and the same model. (The engine's broadcast of the model hangs or crashes if they differ.)
- ``DeepSpeedEngine._configure_basic_optimizer``: the wrapper builds this Muon in place of DeepSpeed's own.
- ``DeepSpeedEngine._configure_optimizer``: once DeepSpeed's own wrapper (ZeRO, bf16, fp16 or none) has sharded the
  parameters, ours reads where the shards are (`shards`) and attaches the optimizer to them.
- ``_load_universal_checkpoint`` of ZeRO's optimizers: the wrapper reads this Muon's shards and state (`checkpoints`).
- ``DeepSpeedEngine._get_all_ckpt_names``: the wrapper finds a universal checkpoint's files whichever stage saved it.
- ``DeepSpeedEngine.load_checkpoint``: the wrapper refuses what this run cannot read (`other_layouts`, `swapping`),
  makes weights load without state at every stage (`weights_only`), and restores state on NVMe (`swapping`).
- ``zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint``: the wrapper reads the tag that was asked for then.
- ``DeepSpeedEngine.get_mom``: the wrapper reports Muon's momentum, where DeepSpeed looks for Adam's betas (`monitor`).
- ``DeepSpeedZeroOptimizer_Stage3.offload_states`` rejects any optimizer but FusedAdam; the wrapper allows this one.
- ``OpBuilder.jit_load``: the wrapper says that an operator is compiled, or waits for a lock (`compiling`).

Some things are set on an engine that trains with Muon, and on no other. While ZeRO's wrapper is built, Muon is in the
place of DeepSpeedCPUAdam (`cpu_adam`). The stages of a pipeline take part in the same sums of norms (`pipeline`). What
follows its step is called after it (`steps`). With the optimizer on NVMe, its checkpoints hold no buffers (`swapping`).
"""

from __future__ import annotations

from ..core.hooks import Hook, Hooks

TESTED = ("0.18.9", "0.19.8")
LOAD_CHECKPOINT = ["self", "load_dir", "tag", "load_module_strict", "load_optimizer_states"]
LOAD_CHECKPOINT += ["load_lr_scheduler_states", "load_module_only", "custom_load_fn"]
_hooks = Hooks("DeepSpeed", TESTED)


def register() -> None:
    """Wraps DeepSpeed's functions. Idempotent.

    Raises:
        ImportError: if DeepSpeed is not installed.
        RuntimeError: if a function to wrap has another signature than expected.
    """
    if _hooks.installed:
        return
    import deepspeed
    from deepspeed.ops.op_builder.builder import OpBuilder
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    from deepspeed.utils import zero_to_fp32

    from ..core.muon import Muon
    from . import checkpoints, compiling, engine, monitor, weights_only

    if hasattr(DeepSpeedEngine, "_configure_stock_optimizer"):
        return  # patches/deepspeed-*.patch: the source calls `engine` itself
    hooks = [
        Hook(deepspeed, "set_optimizer_flags", ["config_class", "model"], engine.set_optimizer_flags),
        Hook(
            DeepSpeedEngine,
            "_configure_distributed_model",
            ["self", "model"],
            engine._configure_distributed_model,
        ),
        Hook(
            DeepSpeedEngine,
            "_configure_basic_optimizer",
            ["self", "model_parameters"],
            engine._configure_basic_optimizer,
        ),
        Hook(
            DeepSpeedEngine,
            "_configure_optimizer",
            ["self", "client_optimizer", "model_parameters"],
            engine._configure_optimizer,
        ),
        Hook(
            DeepSpeedEngine,
            "_get_all_ckpt_names",
            ["self", "checkpoints_path", "tag"],
            checkpoints.get_all_ckpt_names,
        ),
        Hook(
            DeepSpeedEngine,
            "load_checkpoint",
            LOAD_CHECKPOINT,
            weights_only.load_checkpoint,
        ),
        Hook(
            zero_to_fp32,
            "get_fp32_state_dict_from_zero_checkpoint",
            ["checkpoint_dir", "tag", "exclude_frozen_parameters", "lazy_mode"],
            weights_only.read_zero_3,
        ),
        Hook(OpBuilder, "jit_load", ["self", "verbose"], compiling.jit_load),
        Hook(DeepSpeedEngine, "get_mom", ["self"], monitor.get_mom),
        Hook(
            DeepSpeedZeroOptimizer_Stage3,
            "offload_states",
            ["self", "include", "device", "pin_memory", "non_blocking"],
            checkpoints.offload_states,
        ),
        *(
            Hook(
                wrapper,
                "_load_universal_checkpoint",
                ["self", "checkpoint_folder", "load_optimizer_states", "load_from_fp32_weights"],
                checkpoints.load_universal_checkpoint,
            )
            for wrapper in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer)
        ),
    ]
    _hooks.install(deepspeed.__version__, hooks)
    ZERO_SUPPORTED_OPTIMIZERS.append(Muon)


def unregister() -> None:
    """Restores DeepSpeed's own functions."""
    if not _hooks.installed:
        return
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    from ..core.muon import Muon

    _hooks.remove()
    if Muon in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.remove(Muon)
