"""Which learning rate a small convolutional network needs with Muon and with AdamW.

    python benchmarks/convolution_rates.py --out benchmarks/results/convolution_rates

Trains a residual network of 3x3 convolutions on scikit-learn's handwritten digits (1,797 images of 8 x 8, of which the
last 600 are held out) for 300 steps with each optimizer at each rate, three seeds each. It takes five minutes on
one core and needs scikit-learn.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from muon_plugin import Muon

WIDTHS, SEEDS = (16,), (0, 1, 2)
OPTIMIZERS = ("AdamW", "Muon")
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BLOCKS, BATCH, STEPS, HELD_OUT = 3, 64, 300, 600
HEAD = f"""Loss (nats an image) on images that were held out, after {STEPS} steps with a rate that falls linearly to 0
and weight decay 0.1: the mean of three seeds and, in brackets, their range. The best rate of a row is bold.

"""


@dataclass(frozen=True)
class Run:
    """One training: channels of the network, the optimizer, its rate and the seed."""

    width: int
    optimizer: str
    rate: float
    seed: int


class Block(nn.Module):
    """Adds two convolutions of what comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.outer = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.outer(F.gelu(self.inner(self.norm(x))))
        return x + y


class Network(nn.Module):
    """(batch, 1, 8, 8) images to the scores of ten digits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(BLOCKS)))
        self.classifier = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.blocks(self.stem(x)).mean((2, 3)))
        return scores


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images, zero on average, and what they show."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    return images - images.mean(), torch.tensor(found.target)


def trained(run: Run) -> float:
    """The loss on what is held out, at the end."""
    images, targets = digits()
    torch.manual_seed(run.seed)
    model = Network(run.width)
    if run.optimizer == "Muon":
        named = model.named_parameters()
        optimizer: torch.optim.Optimizer = Muon(named, model=model, lr=run.rate, weight_decay=0.1)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=run.rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    for _ in range(STEPS):
        batch = torch.randint(len(images) - HELD_OUT, (BATCH,))
        F.cross_entropy(model(images[batch]), targets[batch]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float(F.cross_entropy(model(images[-HELD_OUT:]), targets[-HELD_OUT:]))


def table(found: dict[Run, float]) -> str:
    rows = [
        f"| channels | optimizer | {' | '.join(f'{rate:g}' for rate in RATES)} |",
        "|---:|---|" + "---:|" * len(RATES),
    ]
    for width, optimizer in product(WIDTHS, OPTIMIZERS):
        losses = [[found[Run(width, optimizer, rate, seed)] for seed in SEEDS] for rate in RATES]
        means = [statistics.mean(of_rate) if all(map(math.isfinite, of_rate)) else math.inf for of_rate in losses]
        cells = [f"{mean:.3f} ({min(of_rate):.3f} to {max(of_rate):.3f})" for mean, of_rate in zip(means, losses)]
        cells[means.index(min(means))] = f"**{cells[means.index(min(means))]}**"
        rows.append(f"| {width} | {optimizer} | {' | '.join(cells)} |")
    return HEAD + "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="without its ending: a .md file")
    args = parser.parse_args()
    found = {}
    for run in (Run(*each) for each in product(WIDTHS, OPTIMIZERS, RATES, SEEDS)):
        found[run] = trained(run)
        print(run, found[run], file=sys.stderr, flush=True)
    args.out.with_suffix(".md").write_text(table(found))


if __name__ == "__main__":
    main()
