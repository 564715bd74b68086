"""Trains a small Llama on the tokens that data.py prepared, with DeepSpeed ZeRO-1 and one optimizer.

    torchrun --nproc-per-node 2 examples/llama/train.py --optimizer Muon --data runs/llama/data --out runs/llama/Muon

compare.py prepares the data and runs this once with AdamW and once with Muon. Everything but the optimizer block of
the DeepSpeed config is the same in both: the initial weights, the order of the data, the learning rate schedule.

Written to --out: metrics.jsonl, train.log (all that is printed, on one node), config.json (the DeepSpeed config as
used), checkpoint/ and tensorboard/. SIGUSR1 makes it save and stop after the step, on all ranks, with exit code 0:
torchrun takes any other code for a crash. --resume auto goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import TextIO

# The example is sized for a CPU and gives the same comparison with or without a GPU in the machine. To train on GPUs,
# set DS_ACCELERATOR=cuda and start one process for each.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import data
import deepspeed
import numpy as np
import resume
import torch
import transformers
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

VAL_WINDOWS = 64  # validation examples: 16,384 tokens, a fixed set


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=["AdamW", "Muon"], default="Muon")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.001, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps in all (default: %(default)s)")
    parser.add_argument("--eval-every", type=int, default=20, help="steps from one validation to the next")
    resume.add_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="initial weights and order of the data")
    parser.add_argument("--data", type=Path, default=Path("runs/llama/data"), help="folder that data.py prepared")
    parser.add_argument("--out", type=Path, default=Path("runs/llama/Muon"), help="folder for all that is written")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("zero1.json"))
    return parser.parse_args()


def send_output_to(log: Path) -> TextIO:
    """Sends all that this process prints (from C++, too) to `log`; returns the terminal, for the progress bar.

    On several nodes it stays where it is: the launcher keeps a log for each, and appending to one over NFS loses lines.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    terminal = os.fdopen(os.dup(2), "w")
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        return terminal
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # append: all ranks write to the same file
    os.dup2(file, 1)
    os.dup2(file, 2)
    return terminal


