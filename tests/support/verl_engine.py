"""verl's own MegatronEngine in two workers of Ray, on the CPU over gloo: a small Llama of transformers.

    python -m tests.support.verl_engine muon OUT [--offload]

The model in OUT/model is trained with AdamW or with Muon. Leaves in OUT the weights before the first step, after it and
at the end, and the losses.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

WORLD, STEPS, LR, DECAY = 2, 6, 0.01, 0.1


def worker(rank: int, optimizer: str, out: Path, offload: bool) -> dict[str, Any]:
    """One rank: what verl's workers do, without a rollout."""
    import torch.distributed as dist

    from tests.support import megatron_bridge

    megatron_bridge.install()
    dist.init_process_group("gloo", f"file://{out}/store_{optimizer}_{offload}", rank=rank, world_size=WORLD)
    import verl  # noqa: F401  imports what VERL_USE_EXTERNAL_MODULES names
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from verl.trainer.config import CheckpointConfig
    from verl.utils import tensordict_utils
    from verl.workers.config import HFModelConfig, McoreEngineConfig, McoreOptimizerConfig
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead
    from verl.workers.utils.losses import sft_loss

    forward = DotProductAttention.forward  # wants another mask than Transformer Engine's, which verl makes
    DotProductAttention.forward = lambda self, q, k, v, mask, *args, **kw: forward(self, q, k, v, None, *args, **kw)
    if offload:  # what is moved to another device is another tensor
        to = torch.Tensor.to
        torch.Tensor.to = lambda self, *args, **kwargs: to(self, *args, **kwargs).clone()  # type: ignore[method-assign]
    engine = MegatronEngineWithLMHead(
        HFModelConfig(path=str(out / "model"), use_remove_padding=False),
        McoreEngineConfig(
            sequence_parallel=False,
            use_remove_padding=False,
            optimizer_offload=offload,
            override_transformer_config={**megatron_bridge.plain(), "attention_backend": None},
        ),
        McoreOptimizerConfig(
            optimizer=optimizer,
            lr=LR,
            weight_decay=DECAY,
            lr_decay_style="constant",
            total_training_steps=STEPS,
            override_optimizer_config={"adam_beta2": 0.95},  # verl does not hand its betas on
            **(megatron_bridge.PAPER if optimizer == "muon" else {}),
        ),
        CheckpointConfig(),
    )
    engine.initialize()
    how = {"use_remove_padding": False, "use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2, "temperature": 1.0}
    jagged = partial(torch.nested.as_nested_tensor, layout=torch.jagged)
    rows = [torch.tensor([(7 * row + 3 * i) % 61 + 3 for i in range(16)]) for row in range(4 * rank, 4 * rank + 4)]
    weights, losses = [_weights(engine)], []
    for step in range(STEPS):
        ones, positions = [torch.ones(16, dtype=torch.long)] * 4, [torch.arange(16)] * 4
        batch = {"input_ids": jagged(rows), "position_ids": jagged(positions), "loss_mask": jagged(ones)}
        with engine.train_mode():
            found = engine.train_batch(tensordict_utils.get_tensordict(batch, how), partial(sft_loss, None))
            engine.lr_scheduler_step()
        losses.append(sum(found["loss"]))
        if step in (0, STEPS - 1):
            weights.append(_weights(engine))
    return {"weights": weights, "losses": losses}


def _weights(engine: Any) -> dict[str, torch.Tensor]:
    (model,) = engine.module
    return {name: p.detach().float().clone() for name, p in model.named_parameters()}


def main(optimizer: str, out: Path, *options: str) -> None:
    # As `+ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES=muon_plugin.autoregister`.
    variables = {"VERL_USE_EXTERNAL_MODULES": "muon_plugin.autoregister", "PYTHONPATH": os.environ["PYTHONPATH"]}
    ray.init(num_cpus=WORLD, include_dashboard=False, runtime_env={"env_vars": variables})
    run = ray.remote(worker)
    found = ray.get([run.remote(rank, optimizer, out, "--offload" in options) for rank in range(WORLD)])
    torch.save(found[0], out / f"{optimizer}{''.join(options)}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
