"""Which learning rate low-rank adapters need with Muon and with AdamW, over ranks and models; all weights beside them.

    python benchmarks/lora_rates.py --out benchmarks/results/lora_rates

Pretrains small Llamas with AdamW on the source of Python's own library, byte by byte, then adapts them to English prose
(its own topics of help) for 150 steps with each optimizer at each rate. Half an hour on 2 cores; runs that the
.jsonl file has are not repeated, and processes with other --widths may share it. It needs transformers and peft.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muon_plugin import Muon

WIDTHS, RANKS = (64, 128), (4, 16, 64, None)
OPTIMIZERS = ("AdamW", "Muon")
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BATCH, LENGTH, STEPS, PRETRAINING = 4, 128, 150, 1000
HEAD = """Loss (nats a byte) on text that was held out, after {steps} steps with a rate that falls linearly to 0.
Before: {before}.
LoRA on all linear layers of the blocks with alpha = 2 r and weight decay 0; rank "all": every weight is trained, with
weight decay 0.1. The best rate of a row is bold.

"""


@dataclass(frozen=True)
class Run:
    """One fine-tuning: the model's hidden size, the adapters' rank (None: no adapters), the optimizer and its rate."""

    width: int
    rank: int | None
    optimizer: str
    rate: float


def code() -> Tensor:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return as_tokens(b"".join(file.read_bytes() for file in files))


def prose() -> Tensor:
    from pydoc_data.topics import topics

    return as_tokens("\n".join(topics[name] for name in sorted(topics)).encode())


def as_tokens(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What is trained on, and the last tenth."""
    at = len(tokens) * 9 // 10
    return tokens[:at], tokens[at:]


def batches(tokens: Tensor, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=generator)
        yield torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


@torch.no_grad()
def held_out(model: Any, tokens: Tensor) -> float:
    model.eval()
    losses = [float(loss_of(model, batch)) for batch, _ in zip(batches(tokens, 1), range(16))]
    model.train()
    return sum(losses) / len(losses)


def train(model: Any, optimizer: torch.optim.Optimizer, tokens: Tensor, steps: int) -> None:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for tokens_of_step, _ in zip(batches(tokens, 0), range(steps)):
        loss_of(model, tokens_of_step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@cache
def pretrained(width: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 32 * 32,
        num_hidden_layers=4,
        num_attention_heads=width // 32,
        max_position_embeddings=LENGTH,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    train(model, torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1), split(code())[0], PRETRAINING)
    return config, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def fresh(width: int) -> Any:
    from transformers import LlamaForCausalLM

    config, weights = pretrained(width)
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    return model


def tuned(run: Run) -> float:
    """The loss at the end."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)  # of the adapters' first values
    model = fresh(run.width)
    if run.rank is not None:
        model = get_peft_model(model, LoraConfig(r=run.rank, lora_alpha=2 * run.rank, target_modules="all-linear"))
    decay = 0.0 if run.rank is not None else 0.1
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if run.optimizer == "Muon":
        optimizer: torch.optim.Optimizer = Muon(trained, model=model, lr=run.rate, weight_decay=decay)
    else:
        optimizer = torch.optim.AdamW([p for _, p in trained], lr=run.rate, betas=(0.9, 0.95), weight_decay=decay)
    mine, others = split(prose())
    train(model, optimizer, mine, STEPS)
    return held_out(model, others)


def table(found: dict[Run, float], before: dict[int, float]) -> str:
    shown = ", ".join(f"{loss:.2f} at width {width}" for width, loss in before.items())
    rows = [
        f"| width | rank | optimizer | {' | '.join(f'{rate:g}' for rate in RATES)} |",
        "|---:|---:|---|" + "---:|" * len(RATES),
    ]
    for width in WIDTHS:
        for rank in RANKS:
            for optimizer in OPTIMIZERS:
                losses = [found.get(Run(width, rank, optimizer, rate), math.nan) for rate in RATES]
                best = min(losses)
                cells = [f"**{loss:.2f}**" if loss == best else f"{loss:.2f}" for loss in losses]
                rows.append(f"| {width} | {rank or 'all'} | {optimizer} | {' | '.join(cells)} |")
    return HEAD.format(steps=STEPS, before=shown) + "\n".join(rows) + "\n"


def read(log: Path) -> tuple[dict[Run, float], dict[int, float]]:
    """The loss at the end of each run, and that of each width before."""
    logged = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    found = {Run(**each["run"]): each["loss"] for each in logged if "run" in each}
    return found, {each["width"]: each["before"] for each in logged if "before" in each}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="without its ending: a .jsonl and a .md file")
    parser.add_argument("--widths", type=int, nargs="+", choices=WIDTHS, default=WIDTHS, help="hidden sizes to run")
    args = parser.parse_args()
    log = args.out.with_suffix(".jsonl")
    found, before = read(log)
    with log.open("a") as file:

        def write(**values: Any) -> None:
            print(json.dumps(values), file=file, flush=True)
            print(values, file=sys.stderr, flush=True)

        for width in args.widths:
            if width not in before:
                write(width=width, before=held_out(fresh(width), split(prose())[1]))
            for run in (Run(width, *each) for each in product(RANKS, OPTIMIZERS, RATES)):
                if run not in found:
                    write(run=asdict(run), loss=tuned(run))
    args.out.with_suffix(".md").write_text(table(*read(log)))


if __name__ == "__main__":
    main()
