"""Trains the same small Llama with AdamW and with Muon and compares them: the script behind `make train`.

    python examples/llama/compare.py

Prepares the data, trains once with each optimizer (same learning rate, weight decay, schedule, initial weights and
order of the data), and writes loss.png, result.json and result.md to --out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import data
import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws to a file, also where there is no screen
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
BATCH_SIZE = json.loads((HERE / "zero1.json").read_text())["train_batch_size"]
COLORS = {"AdamW": "C0", "Muon": "C1"}
plt.style.use(HERE.parent.parent / "muon_plugin" / "pictures.mplstyle")  # by its path: AdamW alone needs no package


def parse_args() -> argparse.Namespace:
    """Reads the command line and checks it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="text file or folder (default: the source of Python's own library)")
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps of each run (default: %(default)s)")
    # Chosen for AdamW alone; Muon takes it over as it is. AdamW's final validation loss over the 800 steps:
    # 4.613 with 0.0005, 4.445 with 0.001, 4.506 with 0.002 (and after 300 steps 5.533 with 0.004, the worst).
    parser.add_argument("--lr", type=float, default=0.001, help="peak learning rate of both (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of both (default: %(default)s)")
    parser.add_argument("--optimizers", nargs="+", choices=list(COLORS), default=list(COLORS), help="which to run")
    parser.add_argument("--nproc", type=int, default=2, help="processes to train with (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/llama"), help="output folder (default: %(default)s)")
    args = parser.parse_args()

    if args.steps < 1:
        raise ValueError(f"--steps {args.steps}: must be at least 1")
    if not args.lr > 0:
        raise ValueError(f"--lr {args.lr}: must be above 0")
    if args.weight_decay < 0:
        raise ValueError(f"--weight-decay {args.weight_decay}: must be at least 0")
    if args.nproc < 1 or BATCH_SIZE % args.nproc:
        raise ValueError(f"--nproc {args.nproc}: must divide the train_batch_size of zero1.json, which is {BATCH_SIZE}")
    if "Muon" in args.optimizers and importlib.util.find_spec("muon_plugin") is None:
        raise ValueError(
            "--optimizers Muon: the package muon_plugin is not installed. Run `pip install -e .` in the "
            "repository, or compare without it: --optimizers AdamW"
        )
    return args


