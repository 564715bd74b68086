"""The pictures of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws to a file, also where there is no screen
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

from muon_plugin.metrics import GROUPS, group_of

COLORS = {"AdamW": "#4878a8", "Muon": "#d1603d", "Muon, no decay": "#8a9a3b", "Muon, gamma not decayed": "#7d5ba6"}
Results = dict[str, list[dict[str, Any]]]


def short(number: float) -> str:
    """25K, 1.5M, 8.9B."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:g}"


def crossing(x: Sequence[float], y: Sequence[float], level: float) -> float | None:
    """Where y falls to `level`, on straight lines between the points; None if it does not."""
    for i in range(len(x) - 1):
        if y[i] >= level >= y[i + 1]:
            return float(x[i] + (y[i] - level) / max(y[i] - y[i + 1], 1e-12) * (x[i + 1] - x[i]))
    return None


def _axes(columns: int, rows: int = 1, width: float = 5.5, height: float = 4.2) -> tuple[Any, Any]:
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), dpi=100, squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes.flat


def _save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def _curve(axis: Any, results: list[dict[str, Any]], value: Any, label: str, **style: Any) -> None:
    """Mean over the seeds, with a band from the least to the most; every run has the same points."""
    x = [point["tokens"] for point in results[0]["points"]]
    y = np.array([[value(point) for point in result["points"]] for result in results])
    axis.plot(x, y.mean(0), label=label, **style)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.fill_between(x, y.min(0), y.max(0), color=style.get("color"), alpha=0.15, linewidth=0)


def scaling(points: dict[str, Any], laws: dict[str, tuple[float, float]], file: Path) -> None:
    figure, (axis,) = _axes(1, width=7)
    for name, sizes in points.items():
        compute = np.array([c for c, _ in sizes])
        for c, some in sizes:
            axis.scatter([c] * len(some), some, color=COLORS[name], s=18, zorder=3)
        line = np.geomspace(compute.min() / 1.5, compute.max() * 1.5)
        a, b = laws[name]
        axis.plot(line, a * line**-b, color=COLORS[name], label=f"{name}: {a:.2f} C^-{b:.3f}")
    axis.set(xscale="log", yscale="log", xlabel="C = 6 N D, FLOPs", ylabel="validation loss")
    axis.legend(frameon=False)
    _save(figure, file)


def shorter(shares: Sequence[float], curves: dict[int, Any], file: Path) -> None:
    figure, axes = _axes(len(curves))
    for axis, (layers, (muon, target)) in zip(axes, curves.items()):
        for seed in range(muon.shape[1]):
            axis.plot(shares, muon[:, seed], color=COLORS["Muon"], marker="o", label="_" if seed else "Muon")
            axis.axhline(target[seed], color=COLORS["AdamW"], label="_" if seed else "AdamW, all tokens")
        axis.set(title=f"{layers} layers", xlabel="share of AdamW's tokens and FLOPs", ylabel="validation loss")
        axis.legend(frameon=False)
    _save(figure, file)


def sweep(values: Sequence[float], muon: list[list[float]], adamw: list[float], file: Path) -> None:
    figure, (axis,) = _axes(1, width=7)
    axis.errorbar(values, np.mean(muon, 1), np.std(muon, 1, ddof=min(1, len(muon[0]) - 1)), color=COLORS["Muon"])
    for value, some in zip(values, muon):
        axis.scatter([value] * len(some), some, color=COLORS["Muon"], s=16)
    axis.axhline(np.mean(adamw), color=COLORS["AdamW"], label="AdamW")
    axis.set(xscale="log", xlabel="update RMS r of r sqrt(max(A, B))", ylabel="validation loss")
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.legend(frameon=False)
    _save(figure, file)


def _on_the_same_windows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the end of an old log, which has the validation loss on more windows than the other points only."""
    return [r if "quick_loss" in r["points"][-1] else {**r, "points": r["points"][:-1]} for r in results]


def decay(found: Results, file: Path) -> None:
    figure, axes = _axes(2, 2)
    shown = {
        "validation loss": lambda p: p.get("quick_loss", p["val_loss"]),
        "RMS of the MLP's weights": lambda p: p["weight_rms"]["mlp"],
        "RMS of RMSNorm's gamma": lambda p: p["weight_rms"]["gamma"],
        "gradient norm": lambda p: p["grad_norm"],
    }
    same = {label: _on_the_same_windows(results) for label, results in found.items()}
    for axis, (name, value) in zip(axes, shown.items()):
        for label, results in (same if name == "validation loss" else found).items():
            _curve(axis, results, value, label, color=COLORS[label])
        axis.set(xlabel="tokens", ylabel=name)
    late = [r["points"][len(r["points"]) // 4 :] for results in same.values() for r in results]
    ends = [shown["validation loss"](p) for points in late for p in points]
    axes[0].set_ylim(min(ends) - 0.02, max(ends) + 0.02)
    axes[0].legend(frameon=False, fontsize=8)
    _save(figure, file)


def entropy(found: Results, file: Path) -> None:
    names = list(found["Muon"][0]["points"][-1]["entropy"])
    groups = [group for group in GROUPS if any(group_of(name) == group for name in names)]
    figure, axes = _axes(3, 2, width=4.2, height=3.2)
    for axis, group in zip(axes, groups):
        members = [name for name in names if group_of(name) == group]
        for label, results in found.items():
            _curve(
                axis,
                results,
                lambda p, some=members: np.mean([p["entropy"][n] for n in some]),
                label,
                color=COLORS[label],
            )
        axis.set(title=group, xlabel="tokens", ylabel="SVD entropy")
    axes[0].legend(frameon=False)
    _save(figure, file)


def singular(found: Results, file: Path) -> None:
    names = list(found["Muon"][0]["points"][-1]["sigma"])
    figure, axes = _axes(3, 2, width=4.2, height=3.2)
    for axis, group in zip(axes, GROUPS):
        for label, results in found.items():
            members = [name for name in names if group_of(name) == group]
            for number, name in enumerate(members):
                sigma = np.array(results[0]["points"][-1]["sigma"][name])
                x = np.linspace(0, 1, len(sigma))
                axis.plot(x, sigma, color=COLORS[label], alpha=0.4, linewidth=0.8, label="_" if number else label)
        axis.set(title=group, xlabel="rank, from 0 to 1", ylabel="singular value / largest")
    axes[0].legend(frameon=False)
    _save(figure, file)


def attention(found: Results, file: Path) -> None:
    figure, axes = _axes(2)
    for label, results in found.items():
        for layer in range(len(results[0]["points"][0]["max_logit"])):
            name = label if layer == 0 else "_"
            alpha = 1 - 0.6 * layer / len(results[0]["points"][0]["max_logit"])
            _curve(axes[0], results, lambda p, k=layer: p["max_logit"][k], name, color=COLORS[label], alpha=alpha)
        _curve(axes[1], results, lambda p: p["grad_norm"], label, color=COLORS[label])
    axes[0].set(xlabel="tokens", ylabel="maximum attention logit, a line a layer")
    axes[1].set(xlabel="tokens", ylabel="gradient norm")
    axes[0].legend(frameon=False)
    _save(figure, file)
