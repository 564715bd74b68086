"""What DeepSpeed's wrapped functions do instead; each gets the original first, then its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..agreement import agree, together, world_of
from ..optimizer import Muon
from ..settings import Settings
from .shards import holdings


def set_optimizer_flags(original: Callable[..., Any], config_class: Any, model: Any) -> None:
    if config_class.optimizer_name != "muon":
        original(config_class, model)
        return
    together(lambda: Settings.from_dict(config_class.optimizer_params or {}))
    agree(
        "the model",
        [f"{name} {list(p.shape)} {p.dtype}" for name, p in model.named_parameters()],
        "Build the same model from the same configuration on every rank",
    )


def _configure_basic_optimizer(original: Callable[..., Any], engine: Any, model_parameters: Any) -> Any:
    if not _asks_for_muon(engine):
        return original(engine, model_parameters)

    def prepare() -> tuple[list[Any], dict[str, Any]]:
        _check_supported(engine)
        return _named(model_parameters, engine.param_names), dict(engine.optimizer_params() or {})

    params, options = together(prepare)
    return Muon(params, model=engine.module, engine="deepspeed", **options)


def _configure_optimizer(
    original: Callable[..., Any], engine: Any, client_optimizer: Any, model_parameters: Any
) -> None:
    if isinstance(client_optimizer, Muon):
        together(lambda: _check_supported(engine))
        client_optimizer.detach()
    original(engine, client_optimizer, model_parameters)
    muon = engine.basic_optimizer
    if not isinstance(muon, Muon):
        return
    muon.attach(together(lambda: holdings(engine, engine.param_names)))
    if world_of(None)[0] == 0:
        print(muon.summary(), flush=True)


def _asks_for_muon(engine: Any) -> bool:
    return engine.client_optimizer is None and engine.optimizer_name() == "muon"


def _named(model_parameters: Iterable[Any], names: Any) -> list[Any]:
    """The client's parameters or groups, with their names in the model."""

    def pair(p: Any) -> tuple[str, Any]:
        if p not in names:
            raise ValueError(
                f"model_parameters holds a parameter of shape {list(p.shape)} that the model given to "
                "deepspeed.initialize does not have; allowed: parameters of that model"
            )
        return names[p], p

    given = list(model_parameters)
    if given and isinstance(given[0], dict):
        return [{**group, "params": [pair(p) for p in group["params"]]} for group in given]
    return [pair(p) for p in given]


def _check_supported(engine: Any) -> None:
    """Refuses what this Muon cannot do yet, before anything is built.

    Raises:
        ValueError: with the setting, its value and what is supported.
    """
    config = engine._config
    zero = config.zero_config
    offloads = {name: _device(getattr(zero, name)) for name in ("offload_optimizer", "offload_param")}
    refused = {
        "zero_optimization.stage": (zero.stage > 2, int(zero.stage), "0, 1 or 2"),
        **{f"zero_optimization.{name}.device": (on != "none", on, "none") for name, on in offloads.items()},
        "zero_optimization.elastic_checkpoint": (zero.elastic_checkpoint, True, "false"),
        "zero_optimization.zenflow": (getattr(zero, "zenflow", None) is not None, "set", "not set"),
        "tensor_parallel.autotp_size": (engine.autotp_size() > 1, engine.autotp_size(), "0 or 1"),
        "mpu (model parallel size)": (engine.mp_world_size > 1, engine.mp_world_size, "1"),
        "sequence_parallel_size": (engine.sequence_parallel_size > 1, engine.sequence_parallel_size, "1"),
        "model with deepspeed.moe layers": (engine.has_moe_layers, True, "dense models"),
        "PipelineModule": (engine.pipeline_parallelism, True, "models without pipeline stages"),
        "torch_autocast": (engine.torch_autocast_enabled(), True, "bf16 or fp16 by their own sections"),
    }
    for setting, (is_set, value, supported) in refused.items():
        if is_set:
            raise ValueError(f"{setting}={value!r} is not supported by muon_plugin's Muon; supported: {supported}")


def _device(offload: Any) -> str:
    """Where an offload section sends its tensors; its device is an enum or, in some releases, a plain string."""
    device = getattr(offload, "device", "none")
    return str(getattr(device, "value", device))
