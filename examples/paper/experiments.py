"""The paper's experiments as lists of runs: what is trained at which scale, and what is compared with what.

An experiment asks a `Lab` for the results of runs: that of `run.py` trains, that of `report.py` looks them up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trainer import Run

Result = dict[str, Any]
OPTIMIZERS = ("AdamW", "Muon")
UPDATE_RMS = (0.05, 0.1, 0.2, 0.4, 0.8)
SHARES = (0.4, 0.52, 0.7, 1.0)
SCALINGS = ("baseline", "update norm", "adjusted")
HEADS = (("whole", False), ("per-head", True))
MOMENTA = ("fp32", "bf16")


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        unit: the hidden size is `unit` x layers, and there are as many heads as layers (paper: 128).
        layers: of the models of the scaling law.
        ratio: tokens for each parameter outside embedding and head.
        lr, batch: where the search for AdamW begins at the smallest model.
        middle: layers of the model of the other experiments; `overtrained`: of that one.
        micro_batch: sequences in one pass of one process.
        seeds: how many.
        tuned: layers -> (learning rate, batch) that were searched elsewhere: no search.
        tokens: layers -> tokens, instead of `ratio`.
        smallest_batch: where the search stops: below it steps are many and the hardware idles.
        limit: steps at most, for tests.
    """

    unit: int
    layers: tuple[int, ...]
    ratio: float
    vocab: int
    sequence: int
    lr: float
    batch: int
    middle: int
    overtrained: int
    micro_batch: int = 64
    seeds: int = 3
    tuned: dict[int, tuple[float, int]] = field(default_factory=dict)
    tokens: dict[int, float] = field(default_factory=dict)
    smallest_batch: int = 1
    limit: int = 10**9


SCALES = {
    "test": Scale(
        *(8, (1, 2), 10, 512, 32, 4e-3, 2, 2, 1),
        seeds=1,
        tuned={1: (4e-3, 2), 2: (4e-3, 2)},
        limit=2,
    ),
    "toy": Scale(16, (2, 3), 8, 512, 128, 8e-3, 8, 3, 2, smallest_batch=4),
    "small": Scale(32, (2, 3, 4), 20, 2048, 256, 4e-3, 16, 4, 3, smallest_batch=8),
    "medium": Scale(64, (4, 6, 8, 10), 20, 32768, 1024, 2e-3, 32, 8, 6, micro_batch=8),
    "paper": Scale(
        *(128, (12, 14, 16, 18, 20), 25, 65535, 8192, 9.503e-4, 96, 16, 16),
        micro_batch=1,
        tuned={12: (9.503e-4, 96), 14: (9.143e-4, 128), 16: (8.825e-4, 160), 18: (8.561e-4, 192), 20: (8.305e-4, 256)},
        tokens={12: 8.92e9, 14: 14.04e9, 16: 20.76e9, 18: 28.54e9, 20: 38.91e9},
    ),
}


