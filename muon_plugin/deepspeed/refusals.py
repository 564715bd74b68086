"""What this Muon cannot work with under DeepSpeed, checked before anything is built."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.lr_schedules import WarmupLR

from ..core.checks import Refusal, refuse


def check_supported(engine: Any) -> None:
    """Refuses the settings of a DeepSpeedEngine that Muon cannot work with.

    Raises:
        ValueError: with the setting, its value and what is supported.
    """
    refuse(refusals(engine))


def refusals(engine: Any) -> list[Refusal]:
    """All that is checked, whether it is set or not. docs/refused.md has them in this order.

    What this machine lacks comes last: nobody installs it for a combination that is refused on every machine.
    """
    zero = engine._config.zero_config
    return [
        *_offload(zero),
        _momentum(engine, zero),
        *_zero(zero),
        *_experts(engine),
        *_precision(engine),
        *_universal(engine),
        *_gradients_left_out(engine),
        *_one_rate_schedulers(engine),
        _cycled_momentum(engine),
        _asynchronous_io(zero),
    ]


def _offload(zero: Any) -> list[Refusal]:
    """SuperOffload, which steps with an optimizer of its own, and what cannot work on NVMe.

    Stages 1 and 2 take "nvme" for "cpu", in silence.
    """
    optimizer, section = zero.offload_optimizer, "zero_optimization.offload_optimizer"
    super_offload = getattr(optimizer, "super_offload", False)
    on_nvme = _on_nvme(zero)
    pipelined = "offload_optimizer" in on_nvme and (optimizer.pipeline_read or optimizer.pipeline_write)
    old = (deepspeed.__version_major__, deepspeed.__version_minor__) < (0, 19)
    return [
        Refusal(f"{section}.super_offload", True, super_offload, "false: it steps with a DeepSpeedCPUAdam of its own"),
        # Not tried: the tests' CPUs cannot run this swapper.
        Refusal(f"{section}.pipeline_read or pipeline_write", True, pipelined and old, "false, or DeepSpeed 0.19"),
        Refusal(
            f"{_nvme_setting(zero)} with stage {int(zero.stage)}",
            "nvme",
            bool(on_nvme) and zero.stage < 3,
            "nvme in stage 3, or cpu",
        ),
    ]


def _asynchronous_io(zero: Any) -> Refusal:
    """DeepSpeed compiles its access to NVMe at first use."""
    without = bool(_on_nvme(zero)) and zero.stage == 3 and not AsyncIOBuilder().is_compatible()
    advice = "cpu, or nvme once DeepSpeed can build async_io (apt install libaio-dev)"
    return Refusal(_nvme_setting(zero), "nvme", without, advice)


def _momentum(engine: Any, zero: Any) -> Refusal:
    """The swapper's buffers are fp32."""
    own = getattr(getattr(engine, "client_optimizer", None), "settings", None)
    dtype = own.momentum_dtype if own is not None else (engine.optimizer_params() or {}).get("momentum_dtype", "fp32")
    return Refusal("momentum_dtype with offload to NVMe", "bf16", dtype == "bf16" and bool(_on_nvme(zero)), "fp32")


def _zero(zero: Any) -> list[Refusal]:
    """Elastic checkpoints are saved without the step that loading looks for, unless the optimizer keeps it in its
    groups, as DeepSpeed's AdamW does not. Stage 3 has none.

    ZenFlow steps the gradients that it selects with an AdamW of its own. MiCS is refused for the sake of the promise
    that nothing is computed twice.
    """
    mics = getattr(zero, "mics_shard_size", -1)  # until 0.18
    replicas = "not set: its replicas would compute every matrix again"
    zenflow = getattr(zero, "zenflow", None) is not None
    return [
        Refusal(
            "zero_optimization.elastic_checkpoint",
            True,
            zero.elastic_checkpoint,
            "false: what DeepSpeed saves so it cannot load, with its AdamW either; for another number of ranks make a "
            "universal checkpoint (python -m muon_plugin.deepspeed.convert)",
        ),
        Refusal("zero_optimization.mics_shard_size", mics, mics > 0, replicas),
        Refusal(
            "zero_optimization.zenflow", "set", zenflow, "not set: it steps some gradients with an AdamW of its own"
        ),
    ]


def _experts(engine: Any) -> list[Refusal]:
    """DeepSpeed asserts that stage 3 has no ``deepspeed.moe`` layers. AutoEP over TP was not tried."""
    auto_ep = bool(getattr(getattr(engine._config, "expert_parallel_config", None), "enabled", False))
    native = engine.has_moe_layers and not auto_ep and engine._config.zero_config.stage > 2
    tp = engine.autotp_size() if auto_ep else 1
    return [
        Refusal(
            "deepspeed.moe layers with zero_optimization.stage",
            3,
            native,
            "0, 1 or 2, or AutoEP: DeepSpeed itself refuses them in stage 3",
        ),
        Refusal("tensor_parallel.autotp_size with expert_parallel (AutoEP)", tp, tp > 1, "1"),
    ]


