"""The report of the paper's experiments, Markdown and PNG, out of logged runs; nothing is trained.

    python examples/paper/report.py                                     # docs/paper: what the repository shows
    python examples/paper/report.py --logged runs/paper/small.jsonl --out runs/paper/report

The experiments are asked for their runs again, as in run.py, and the logged results are looked up. An experiment whose
runs are not all there is left out, and the report says so.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import figures
import numpy as np
from experiments import EXPERIMENTS, MOMENTA, OPTIMIZERS, SCALES, SCALINGS, SHARES, UPDATE_RMS, Lab, loss_of
from trainer import Run

from muon_plugin.metrics import GROUPS, group_of

Results = dict[str, list[dict[str, Any]]]
ROOT = Path(__file__).resolve().parent.parent.parent
DRAWS = 2000
#: Table 8 and Table 1: train loss, validation loss, query weight RMS, MLP weight RMS.
TABLE_8 = {
    "AdamW": (3.512, 3.679, 1.01e-2, 1.25e-2),
    "Muon 0.05": (3.355, 3.503, 5.74e-3, 8.01e-3),
    "Muon 0.1": (3.239, 3.374, 8.44e-3, 1.27e-2),
    "Muon 0.2": (3.198, 3.325, 1.57e-2, 2.35e-2),
    "Muon 0.4": (3.199, 3.314, 2.95e-2, 4.51e-2),
    "Muon 0.8": (3.386, 3.543, 7.23e-2, 8.73e-2),
}
TABLE_1 = {
    "baseline": (2.734, 2.812, 3.586e-2, 2.52e-2),
    "update norm": (2.72, 2.789, 4.918e-2, 5.01e-2),
    "adjusted": (2.721, 2.789, 3.496e-2, 4.89e-2),
}
#: Table 6: MMLU, HumanEval, MBPP, GSM8K where both are Muon; GSM8K of the others.
TABLE_6 = "Muon to Muon 55.7 / 57.3 / 55.6 / 68.0; every other pair falls behind on GSM8K (62.1 to 64.9)"
#: In the captions of pictures that figures.py draws by its _curve.
BAND = "bands go from the least to the greatest seed"


class NotRunError(LookupError):
    """A run that an experiment needs is not among the logged ones."""


def main() -> None:
    """Reads the log, writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logged", type=Path, default=ROOT / "docs" / "paper" / "toy.jsonl", help="written by run.py")
    parser.add_argument("--notes", type=Path, default=ROOT / "docs" / "paper" / "notes.md", help="added as they are")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "paper", help="(default: %(default)s)")
    args = parser.parse_args()
    if not args.logged.exists():
        raise SystemExit(f"error: --logged {args.logged}: no such file; examples/paper/run.py writes one")
    head, *results = [json.loads(line) for line in args.logged.read_text().splitlines()]
    args.out.mkdir(parents=True, exist_ok=True)
    notes = args.notes.read_text() if args.notes.exists() and args.logged.parent == args.notes.parent else ""
    (args.out / "report.md").write_text(report(head, results, args.out, notes))
    print(f"{args.out / 'report.md'} is written")


