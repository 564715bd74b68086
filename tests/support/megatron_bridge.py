"""Megatron-Bridge's own `pretrain` on the CPU over gloo: a small Llama with AdamW or with Muon.

    torchrun --nproc-per-node 2 -m muon_plugin -m tests.support.megatron_bridge muon OUT

Leaves in OUT the weights before the first step, after it and at the end, and the losses.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch

from muon_plugin.megatron import on_cpu

STEPS, LR, DECAY = 8, 0.01, 0.1
#: The paper's, by the names of OptimizerConfig.
PAPER = {"muon_extra_scale_factor": 0.2, "muon_coefficient_type": "simple", "muon_nesterov": True}
#: What Megatron-Bridge imports and this run does not use: packages for GPUs, its multimodal data, restarts.
ABSENT = ("transformer_engine", "modelopt", "megatron.energon", "nvidia_resiliency_ext.inprocess")


class _Anything(types.ModuleType):
    """A module in which every name is found: a class if it has a capital, else something that does nothing."""

    __path__ = ()
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = type(name, (torch.nn.Module,), {}) if name[0].isupper() else _Anything(name)
        setattr(self, name, found)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> None: ...


class _Stand(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what is in `ABSENT`, with the packages around it and the modules in it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        around = any(f"{absent}.".startswith(f"{name}.") for absent in ABSENT)
        inside = name.startswith(tuple(f"{absent}." for absent in ABSENT))
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if around or inside else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def install() -> None:
    """Makes CUDA mean the CPU, and stands in for `ABSENT` after Megatron-Core has found that it is not there."""
    from tests.support.forks import MEGATRON, MEGATRON_TRAINING, _import
    from tests.support.megatron_pretrain import stand_in_for_cuda

    on_cpu.install()
    _import([*MEGATRON, *MEGATRON_TRAINING, "megatron.core.extensions.transformer_engine"])
    stand_in_for_cuda("megatron.bridge.training.initialize")
    sys.meta_path.insert(0, _Stand())


def plain() -> dict[str, Any]:
    """Settings of a model without Transformer Engine and without fused kernels."""
    from megatron.bridge.models.gpt_provider import local_layer_spec

    kinds = "gradient_accumulation masked_softmax bias_dropout bias_activation apply_rope cross_entropy_loss"
    off = dict.fromkeys(["persist_layer_norm", *(f"{kind}_fusion" for kind in kinds.split())], False)
    return {**off, "transformer_layer_spec": local_layer_spec, "use_cpu_initialization": True}


def recipe(optimizer: str) -> Any:
    """A recipe, as users write it."""
    from megatron.bridge.data.base import DatasetProvider
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.training import config
    from megatron.bridge.training.tokenizers.config import TokenizerConfig

    from tests.support.megatron_pretrain import SEQUENCE, VOCAB, Walks

    class Batches(Walks):
        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            beside = {"loss_mask": torch.ones(SEQUENCE), "position_ids": torch.arange(SEQUENCE)}
            return {**super().__getitem__(number), **beside}

    class Data(DatasetProvider):
        def build_datasets(self, context: Any) -> Any:
            return Batches(context.train_samples), None, None

    model = GPTModelProvider(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=80,
        num_attention_heads=4,
        num_query_groups=2,
        seq_length=SEQUENCE,
        vocab_size=VOCAB + 1,
        make_vocab_size_divisible_by=64,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        **plain(),
    )
    rates = {"lr": LR, "min_lr": LR, "weight_decay": DECAY, "adam_beta2": 0.95, "clip_grad": 0.0}
    decay = {"start_weight_decay": DECAY, "end_weight_decay": DECAY}
    return config.ConfigContainer(
        train=config.TrainingConfig(train_iters=STEPS, micro_batch_size=2, global_batch_size=4),
        validation=config.ValidationConfig(eval_iters=0, eval_interval=1000),
        model=model,
        # Only here: Megatron-Bridge sets it in the DDP configuration, too.
        optimizer=config.OptimizerConfig(
            optimizer=optimizer,
            use_distributed_optimizer=True,
            **rates,
            **(PAPER if optimizer == "muon" else {}),
        ),
        scheduler=config.SchedulerConfig(**decay, lr_decay_style="constant", lr_warmup_iters=0),
        ddp=config.DistributedDataParallelConfig(use_distributed_optimizer=False, grad_reduce_in_fp32=True),
        dataset=Data(num_workers=0, dataloader_type="single"),
        logger=config.LoggerConfig(log_interval=2),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCAB),
        checkpoint=config.CheckpointConfig(),
        dist=config.DistributedInitConfig(distributed_backend="gloo"),
        rng=config.RNGConfig(seed=1234),
    )


def main(optimizer: str, out: Path) -> None:
    install()
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    class Kept(Callback):
        def __init__(self) -> None:
            self.weights: list[dict[str, torch.Tensor]] = []
            self.losses: list[float] = []

        def keep(self, context: Any) -> None:
            (model,) = context.model
            self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})

        def on_train_start(self, context: Any) -> None:
            self.keep(context)

        def on_train_step_end(self, context: Any) -> None:
            self.losses.append(float(context.loss_dict["lm loss"]))
            if len(self.losses) in (1, STEPS):
                self.keep(context)

    kept = Kept()
    pretrain(recipe(optimizer), forward_step, [kept])
    if os.environ["RANK"] == "0":
        torch.save({"weights": kept.weights, "losses": kept.losses}, out / f"{optimizer}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