@dataclass
class Lab:
    """A scale, and a way to the results of runs (`execute`: in the order of the runs) on a number of ranks together."""

    scale: Scale
    execute: Callable[[Sequence[Run]], list[Result]]
    ranks: int = 1

    def run(self, layers: int, kind: str = "llama", share: float = 1.0, **changes: Any) -> Run:
        """The run of a size, AdamW with seed 0 unless changed; `share` of its compute-optimal tokens."""
        scale, hidden = self.scale, self.scale.unit * layers
        lr, batch = scale.tuned.get(layers, (scale.lr, scale.batch))
        # A third of 8 hidden, in steps of 8, as Llama has it: with 4 hidden^2 in attention 12 hidden^2 a layer.
        intermediate = changes.pop("intermediate", max(8, round(hidden / 3) * 8))
        run = Run(
            *(kind, layers, layers, hidden, intermediate, scale.vocab, scale.sequence, "AdamW", lr, batch, 0, 0),
        )
        run = replace(run, **changes)
        tokens = share * scale.tokens.get(layers, scale.ratio * run.parameters)
        return replace(run, tokens=min(round(tokens), scale.limit * run.batch * run.sequence))

    def seeds(self, run: Run) -> list[Run]:
        return [replace(run, seed=seed) for seed in range(self.scale.seeds)]

    def compare(self, variants: dict[str, Run]) -> dict[str, list[Result]]:
        """Label -> the results of its run with every seed."""
        found = self.execute([run for variant in variants.values() for run in self.seeds(variant)])
        count = self.scale.seeds
        return {label: found[i * count : (i + 1) * count] for i, label in enumerate(variants)}

    def searched(self, layers: int) -> Run:
        """AdamW's run at the best learning rate and batch for a size; Muon takes both over.

        The search steps by factors of 2 from the best of the next smaller size until no neighbour is better.
        """
        scale = self.scale
        run = self.run(layers)
        if layers in scale.tuned:
            return run
        place = scale.layers.index(layers)
        if place:
            before = self.searched(scale.layers[place - 1])
            run = self.run(layers, lr=before.lr, batch=before.batch)
        return self.search(run, lambda lr, batch: self.run(layers, lr=lr, batch=batch), with_batch=True)

    def search(self, run: Run, make: Callable[[float, int], Run], with_batch: bool) -> Run:
        """Walks from `run` to a neighbour of lower loss, as long as there is one."""
        while True:
            around = [make(run.lr * factor, run.batch) for factor in (0.5, 2.0)]
            if with_batch:
                floor = max(self.scale.smallest_batch, self.ranks)
                around += [make(run.lr, size) for size in (run.batch // 2, run.batch * 2) if size >= floor]
            losses = [loss_of(result) for result in self.execute([run, *around])]
            best = min(range(len(losses)), key=losses.__getitem__)
            if best == 0:
                return run
            run = around[best - 1]


def loss_of(result: Result) -> float:
    """Validation loss at the end; infinite where the run diverged."""
    found = math.inf if result["diverged"] else result["points"][-1]["val_loss"]
    return found if math.isfinite(found) else math.inf


def scaling(lab: Lab) -> dict[str, Any]:
    """Fig. 1a and 3, Tables 2 and 3: loss over compute for a family of models, AdamW's settings for both optimizers."""
    best = {layers: lab.searched(layers) for layers in lab.scale.layers}
    variants = {f"{o} {layers}": replace(run, optimizer=o) for layers, run in best.items() for o in OPTIMIZERS}
    return lab.compare(variants)


def shorter(lab: Lab) -> dict[str, Any]:
    """Muon with a share of AdamW's tokens, the same model: at which share it has AdamW's loss."""
    return _shares(lab, [lab.searched(layers) for layers in _up_to_middle(lab)])


def control(lab: Lab) -> dict[str, Any]:
    """AdamW with the same shares: what fewer tokens alone cost."""
    tuned = [lab.searched(layers) for layers in _up_to_middle(lab)]
    return lab.compare(
        {f"AdamW {t.layers} {s:.0%}": lab.run(t.layers, share=s, lr=t.lr, batch=t.batch) for t in tuned for s in SHARES}
    )


def batch(lab: Lab) -> dict[str, Any]:
    """The same at four times the batch, AdamW's learning rate searched there again: whether the batch decides."""
    tuned = []
    for layers in _up_to_middle(lab):
        best = lab.searched(layers)

        def make(lr: float, batch: int, layers: int = layers) -> Run:
            return lab.run(layers, lr=lr, batch=batch)

        tuned.append(lab.search(make(best.lr, 4 * best.batch), make, with_batch=False))
    return _shares(lab, tuned)


def _up_to_middle(lab: Lab) -> list[int]:
    return [layers for layers in lab.scale.layers if layers <= lab.scale.middle]


def _shares(lab: Lab, tuned: Sequence[Run]) -> dict[str, Any]:
    variants: dict[str, Run] = {}
    for adamw in tuned:
        variants[f"AdamW {adamw.layers}"] = adamw
        for share in SHARES:
            muon = lab.run(adamw.layers, share=share, lr=adamw.lr, batch=adamw.batch, optimizer="Muon")
            variants[f"Muon {adamw.layers} {share:.0%}"] = muon
    return lab.compare(variants)


def sweep(lab: Lab) -> dict[str, Any]:
    """Table 8: the update's RMS."""
    adamw = lab.searched(lab.scale.middle)
    muon = {f"Muon {rms}": replace(adamw, optimizer="Muon", update_rms=rms) for rms in UPDATE_RMS}
    return lab.compare({"AdamW": adamw, **muon})


def scalings(lab: Lab) -> dict[str, Any]:
    """Table 1: three ways to scale the update, the MLP widened to [H, 4H]; a quarter of the compute-optimal tokens."""
    best = lab.searched(lab.scale.middle)
    wide = lab.run(
        best.layers, share=0.25, intermediate=4 * best.hidden, lr=best.lr, batch=best.batch, optimizer="Muon"
    )
    return lab.compare({scaling: replace(wide, scaling=scaling) for scaling in SCALINGS})


def decay(lab: Lab) -> dict[str, Any]:
    """Fig. 2: weight decay in the over-trained regime (four times the compute-optimal tokens); gamma's decay."""
    best = lab.searched(lab.scale.overtrained)
    long = lab.run(best.layers, share=4, lr=best.lr, batch=best.batch, evaluations=20)
    return lab.compare(
        {
            "AdamW": long,
            "Muon": replace(long, optimizer="Muon"),
            "Muon, no decay": replace(long, optimizer="Muon", weight_decay=0.0),
            "Muon, gamma not decayed": replace(long, optimizer="Muon", norm_decay=False),
        }
    )


def spectra(lab: Lab) -> dict[str, Any]:
    """Fig. 4 and appendix F: singular values of a mixture of experts, with the dense model's learning rate."""
    dense = lab.searched(lab.scale.middle)
    best = lab.run(dense.layers, "moe", share=0.3, lr=dense.lr, batch=dense.batch)
    return lab.compare({o: replace(best, optimizer=o) for o in OPTIMIZERS})


def attention(lab: Lab) -> dict[str, Any]:
    """Fig. 7: attention logits over training, of the largest model of the scaling law."""
    best = lab.searched(max(lab.scale.layers))
    return lab.compare({o: replace(best, optimizer=o) for o in OPTIMIZERS})


def heads(lab: Lab) -> dict[str, Any]:
    """Not in the paper: query, key and value orthogonalized head by head (`per_head_muon`) or whole, all else alike."""
    tuned = [replace(lab.searched(layers), optimizer="Muon") for layers in _up_to_middle(lab)]
    return lab.compare(
        {f"{how} {run.layers}": replace(run, per_head=per_head) for run in tuned for how, per_head in HEADS}
    )


def momentum(lab: Lab) -> dict[str, Any]:
    """Not in the paper: the momentum in bf16 between steps, rounded at random (`momentum_dtype`), all else alike."""
    tuned = [replace(lab.searched(layers), optimizer="Muon") for layers in _up_to_middle(lab)]
    return lab.compare({f"{dtype} {run.layers}": replace(run, momentum=dtype) for run in tuned for dtype in MOMENTA})


def finetune(lab: Lab) -> dict[str, Any]:
    """Table 6: pretrained with one optimizer, fine-tuned on another text with either; AdamW's rate searched."""
    best = lab.searched(lab.scale.middle)
    first = {o: lab.seeds(replace(best, optimizer=o)) for o in OPTIMIZERS}
    lab.execute([run for runs in first.values() for run in runs])
    fresh = lab.run(best.layers, share=0.2, lr=best.lr / 4, batch=best.batch, text="shifted", evaluations=4)

    def tuned(lr: float, batch: int) -> Run:
        return replace(fresh, lr=lr, batch=batch, start=first["AdamW"][0].name)

    lr = lab.search(tuned(fresh.lr, fresh.batch), tuned, with_batch=False).lr
    runs = {
        f"{before} to {after}": [
            replace(fresh, lr=lr, seed=r.seed, start=r.name, optimizer=after) for r in first[before]
        ]
        for before in OPTIMIZERS
        for after in OPTIMIZERS
    }
    found = iter(lab.execute([run for several in runs.values() for run in several]))
    return {label: [next(found) for _ in several] for label, several in runs.items()}


EXPERIMENTS = {
    f.__name__: f
    for f in (scaling, shorter, control, batch, sweep, scalings, decay, spectra, attention, heads, momentum, finetune)
}