def run(optimizer: str, args: argparse.Namespace) -> list[dict]:
    """Trains with one optimizer in processes of their own; returns the metrics of each step."""
    out = args.out / optimizer
    shutil.rmtree(out, ignore_errors=True)  # metrics and TensorBoard events of an earlier run do not mix with these
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    # A model this small gains nothing from more than a few threads.
    env = {"OMP_NUM_THREADS": str(max(1, min(4, cores // args.nproc)))} | os.environ
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(args.nproc),
        str(HERE / "train.py"),
        "--optimizer",
        optimizer,
        "--lr",
        str(args.lr),
        "--steps",
        str(args.steps),
        "--weight-decay",
        str(args.weight_decay),
        "--data",
        str(args.out / "data"),
        "--out",
        str(out),
    ]
    code = subprocess.run(command, check=False, env=env).returncode
    if code:
        print(
            f"Training with {optimizer} failed with return code {code}. Its log: {out / 'train.log'}", file=sys.stderr
        )
        raise SystemExit(code if code > 0 else 1)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def first_step_at(target: float, steps: list[int], losses: list[float]) -> float | None:
    """First step at which the loss is at or below `target`, on straight lines between the evaluations."""
    for i, loss in enumerate(losses):
        if loss <= target:
            if i == 0:
                return float(steps[0])
            share = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return None


def smooth(values: list[float], width: int) -> np.ndarray:
    """Mean of the last `width` values (of those there are, at the beginning)."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def evaluations(metrics: list[dict]) -> tuple[list[int], list[float]]:
    """Steps and losses of the validations."""
    rows = [row for row in metrics if "val_loss" in row]
    return [row["step"] for row in rows], [row["val_loss"] for row in rows]


def summarize(runs: dict[str, list[dict]], args: argparse.Namespace, info: dict) -> dict:
    """Everything that goes into result.json."""
    result = {
        "settings": {
            "lr": args.lr,
            "weight_decay": args.weight_decay,
            "steps": args.steps,
            "nproc": args.nproc,
            "data": info,
        },
        "runs": {},
    }
    for name, metrics in runs.items():
        last = metrics[-1]
        result["runs"][name] = {
            "final_val_loss": last["val_loss"],
            "steps": last["step"],
            "seconds": round(last["seconds"], 1),
            "tokens_per_second": round(last["tokens"] / last["seconds"]),
        }
    if {"AdamW", "Muon"} <= runs.keys():
        target = result["runs"]["AdamW"]["final_val_loss"]
        step = first_step_at(target, *evaluations(runs["Muon"]))
        result["muon_at_adamw_final_loss"] = {
            "val_loss": target,
            "step": step,
            "share_of_adamw_steps": step and step / args.steps,
        }
    return result


def verdict(result: dict) -> str:
    """The comparison in one sentence; empty if only one optimizer ran."""
    if "muon_at_adamw_final_loss" not in result:
        return ""
    crossing, steps = result["muon_at_adamw_final_loss"], result["settings"]["steps"]
    if crossing["step"] is None:
        return f"Muon did not reach AdamW's final validation loss ({crossing['val_loss']:.3f}) within {steps} steps."
    return (
        f"Muon reached AdamW's final validation loss ({crossing['val_loss']:.3f}) at step {crossing['step']:.0f} "
        f"of {steps}: with {crossing['share_of_adamw_steps']:.0%} of AdamW's steps, and so of the "
        "FLOPs of its forward and backward passes."
    )


def tables(result: dict) -> tuple[str, str]:
    """The result as aligned plain text and as Markdown."""
    head = ["optimizer", "final validation loss", "steps", "seconds", "tokens/s"]
    rows = [
        [name, f"{r['final_val_loss']:.4f}", str(r["steps"]), f"{r['seconds']:.0f}", f"{r['tokens_per_second']:,}"]
        for name, r in result["runs"].items()
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    text = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in [head, *rows]
    ]
    text.insert(1, "-" * len(text[0]))
    markdown = ["| " + " | ".join(row) + " |" for row in [head, ["---"] + ["---:"] * (len(head) - 1), *rows]]
    note = "Seconds are those of the training steps; start-up and validation are left out."
    return (
        "\n".join([*text, "", note, verdict(result)]).rstrip() + "\n",
        "\n".join([*markdown, "", note, "", verdict(result)]).rstrip() + "\n",
    )


def draw(runs: dict[str, list[dict]], result: dict, file: Path, what: str) -> None:
    """Draws validation loss (thick) and smoothed training loss (thin) over the steps."""
    figure, axes = plt.subplots()
    total = result["settings"]["steps"]
    shown = []  # losses that decide the range of the y axis: the first tenth is steep and would flatten the rest
    for name, metrics in runs.items():
        steps, losses = evaluations(metrics)
        label = f"{name}, validation: {losses[-1]:.3f}"
        axes.plot(steps, losses, color=COLORS[name], marker="o", markersize=4, label=label)
        train = smooth([row["loss"] for row in metrics], max(1, total // 25))
        axes.plot([row["step"] for row in metrics], train, color=COLORS[name], alpha=0.5, linewidth=1.2)
        shown += [loss for row, loss in zip(metrics, train) if row["step"] > total / 10] + losses[-1:]
    axes.plot([], [], color="0.2", alpha=0.5, linewidth=1.2, label="training (smoothed)")
    crossing = result.get("muon_at_adamw_final_loss")
    if crossing:
        level, label = {"color": "0.2", "linewidth": 1.2, "linestyle": "--"}, "AdamW's final loss"
        if crossing["step"] is not None:  # said in the legend, which hides no curve whatever their course
            level |= {"marker": "o", "markevery": [1], "markersize": 10, "markerfacecolor": "none"}
            label += f", at {crossing['share_of_adamw_steps']:.0%} of the steps"
        axes.plot([0, crossing["step"] or 0, 1.01 * total], [crossing["val_loss"]] * 3, label=label, zorder=5, **level)
    low, high = min(shown), max(shown)
    axes.set_ylim(low - 0.08 * (high - low), high + 0.05 * (high - low))
    axes.set_xlim(0, 1.01 * total)  # with the whole marker of the last step
    axes.set(xlabel="optimizer steps", ylabel="loss (nats per token)", title=f"{what}, same settings")
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(file)
    plt.close(figure)


def main() -> None:
    """Data, runs, picture, table."""
    began = time.perf_counter()
    args = parse_args()
    info = data.prepare(args.data, args.out / "data")
    for name in ("train", "val"):
        data.load_windows(args.out / "data", name, BATCH_SIZE)  # too little text is noticed here, before any training
    print(f"Data: {info['source']}, {info['train_tokens']:,} tokens to train on, {info['val_tokens']:,} held out")
    runs = {name: run(name, args) for name in args.optimizers}
    result = summarize(runs, args, info)
    draw(runs, result, args.out / "loss.png", "Llama with 5 M parameters, DeepSpeed ZeRO-1")
    text, markdown = tables(result)
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    (args.out / "result.md").write_text(markdown)
    print(f"\n{text}\nPicture: {args.out / 'loss.png'}, {(time.perf_counter() - began) / 60:.1f} minutes in all")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # a setting that cannot work: its message says what to do, a traceback would hide it
        raise SystemExit(f"error: {error}") from None
