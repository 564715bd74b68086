"""What DeepSpeed's monitor writes of a run, and what it must write by definition."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.integers import IntegerModel, build, train, weights

STEPS = 4


def watched(rank: int, settings: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """Trains with every second step measured; the weights."""
    monitor = {"enabled": True, "output_path": str(folder), "job_name": "run"}
    engine = build(rank, {**settings, "steps_per_print": 2, "csv_monitor": monitor})
    train(engine, rank, STEPS)
    found = weights(engine)
    engine.destroy()
    return found


def written(folder: Path) -> dict[str, list[float]]:
    """Name -> values over the steps, of what the CSV monitor wrote."""
    found = {}
    for file in (folder / "run").glob("Train_Muon_*.csv"):
        with file.open() as lines:
            found[file.stem.removeprefix("Train_Muon_")] = [float(value) for _, value in list(csv.reader(lines))[1:]]
    return found


def expected() -> list[dict[str, float]]:
    """The same sizes in one process by the definitions, from weights before and after each step that is measured."""
    from muon_plugin import Muon

    torch.manual_seed(7)
    model = IntegerModel()
    muon = Muon(model.named_parameters(), model=model, lr=0.01, weight_decay=0.1)
    sizes = []
    for step in range(STEPS):
        model(step, 0, 0, 1, 1).backward()
        for p in model.parameters():  # the engines fill in zeros
            p.grad = torch.zeros_like(p) if p.grad is None and p.requires_grad else p.grad
        before = {p: p.detach().double().clone() for p in model.parameters()}
        muon.step()
        found = {"gradient_norm": norm([p.grad for p in before if p.grad is not None])}
        found["zero_gradient_matrices"] = 1  # that of `unused`
        for group in muon.param_groups:
            name, members = group["name"], [p for p in group["params"] if p.requires_grad]
            updates = [(before[p] * (1 - 0.001) - p.detach().double()) / 0.01 for p in members]
            count = sum(p.numel() for p in members)
            momentum = "momentum_buffer" if group["use_muon"] else "exp_avg"
            found[f"update_rms_{name}"] = norm(updates) / math.sqrt(count)
            found[f"weight_rms_{name}"] = norm(members) / math.sqrt(count)
            found[f"momentum_norm_{name}"] = norm([muon.state[p][momentum] for p in members])
        sizes.append(found)
        model.zero_grad()
    return sizes[1::2]


def check_sizes(found: dict[str, list[float]]) -> None:
    """What the monitor wrote of a run in fp32 is what it is by definition."""
    shares = {"optimizer_share", "exchange_share"}
    for number, sizes in enumerate(expected()):
        assert sizes.keys() | shares == found.keys()
        for name, size in sizes.items():
            assert found[name][number] == pytest.approx(size, rel=1e-4), name
    assert all(0 < share < 1 for share in found["optimizer_share"])
    assert all(0 <= e < o for e, o in zip(found["exchange_share"], found["optimizer_share"]))


def norm(tensors: Any) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))
