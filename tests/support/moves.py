"""How far parameters move in each step of a run: by Muon's rule, by AdamW's, or not at all.

A matrix moves by an RMS of 0.2 learning rates (paper, Eq. 4). AdamW's first step is one learning rate in every element
that has a gradient. Both are counted after weight decay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.integers import weights

#: name -> the half that trains it ("muon", "adamw", or "frozen"), and the size of its update in each step.
Found = dict[str, tuple[str, list[float]]]


class Moves:
    """What one run's parameters do: call `before` and `after` around each step of the optimizer, on all ranks.

    Args:
        muon: attached to its tensors.
        read: returns the weights by name, in fp32 where there are such masters.
    """

    def __init__(self, muon: Any, read: Callable[[], dict[str, Tensor]]) -> None:
        self._muon, self._read = muon, read
        self._group_of = _groups(muon)
        matrices = {matrix.parameter for matrix in muon.routing.matrices}
        halves = {**dict.fromkeys(muon.routing.adamw, "adamw"), **dict.fromkeys(matrices, "muon")}
        self._last = read()
        self.found: Found = {name: (halves.get(name, "frozen"), []) for name in self._last}

    @classmethod
    def of(cls, engine: Any) -> Moves:
        """Those of a DeepSpeedEngine with Muon."""

        def read() -> dict[str, Tensor]:
            all_of_them = weights(engine)
            return {
                name: all_of_them.get(f"{name} (fp32)", all_of_them[name]) for name in all_of_them if name[-1] != ")"
            }

        return cls(engine.basic_optimizer, read)

    @classmethod
    def of_module(cls, muon: Any, module: torch.nn.Module) -> Moves:
        """Those of a module that a Muon without an engine trains."""
        return cls(muon, lambda: {name: p.detach().float().clone() for name, p in module.named_parameters()})

    def before(self) -> None:
        groups = self._muon.param_groups
        self._rates = {name: (groups[i]["lr"], groups[i]["weight_decay"]) for name, i in self._group_of.items()}

    def after(self) -> None:
        now = self._read()
        for name, (half, sizes) in self.found.items():
            rate, decay = self._rates.get(name, (0.0, 0.0))
            update = now[name].double() - self._last[name].double() * (1 - rate * decay)
            size = update.square().mean().sqrt() if half == "muon" else update.abs().max()
            sizes.append(float(size / (rate or 1.0)))
        self._last = now


def _groups(muon: Any) -> dict[str, int]:
    """Parameter -> the number of its group; each rank knows those of its own shards."""
    held = {shard.parameter: call.group for call in muon.calls for shard in call.shards}
    if torch.distributed.is_initialized():
        every: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(every, held)
        held = {name: group for of_rank in every for name, group in of_rank.items()}
    return held


def check(found: Found, rounding: float = 0.0, spread: float = 0.06) -> dict[str, list[str]]:
    """Every parameter has moved as its half should; returns the names of each half.

    Args:
        found: what `Moves` found.
        rounding: of weights without masters, in learning rates.
        spread: of the RMS of matrices, which Newton-Schulz brings near 0.2.
    """
    names: dict[str, list[str]] = {"muon": [], "adamw": [], "frozen": []}
    for name, (half, sizes) in found.items():
        names[half].append(name)
        if half == "frozen":
            assert set(sizes) == {0.0}, name
        elif half == "muon":
            # The first matrix of LoRA has no gradient as long as the second is zero.
            assert sizes[1:] == pytest.approx([0.2] * len(sizes[1:]), abs=spread), name
            assert sizes[0] == pytest.approx(0.0 if "lora_A" in name else 0.2, abs=spread), name
        else:
            assert sizes[0] == pytest.approx(1.0, abs=0.02 + rounding), name
            assert min(sizes) > 0.05, (name, sizes)
    return names