def report(head: dict[str, Any], results: list[dict[str, Any]], out: Path, notes: str) -> str:
    """The whole text; pictures are drawn to `out`."""
    logged = {result["name"]: result for result in results}

    def look_up(runs: Sequence[Run]) -> list[dict[str, Any]]:
        if any(run.name not in logged for run in runs):
            raise NotRunError
        return [logged[run.name] for run in runs]

    parts, missing = [introduction(head, results), notes], []
    for name, section in SECTIONS.items():
        try:
            found = EXPERIMENTS[name](Lab(SCALES[head["scale"]], look_up))
        except NotRunError:
            missing.append(name)
            continue
        parts.append(section(found, out))
        if name == "scaling":
            parts.append(searches(results))
    if missing:
        command = f"python examples/paper/run.py --scale {head['scale']} --experiments {' '.join(missing)}"
        parts.append(f"## Not run at this scale, or not wholly\n\n    {command}")
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def introduction(head: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """What was run, on what, and how that differs from the paper."""
    scale, texts = SCALES[head["scale"]], head["texts"]
    sizes = sorted({r["parameters"] for r in results if r["config"]["kind"] == "llama"})
    versions = results[0]["versions"]
    return f"""# The paper's claims, checked: scale "{head["scale"]}"

Written by `examples/paper/report.py` out of {len(results)} logged runs
({", ".join(f"{name} {value}" for name, value in versions.items())}).

| | here | the paper |
|---|---|---|
| parameters, no embedding | {figures.short(sizes[0])} to {figures.short(sizes[-1])} | 399M to 1.5B (Table 2) |
| tokens a parameter | {scale.ratio:g} | 22 to 26 |
| context, vocabulary | {scale.sequence}, {scale.vocab} | 8192, not said |
| text | {texts["main"]["source"]}, {texts["main"]["train_tokens"]:,} tokens | the authors' |
| precision | {"fp32" if versions["device"] == "cpu" else "bf16"} and bf16 in Newton-Schulz | bf16 |
| seeds | {scale.seeds} | not said |

Models are Llama-like with heads = layers and hidden = {scale.unit} x layers (paper: 128 x layers). FLOPs are 6 N D as
in the paper; Newton-Schulz is left out of them, as there. Both optimizers have the same learning rate, weight decay
(0.1), batch, warm-up, cosine, initial weights and order of the data: what was searched was searched for AdamW. "±" is
the standard deviation over the seeds. Losses are in nats a token of held-out text."""


def mean_sd(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation, the mean alone where there is one value."""
    if not all(math.isfinite(value) for value in values):
        return "diverged"
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def losses(results: Sequence[dict[str, Any]]) -> list[float]:
    return [loss_of(result) for result in results]


def last(results: Sequence[dict[str, Any]], *keys: str) -> list[float]:
    """A value of the last point of each run."""
    found = []
    for result in results:
        value = result["points"][-1]
        for key in keys:
            value = value[key]
        found.append(value)
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def power_law(compute: Sequence[float], loss: Sequence[float]) -> tuple[float, float]:
    """(a, b) of loss = a compute^-b, by least squares of the logarithms."""
    slope, intercept = np.polyfit(np.log(compute), np.log(loss), 1)
    return float(np.exp(intercept)), float(-slope)


def flops_ratio(adamw: tuple[float, float], muon: tuple[float, float], compute: float) -> float:
    """Muon's compute over AdamW's where Muon's law gives the loss that AdamW's gives at `compute`."""
    target = adamw[0] * compute ** -adamw[1]
    return (muon[0] / target) ** (1 / muon[1]) / compute


def ratio_interval(points: dict[str, list[tuple[float, list[float]]]], compute: float) -> tuple[float, float]:
    """95% of the ratios over redrawn seeds (bootstrap within each size and optimizer)."""
    random = np.random.default_rng(0)
    ratios = []
    for _ in range(DRAWS):
        laws = {
            name: power_law(*zip(*[(c, np.mean(random.choice(some, len(some)))) for c, some in sizes]))
            for name, sizes in points.items()
        }
        ratios.append(flops_ratio(laws["AdamW"], laws["Muon"], compute))
    return float(np.quantile(ratios, 0.025)), float(np.quantile(ratios, 0.975))


def scaling(found: Results, out: Path) -> str:
    """Fig. 1a and 3, Tables 2 and 3."""
    points: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in OPTIMIZERS}
    rows = []
    for label, results in found.items():
        optimizer, layers = label.split()
        points[optimizer].append((results[0]["flops"], losses(results)))
        if optimizer == "Muon":
            c = results[0]["config"]
            both = [mean_sd(points[name][-1][1]) for name in OPTIMIZERS]
            size = [figures.short(results[0]["parameters"]), layers, c["hidden"], figures.short(c["tokens"])]
            rows.append([*size, c["lr"], c["batch"], f"{results[0]['flops']:.2e}", *both])
    laws = {name: power_law(*zip(*[(c, np.mean(some)) for c, some in points[name]])) for name in OPTIMIZERS}
    largest = points["AdamW"][-1][0]
    middle = math.exp(np.mean([math.log(c) for c, _ in points["AdamW"]]))
    figures.scaling(points, laws, out / "scaling.png")
    ratios = []
    for where, compute in (("largest", largest), ("geometric mean", middle)):
        low, high = ratio_interval(points, compute)
        ratio = flops_ratio(laws["AdamW"], laws["Muon"], compute)
        ratios.append([f"{where}: {compute:.2e} FLOPs", f"{ratio:.2f}", f"{low:.2f} to {high:.2f}"])
    header = ["N", "heads, layers", "hidden", "tokens", "learning rate", "batch", "FLOPs", *OPTIMIZERS]
    fits = [[o, f"{a:.3f} C^-{b:.4f}", p] for (o, (a, b)), p in zip(laws.items(), ("2.608 C^-0.054", "2.506 C^-0.052"))]
    return f"""## Scaling law (Fig. 1a and 3, Tables 2 and 3)

![loss over FLOPs of both optimizers](scaling.png)

*Lines: the fits below, drawn beyond the measured sizes. Markers: the seeds; AdamW's stand 3% to the left of their FLOPs
and Muon's 3% to the right, or one would hide the other. G is 1e9, T is 1e12.*

{table(header, rows)}

{table(["", "fit here (C in FLOPs)", "the paper's (C in PFLOP/s-days)"], fits)}

Muon's FLOPs over AdamW's at equal loss, by the fits; the interval is the bootstrap's over the seeds within each size
(with three seeds it is narrower than the truth). The paper has 0.519.

{table(["at AdamW's compute", "ratio", "95% interval"], ratios)}"""


def searches(results: list[dict[str, Any]]) -> str:
    """Every AdamW run of the search: by size, learning rate and batch."""
    rows = {}
    for result in sorted(results, key=lambda r: r["config"]["tokens"]):  # those with all tokens come last
        c = result["config"]
        searched = (c["optimizer"], c["kind"], c["seed"], c["text"], c["weight_decay"], c["start"], c["evaluations"])
        if searched == ("AdamW", "llama", 0, "main", 0.1, "", 8):
            rows[c["layers"], c["batch"], c["lr"]] = loss_of(result)
    best = {layers: min(v for (n, _, _), v in rows.items() if n == layers) for layers, _, _ in rows}
    lines = [
        [layers, batch, lr, f"**{loss:.4f}**" if loss == best[layers] else f"{loss:.4f}"]
        for (layers, batch, lr), loss in sorted(rows.items())
    ]
    return f"""<details><summary>AdamW's learning rates and batches: {len(lines)} runs, seed 0</summary>

It starts at the best of the next smaller size and steps by factors of 2 until no neighbour is better; the runs at four
times the batch are searched by themselves. Batches below `smallest_batch` in experiments.py are not taken.

{table(["layers", "batch", "learning rate", "validation loss"], lines)}

</details>"""


def shorter(found: Results, out: Path) -> str:
    """Muon with fewer tokens."""
    return f"""## The same model with fewer tokens

A direct measure of the same claim, without a fit: Muon trains with a share of AdamW's tokens, its cosine ending there.
{_shares(found, out / "shorter.png")}"""


def control(found: Results, out: Path) -> str:
    """AdamW with fewer tokens."""
    rows = []
    for layers in sorted({int(label.split()[1]) for label in found}):
        results = [found[f"AdamW {layers} {share:.0%}"] for share in SHARES]
        rows.append([figures.short(results[0][0]["parameters"]), *[mean_sd(losses(some)) for some in results]])
    return f"""## AdamW with the same shares

What fewer tokens cost AdamW. Where this row is flat, AdamW's last tokens bought nothing (a text that repeats, say), and
a saving of Muon's over it is no gain.

{table(["N", *[f"AdamW, {share:.0%}" for share in SHARES]], rows)}"""


def batch(found: Results, out: Path) -> str:
    """The same at a larger batch."""
    runs = [results[0]["config"] for label, results in found.items() if label.startswith("AdamW")]
    rates = ", ".join(f"{run['lr']:g} with {run['layers']} layers" for run in runs)
    return f"""## The same at four times the batch

{runs[0]["batch"]} sequences, {runs[0]["batch"] * runs[0]["sequence"]:,} tokens a step. AdamW's rate is searched
again at this batch (with seed 0): {rates}. AdamW itself may be worse here than at its best batch; see the search.
{_shares(found, out / "batch.png")}"""


def _shares(found: Results, picture: Path) -> str:
    """Verdict, picture and table of Muon with shares of AdamW's tokens."""
    sizes = sorted({int(label.split()[1]) for label in found})
    rows, verdicts, curves = [], [], {}
    for layers in sizes:
        target = losses(found[f"AdamW {layers}"])
        muon = np.array([losses(found[f"Muon {layers} {share:.0%}"]) for share in SHARES])
        curves[layers] = muon, target
        crossings = [figures.crossing(np.log(SHARES), muon[:, seed], target[seed]) for seed in range(len(target))]
        measured = [math.exp(x) for x in crossings if x is not None]
        below = sum(muon[0, seed] < loss for seed, loss in enumerate(target) if crossings[seed] is None)
        n = figures.short(found[f"AdamW {layers}"][0]["parameters"])
        if len(measured) == len(target):
            verdicts.append(f"**N = {n}: Muon has AdamW's final loss at {mean_sd(measured, 2)} of its FLOPs.**")
        else:
            seeds = [f"{x:.2f}" for x in sorted(measured)]
            seeds += [f"below {SHARES[0]:.2f}"] * below + ["not within 1.00"] * (len(target) - len(measured) - below)
            verdicts.append(
                f"**N = {n}: Muon has AdamW's final loss at {', '.join(seeds)} of its FLOPs**, seed by seed."
            )
        means = [mean_sd(row) for row in muon]
        rows.append([n, mean_sd(target), *means])
    figures.shorter(SHARES, curves, picture)
    text = "\n".join(verdicts)
    return f"""{text}
The paper has 0.519 by its fits. Seed by seed, on straight lines over the logarithm of the share.

![loss over the share of tokens]({picture.name})

*A colour is a seed: the same initial weights and order of the data. Solid: Muon with shares of AdamW's tokens; dashed:
AdamW with all of them. Where Muon's line crosses the dashed one of its colour is that seed's share.*

{table(["N", "AdamW", *[f"Muon, {share:.0%}" for share in SHARES]], rows)}"""


def _weights_table(found: Results, paper: dict[str, tuple[float, ...]], names: Sequence[str]) -> str:
    rows = []
    for name in names:
        results = found[name]
        weights = [f"{np.mean(last(results, 'weight_rms', role)):.3g}" for role in ("query", "mlp")]
        update = (
            f"{np.mean(last(results, 'update_rms', 'query')):.2f}, {np.mean(last(results, 'update_rms', 'mlp')):.2f}"
        )
        rows.append([name, mean_sd(last(results, "loss")), mean_sd(losses(results)), *weights, update])
        rows[-1].append(" / ".join(f"{value:g}" for value in paper[name]))
    header = [
        "",
        "train loss",
        "validation loss",
        "query RMS",
        "MLP RMS",
        "last update's RMS: query, MLP",
        "the paper's",
    ]
    return table(header, rows)


def _best(found: Results, names: Sequence[str]) -> str:
    """Which is best, and from which the seeds do not tell it apart: a seed has one start and one order of the data."""
    means = {name: np.mean(losses(found[name])) for name in names}
    best = min(means, key=means.__getitem__)
    behind = {name: np.subtract(losses(found[name]), losses(found[best])) for name in names if name != best}
    tied = [name for name, gaps in behind.items() if len(gaps) < 2 or np.mean(gaps) <= np.std(gaps, ddof=1)]
    by = ", ".join(f"{name} by {mean_sd(gaps)}" for name, gaps in behind.items())
    told = f"; the seeds do not tell it apart from {' and '.join(tied)}" if tied else ""
    return f"Best is {best}{told} (behind it, seed by seed: {by})."


def sweep(found: Results, out: Path) -> str:
    """Table 8."""
    names = [f"Muon {rms}" for rms in UPDATE_RMS]
    figures.sweep(UPDATE_RMS, [losses(found[name]) for name in names], losses(found["AdamW"]), out / "sweep.png")
    return f"""## The update's RMS (Table 8)

{_best(found, names)} The paper takes 0.2 (0.4 is its best by 0.011 on validation, 0.2 by 0.001 in
training). The update's RMS is measured in the last step, without the decay, over the learning rate.

![loss over the update's RMS](sweep.png)

*Muon: the line is the mean, the markers are the seeds. AdamW: the line is the mean, the band goes from the least to the
greatest seed. A x B is the shape of a matrix.*

{_weights_table(found, TABLE_8, ["AdamW", *names])}"""


def scalings(found: Results, out: Path) -> str:
    """Table 1."""
    return f"""## Three ways to scale the update (Table 1)

The MLP is widened to [H, 4H], so that one scale for all matrices is wrong for some; a quarter of
the tokens. {_best(found, SCALINGS)} The paper:
update norm and adjusted are equal and better than the baseline, whose MLP weights stay small.

{_weights_table(found, TABLE_1, SCALINGS)}"""


def decay(found: Results, out: Path) -> str:
    """Fig. 2, gamma."""
    figures.decay(found, out / "decay.png")
    roles = ("query", "mlp", "gamma")
    rows = []
    for label, results in found.items():
        weights = [f"{np.mean(last(results, 'weight_rms', role)):.3g}" for role in roles]
        norms = [f"{np.mean(last(results, 'grad_norm')):.2f}", f"{np.max(last(results, 'grad_norm_max')):.1f}"]
        rows.append([label, mean_sd(losses(results)), *weights, *norms])
    run = next(iter(found.values()))[0]
    header = ["", "validation loss", "query RMS", "MLP RMS", "gamma RMS", "gradient norm, late", "its maximum, late"]
    return f"""## Weight decay in the over-trained regime (Fig. 2), gamma, gradient norm

N = {figures.short(run["parameters"])}, {figures.short(run["config"]["tokens"])} tokens:
{run["config"]["tokens"] / run["parameters"]:.0f} a parameter (the paper: 800M, 100B, 125 a parameter).
{_best(found, list(found))}
The paper: without decay Muon is ahead at first, weights grow, and with decay it is ahead in the end. "Late" is the last
twentieth.

![validation loss, weight RMS, gamma and gradient norm over tokens](decay.png)

*Lines are means over the seeds, {BAND}. The first losses
are above the panel; the dots at the end are measured on more windows than the lines, as in the table. RMS and norm have
no unit.*

{table(header, rows)}"""


def spectra(found: Results, out: Path) -> str:
    """Fig. 4, appendix F."""
    figures.entropy(found, out / "entropy.png")
    figures.singular(found, out / "singular.png")
    pairs = list(zip(found["Muon"], found["AdamW"]))
    rows = []
    above = []
    for group in GROUPS:
        names = [name for name in pairs[0][0]["points"][-1]["entropy"] if group_of(name) == group]
        if not names:
            continue
        ends = {o: [[r["points"][-1]["entropy"][n] for n in names] for r in found[o]] for o in OPTIMIZERS}
        wins = [a > b for muon, adamw in zip(ends["Muon"], ends["AdamW"]) for a, b in zip(muon, adamw)]
        above += wins
        means = [mean_sd(np.mean(ends[o], axis=1), 4) for o in OPTIMIZERS]
        rows.append([group, len(names), *means, f"{np.mean(wins):.0%}"])
    finals = [f"{o} {mean_sd(losses(found[o]))}" for o in OPTIMIZERS]
    return f"""## Spectra of a mixture of experts (Fig. 4, appendix F)

DeepSeek-V3's layers: latent attention, the first layer dense, 8 routed experts of which 2 see a token, one shared, a
sigmoid router balanced by Moonlight's rule; 0.3 of the dense model's ratio of tokens. Validation loss:
{", ".join(finals)}.
**At the end Muon's SVD entropy is above AdamW's in {np.mean(above):.0%} of the matrices** (over all seeds; the
paper: over 90% at every checkpoint, the router most of all).

![SVD entropy by group over tokens](entropy.png)

*Lines are means over the seeds of the mean over a group's matrices, {BAND}, some of
them narrower than the line.*

{table(["group", "matrices", *[f"{o}'s entropy" for o in OPTIMIZERS], "Muon above"], rows)}

![singular values over the largest, by group](singular.png)

*A line is a matrix, at the end of seed 0's run.*"""


def attention(found: Results, out: Path) -> str:
    """Fig. 7."""
    figures.attention(found, out / "attention.png")
    rows = []
    for name, results in found.items():
        peak = [max(max(point["max_logit"]) for point in r["points"]) for r in results]
        share = max(point["large_logits"] for r in results for point in r["points"])
        rows.append([name, mean_sd(peak, 1), mean_sd([max(v) for v in last(results, "max_logit")], 1), f"{share:.1e}"])
    return f"""## Attention logits (Fig. 7)

The largest model of the scaling law, on {len(found["Muon"])} seeds; logits of four validation sequences. The paper:
with Muon they went past 100 early in Moonlight's training, at a share of about 1e-4, and fell later.

![maximum attention logit by layer over tokens](attention.png)

*Lines are means over the seeds, {BAND}. Left: a line a layer; bands of layers overlap.
Logits and norm have no unit.*

{table(["", "largest of the run", "largest at the end", "share above 100, at most"], rows)}"""


def heads(found: Results, out: Path) -> str:
    """Whole projections against heads."""
    rows = []
    for layers in sorted({int(label.split()[1]) for label in found}):
        whole, parted = found[f"whole {layers}"], found[f"per-head {layers}"]
        size, width = figures.short(whole[0]["parameters"]), whole[0]["config"]["hidden"]
        count = whole[0]["config"]["heads"]
        behind = mean_sd(np.subtract(losses(parted), losses(whole)).tolist())
        logits = [mean_sd([max(v) for v in last(results, "max_logit")], 1) for results in (whole, parted)]
        shapes = f"{count} of {width // count} x {width}"
        rows.append([size, shapes, mean_sd(losses(whole)), mean_sd(losses(parted)), behind, *logits])
    header = ["N", "heads", "whole", "per-head", "per-head - whole, seed by seed", "largest logit: whole", "per-head"]
    return f"""## Attention head by head (not in the paper)

`per_head_muon` orthogonalizes each head of query, key and value by itself; the output projection stays whole. Learning
rate, decay, batch, tokens and seeds are those of the scaling law. A head of h x H has the scale of H x H (Eq. 4 takes
the longer side), so both updates have the same RMS. Validation loss; logits are those at the end.

{table(header, rows)}"""


def momentum(found: Results, out: Path) -> str:
    """The momentum in fp32 against bf16."""
    rows = []
    for layers in sorted({int(label.split()[1]) for label in found}):
        wide, narrow = (found[f"{dtype} {layers}"] for dtype in MOMENTA)
        size, steps = figures.short(wide[0]["parameters"]), wide[0]["points"][-1]["step"]
        behind = mean_sd(np.subtract(losses(narrow), losses(wide)).tolist(), 4)
        rows.append([size, steps, mean_sd(losses(wide), 4), mean_sd(losses(narrow), 4), behind])
    header = ["N", "steps", "fp32", "bf16", "bf16 - fp32, seed by seed"]
    return f"""## The momentum in bf16 (not in the paper)

With `momentum_dtype` "bf16" the momentum is kept in 2 bytes an element between steps, and rounded up or down at random
so that its mean is exact. Learning rate, decay, batch, tokens and seeds are those of the scaling law. Validation loss.

{table(header, rows)}"""


def finetune(found: Results, out: Path) -> str:
    """Table 6."""
    rows = [
        [before, *[mean_sd(losses(found[f"{before} to {after}"])) for after in OPTIMIZERS]] for before in OPTIMIZERS
    ]
    run = found["AdamW to AdamW"][0]["config"]
    return f"""## Another optimizer for fine-tuning (Table 6)

The models of the middle size, fine-tuned on another text (C++ headers where the first was Python, unless --shifted) for
{figures.short(run["tokens"])} tokens at learning rate {run["lr"]:g}, searched for AdamW to AdamW.
Validation loss on the second text. {_best(found, list(found))} The paper measures benchmarks instead: {TABLE_6}.

{table(["pretrained with", *[f"fine-tuned with {o}" for o in OPTIMIZERS]], rows)}"""


SECTIONS: dict[str, Callable[[Results, Path], str]] = {
    f.__name__: f
    for f in (scaling, shorter, control, batch, sweep, scalings, decay, spectra, attention, heads, momentum, finetune)
}

if __name__ == "__main__":
    main()