def multiplies_bf16() -> bool:
    """Whether the devices of all processes have instructions for bf16. Collective."""
    on_cpu = get_accelerator().device_name() == "cpu"
    here = not on_cpu or (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return mean_over_ranks(torch.tensor(float(here), device=get_accelerator().current_device_name())) == 1


def deepspeed_config(args: argparse.Namespace, terminal: TextIO) -> dict:
    """Reads the JSON config and fills in what the command line and the devices decide."""
    config = json.loads(args.config.read_text())
    if config.get("bf16", {}).get("enabled") and not multiplies_bf16():
        config["bf16"]["enabled"] = False  # torch would multiply element by element: hours for what takes minutes
        if dist.get_rank() == 0:
            print("These CPUs have no instructions for bf16: training in fp32.", file=terminal, flush=True)
    config["optimizer"] = {"type": args.optimizer, "params": {"lr": args.lr, "weight_decay": args.weight_decay}}
    if args.optimizer == "AdamW":
        # betas: usual for language models, and what Muon uses for the parameters it leaves to AdamW.
        # torch_adam: PyTorch's AdamW; DeepSpeed's own would have to be compiled first.
        config["optimizer"]["params"].update(betas=[0.9, 0.95], torch_adam=True)
    config["scheduler"]["params"].update(total_num_steps=args.steps, warmup_num_steps=max(2, args.steps // 10))
    config["tensorboard"]["output_path"] = str(args.out)
    return config


def make_model(vocab_size: int, hidden: int) -> LlamaForCausalLM:
    """A Llama with random weights, 5 million parameters at hidden 256; grouped-query attention as in Llama 3."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=data.SEQUENCE,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


def as_batch(windows: np.ndarray) -> torch.Tensor:
    """Copies token windows to the device as the int64 ids that the model wants."""
    device = get_accelerator().current_device_name()
    return torch.from_numpy(windows.astype(np.int64)).to(device)


def mean_over_ranks(value: torch.Tensor) -> float:
    """Averages a scalar over all processes."""
    value = value.detach().float()
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


@torch.no_grad()
def validate(engine: deepspeed.DeepSpeedEngine, windows: np.ndarray, batch_size: int) -> float:
    """Loss on the validation windows; each rank takes its share of them."""
    engine.eval()
    mine = windows[dist.get_rank() :: dist.get_world_size()]
    losses = []
    for i in range(0, len(mine), batch_size):
        batch = as_batch(mine[i : i + batch_size])
        losses.append(engine(input_ids=batch, labels=batch).loss.float() * len(batch))
    engine.train()
    return mean_over_ranks(torch.stack(losses).sum() / len(mine))


class Metrics:
    """Writes one JSON line for each step, on rank 0; a resumed run keeps the lines up to its checkpoint."""

    def __init__(self, file: Path, start: int) -> None:
        self.seconds = 0.0  # spent in training steps, validation left out
        self.file = None
        if dist.get_rank() == 0:
            self.file, self.seconds = resume.open_metrics(file, start)

    def write(self, **values: float) -> None:
        """Writes and flushes, so that the file can be followed while the run goes on."""
        if self.file:
            print(json.dumps(values), file=self.file, flush=True)


def train(args: argparse.Namespace, terminal: TextIO) -> None:
    """One training run."""
    info = json.loads((args.data / "info.json").read_text()) if (args.data / "info.json").exists() else {}
    config = deepspeed_config(args, terminal)
    transformers.set_seed(args.seed)  # the same initial weights on every rank and for both optimizers
    model = make_model(info.get("vocab_size", data.VOCAB_SIZE), args.hidden)
    engine, _, _, scheduler = deepspeed.initialize(model=model, config=config)

    # The batch size of the config is that of all ranks together: the run is the same one for any number of them.
    batch_size, micro_batch = engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()
    windows = data.load_windows(args.data, "train", batch_size)
    val_windows = data.spread(data.load_windows(args.data, "val", batch_size), VAL_WINDOWS, dist.get_world_size())
    order = np.random.default_rng(args.seed).permutation(len(windows))

    saved = args.out / "checkpoint"
    checkpoint = resume.newest(saved, args.resume)
    if checkpoint and engine.load_checkpoint(saved, tag=checkpoint.name)[0] is None:
        raise RuntimeError(f"{checkpoint}: complete, but DeepSpeed cannot load it. Delete it to go further back.")
    start = engine.global_steps
    stop = resume.StopSignal()
    is_main = dist.get_rank() == 0
    if is_main:
        (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    dist.barrier()
    metrics = Metrics(args.out / "metrics.jsonl", start)
    bar = tqdm(
        total=args.steps,
        initial=start,
        desc=f"{args.optimizer:5}",
        unit="step",
        file=terminal,
        disable=not is_main,
        dynamic_ncols=True,
        mininterval=0.5 if terminal.isatty() else 30,
    )

    val_loss = math.nan
    for step in range(start + 1, args.steps + 1):
        # Step and rank decide the batch, so that a resumed run goes on where the first one stopped.
        places = np.arange((step - 1) * batch_size, step * batch_size) % len(order)
        batch = as_batch(windows[order[places[dist.get_rank() :: dist.get_world_size()]]])
        lr = scheduler.optimizer.param_groups[0]["lr"]

        began = time.perf_counter()
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        mean_loss = mean_over_ranks(loss)
        seconds = time.perf_counter() - began
        if not math.isfinite(mean_loss):
            raise FloatingPointError(f"the loss is {mean_loss} at step {step}; try an --lr below {args.lr}")

        metrics.seconds += seconds
        values = {
            "step": step,
            "tokens": step * batch_size * data.SEQUENCE,
            "loss": mean_loss,
            "lr": lr,
            "grad_norm": float(engine.get_global_grad_norm()),
            "seconds": metrics.seconds,
        }
        if step % args.eval_every == 0 or step == args.steps:
            val_loss = values["val_loss"] = validate(engine, val_windows, micro_batch)
        metrics.write(**values)
        if engine.monitor.enabled:
            engine.monitor.write_events(
                [
                    (f"Train/Samples/{name}", values[name], engine.global_samples)
                    for name in ("loss", "val_loss", "grad_norm")
                    if name in values
                ]
            )
        bar.set_postfix_str(
            f"loss {mean_loss:.3f}, validation {val_loss:.3f}, {batch_size * data.SEQUENCE / seconds:,.0f} tokens/s",
            refresh=False,
        )
        bar.update()
        stopping = stop.on_any_rank(get_accelerator().current_device_name())
        if step == args.steps or stopping or (args.save_every and step % args.save_every == 0):
            checkpoint = resume.emptied(saved / f"global_step{step}")
            engine.save_checkpoint(saved, tag=checkpoint.name)
            resume.completed(checkpoint, args.keep)
        if stopping and step < args.steps:
            if is_main:
                bar.write(f"stopped by SIGUSR1: saved after step {step} of {args.steps}", file=terminal)
            break
    bar.close()


@record  # lets torchrun show the traceback of the rank that failed
def main() -> None:
    """Sets up the process and trains."""
    args = parse_args()
    terminal = send_output_to(args.out / "train.log")
    transformers.logging.set_verbosity_error()
    if args.optimizer == "Muon":
        # These two lines are all that a training script needs for {"optimizer": {"type": "Muon", ...}}.
        import muon_plugin

        muon_plugin.register()
    # On a CPU, DeepSpeed compiles an operator for inference when it starts. Training does not use it, and without it
    # the example needs no C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    on_cpu = get_accelerator().device_name() == "cpu"
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
    deepspeed.init_distributed("gloo" if on_cpu else get_accelerator().communication_backend_name())
    train(args, terminal)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
