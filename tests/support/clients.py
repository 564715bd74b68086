"""What users of Hugging Face write: `Trainer` and `accelerate` scripts with Muon in a DeepSpeed JSON full of "auto".

    torchrun --nproc-per-node 2 -m muon_plugin tests/support/clients.py trainer OUT
    deepspeed --num_gpus 2 --module muon_plugin tests/support/clients.py trainer OUT --resume

Trains a tiny Llama at each of ZeRO 1, 2 and 3, or goes on from the checkpoint that a first call left at half of the
steps, and leaves in OUT what deepspeed/test_clients.py compares.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from tests.support.client_runs import CASES, STEPS
from tests.support.hugging_face import settings
from tests.support.integers import weights


class Text(torch.utils.data.Dataset):
    """Five sequences that a model can learn, over and over."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(16) * (index % 5 + 1) % 50
        return {"input_ids": ids, "labels": ids}


def llama() -> Any:
    """Random weights; under ZeRO-3, Hugging Face builds it inside ``zero.Init``."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )


def trainer(
    out: Path, stage: int, dtype: str, scheduler: bool, resume: bool
) -> tuple[Any, dict[str, Any], list[float]]:
    """The engine, the JSON as Hugging Face filled it, the loss of each step."""
    # A rate for each half, where Hugging Face's scheduler scales both (DeepSpeed's would set one for all).
    halves = {} if scheduler else {"muon_lr": 0.02, "adam_lr": 0.005}
    arguments = TrainingArguments(
        str(out),
        use_cpu=True,
        deepspeed=settings(stage, scheduler=scheduler, betas="auto", eps="auto", **halves),
        max_steps=STEPS,
        save_steps=STEPS // 2,
        logging_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        weight_decay=0.1,
        adam_beta2=0.95,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        bf16=dtype == "bf16",
        fp16=dtype == "fp16",
        report_to=[],
        disable_tqdm=True,
    )
    client = Trainer(model_init=llama, args=arguments, train_dataset=Text())
    client.train(resume_from_checkpoint=f"{out}/checkpoint-{STEPS // 2}" if resume else None)
    losses = [entry["loss"] for entry in client.state.log_history if "loss" in entry]
    return client.model_wrapped, client.accelerator.deepspeed_plugin.deepspeed_config, losses


def accelerate(
    out: Path, stage: int, dtype: str, scheduler: bool, resume: bool
) -> tuple[Any, dict[str, Any], list[float]]:
    """The same, from a training loop of the user's own."""
    PartialState(cpu=True)
    plugin = DeepSpeedPlugin(hf_ds_config=settings(stage, scheduler=scheduler))
    client = Accelerator(deepspeed_plugin=plugin, mixed_precision=dtype, gradient_accumulation_steps=2)
    model = llama()
    vectors = [p for name, p in model.named_parameters() if "norm" in name]
    rest = [p for name, p in model.named_parameters() if "norm" not in name]
    optimizer = DummyOptim([{"params": rest}, {"params": vectors, "weight_decay": 0.0}], lr=0.01, weight_decay=0.1)
    if scheduler:
        schedule = DummyScheduler(optimizer, total_num_steps=STEPS * client.num_processes, warmup_num_steps=2)
    else:
        schedule = DummyScheduler(optimizer, lr_scheduler_callable=cosine)
    data = DataLoader(Text(), batch_size=4)
    model, optimizer, schedule, data = client.prepare(model, optimizer, schedule, data)
    if resume:
        client.load_state(str(out))
    losses = []
    for epoch in range(int(resume), 2):  # of four steps each
        for batch in data:
            with client.accumulate(model):
                loss = model(**batch).loss
                client.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(float(client.gather(loss.detach().float()).mean()))
        if epoch == 0:
            client.save_state(str(out))
    return model, client.deepspeed_plugin.deepspeed_config, losses


def cosine(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("client", choices=["trainer", "accelerate"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--register", action="store_true", help="from the script, not from the command line")
    parser.add_argument("--local_rank", help="DeepSpeed's launcher gives it")
    arguments = parser.parse_args()
    client, out, resume = globals()[arguments.client], arguments.out, arguments.resume
    if arguments.register:
        import muon_plugin

        muon_plugin.register()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at start otherwise, for inference alone
    # CPUs without fp16 instructions compute it in software: slow, but the same numbers. DeepSpeed says no by default.
    get_accelerator().is_fp16_supported = lambda: True
    # accelerate asks DeepSpeed for its process group on GPUs alone, and zero.Init counts one process without it.
    deepspeed.init_distributed("gloo")
    for stage, (dtype, scheduler) in CASES.items():
        engine, config, losses = client(out / str(stage), stage, dtype, scheduler, resume)
        found = {
            "optimizer": f"{type(engine.basic_optimizer).__module__}.{type(engine.basic_optimizer).__name__}",
            "stage": engine.zero_optimization_stage(),
            "params": config["optimizer"]["params"],
            "groups": [
                {key: group.get(key) for key in ("use_muon", "lr", "initial_lr", "weight_decay")}
                for group in engine.basic_optimizer.param_groups
            ],
            "losses": losses,
            "weights": weights(engine),
        }
        if torch.distributed.get_rank() == 0:
            torch.save(found, out / f"{stage}-{'resumed' if resume else 'whole'}.pt")
        engine.destroy()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    sys.stdout.write("ended\n")
    time.sleep(1)  # see SCRIPT in deepspeed/test_engine.py


if __name__ == "__main__":
    main()