def _precision(engine: Any) -> list[Refusal]:
    """DeepSpeed asserts that masters of 16 bits whose moments are fp32 are offloaded.

    Under ZeRO, a step whose gradients overflow in fp16 autocast is left out before torch's loss scaler is asked, so the
    scale is never lowered and no further step is made; and gradients are clipped while the scale is in them. Before
    0.19 the scaler is asked group by group and on each rank alone. (Stage 0 asks it once.)
    """
    scaled = engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16
    ways = "bfloat16, stage 0, or the section fp16 in its place: ZeRO never lowers this loss scale"
    in_bf16, in_fp16 = engine.bf16_master_weights_and_gradients(), engine.fp16_master_weights_and_gradients()
    here = _device(engine._config.zero_config.offload_optimizer) == "none"
    offload, without = "with zero_optimization.offload_optimizer", "_master_weights_and_grads without offload"
    bf16 = in_bf16 and here and not engine.bf16_optimizer_states()
    return [
        Refusal(f"bf16.bf16{without}", True, bf16, f"true with bf16_optimizer_states, or {offload}"),
        Refusal(f"fp16.fp16{without}", True, in_fp16 and here, f"true {offload}"),
        Refusal("torch_autocast.dtype with ZeRO", "float16", scaled and engine._config.zero_config.stage > 0, ways),
    ]


def _universal(engine: Any) -> list[Refusal]:
    """Without ZeRO DeepSpeed reads no weights of a universal checkpoint; on NVMe our shards cannot be filled."""
    loads, zero, setting = _loads(engine), engine._config.zero_config, "checkpoint.load_universal"
    stages = "1, 2 or 3: DeepSpeed does not restore universal checkpoints without ZeRO"
    return [
        Refusal(f"{setting} with zero_optimization.stage", 0, loads and zero.stage == 0, stages),
        Refusal(f"{setting} with offload to NVMe", True, loads and bool(_on_nvme(zero)), "offload to the CPU, or none"),
    ]


def _loads(engine: Any) -> bool:
    return bool(engine.load_universal_checkpoint())


def _gradients_left_out(engine: Any) -> list[Refusal]:
    """Before 0.19, BF16_Optimizer adds the last micro-batch after the average over ranks (DeepSpeed #7985)."""
    if (deepspeed.__version_major__, deepspeed.__version_minor__) >= (0, 19):
        return []
    bf16, wide = engine._config.bfloat16_config, engine.get_data_types()[1] == torch.float32
    left_out = bf16.enabled and wide and engine._config.zero_config.stage == 1 and not bf16.immediate_grad_update
    advice = (
        "it with bf16.immediate_grad_update, stage 2, or DeepSpeed 0.19: without, each rank's last micro-batch stays "
        "out of the average"
    )
    return [Refusal("data_types.grad_accum_dtype with stage 1", "fp32", left_out, advice)]


def _one_rate_schedulers(engine: Any) -> list[Refusal]:
    """Schedulers of DeepSpeed's that set one learning rate for all groups, over muon_lr and adam_lr."""
    options, name = engine.optimizer_params() or {}, engine.scheduler_name()
    schedule = engine.scheduler_params() or {}
    ends = {"WarmupLR": "warmup_max_lr", "WarmupDecayLR": "warmup_max_lr", "OneCycle": "cycle_max_lr"}
    end = schedule.get(ends.get(name))
    own = isinstance(end, list) or (name == "WarmupLR" and end is None and _warms_up_to_each_rate())
    overrides = name in {*ends, "LRRangeTest"} and not own
    advice = f"it without the scheduler {name}, which sets one rate for all"
    return [Refusal(key, options.get(key), overrides and key in options, advice) for key in ("muon_lr", "adam_lr")]


def _cycled_momentum(engine: Any) -> Refusal:
    """OneCycle writes Adam's betas into every group, and leaves momentum as it is for an optimizer without them."""
    params = engine.scheduler_params() or {}
    value = params.get("cycle_momentum", True)
    cycles = engine.scheduler_name() == "OneCycle" and bool(value)
    default = "" if "cycle_momentum" in params else " (DeepSpeed's default)"
    return Refusal(
        f"scheduler.params.cycle_momentum{default}", value, cycles, "false: OneCycle cycles Adam's betas only"
    )


def _warms_up_to_each_rate() -> bool:
    """Whether WarmupLR without warmup_max_lr ends at each group's own rate (from #8171 on), or at the first group's."""
    rates = [1.0, 2.0]
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return bool(WarmupLR(torch.optim.SGD(groups)).max_lrs == rates)


def _on_nvme(zero: Any) -> list[str]:
    """Which of ZeRO's offload sections send their tensors to NVMe."""
    return [name for name in ("offload_optimizer", "offload_param") if _device(getattr(zero, name)) == "nvme"]


def _nvme_setting(zero: Any) -> str:
    """The setting that sends tensors to NVMe, or would."""
    return f"zero_optimization.{next(iter(_on_nvme(zero)), 'offload_optimizer')}.device"


def _device(offload: Any) -> str:
    """Where an offload section sends its tensors; its device is an enum or, in some releases, a plain string."""
    device = getattr(offload, "device", "none")
    return str(getattr(device, "value", device))
