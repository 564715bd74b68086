"""The pictures of the report.

Wherever seeds are summed up, a line is their mean and a band goes from the least to the greatest; report.py says so
below each picture. Legends stand above the panels, where they hide nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws to a file, also where there is no screen
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, PercentFormatter

from muon_plugin.metrics import GROUPS, group_of

plt.style.use("muon_plugin.pictures")
COLORS = {"AdamW": "C0", "Muon": "C1", "Muon, no decay": "C2", "Muon, gamma not decayed": "C3"}
MARKERS = "os^Dv"  # by seed
HOLLOW = {"markerfacecolor": "none"}  # so that one under another is seen
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))  # by layer
LOSS = "validation loss (nats per token)"
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


def _ticks() -> MaxNLocator:
    """Few, at round numbers."""
    return MaxNLocator(6, steps=[1, 2, 5, 10])


def _panels(number: int, height: float = 2.6, **shared: Any) -> tuple[Any, list[Any]]:
    """Two in a row: three would be too small to read in a page's width."""
    columns = min(2, number)
    rows = -(-number // columns)
    size = (plt.rcParams["figure.figsize"][0], height * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **shared)
    for axis in axes.flat[number:]:
        axis.remove()
    for axis in axes.flat:
        axis.yaxis.set_major_locator(_ticks())
    for axis in axes.flat[number - columns : number]:  # also of one with nothing below it
        axis.xaxis.set_tick_params(labelbottom=True)
    return figure, list(axes.flat[:number])


def _save(figure: Any, file: Path, handles: Sequence[Any] | None = None) -> None:
    handles = handles or figure.axes[0].get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside upper center", ncols=2 if len(handles) <= 4 else 3)
    figure.savefig(file)
    plt.close(figure)


def _entry(label: str, **style: Any) -> Any:
    """A legend's entry for what several lines have in common."""
    return Line2D([], [], label=label, **({"color": "0.4"} | style))


def _seeds(number: int, color: Callable[[int], str], **style: Any) -> list[Any]:
    return [_entry(f"seed {s}", marker=MARKERS[s], linestyle="none", color=color(s), **style) for s in range(number)]


def _seed_color(seed: int) -> str:
    return f"C{4 + seed}"


def _over_tokens(axis: Any) -> None:
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_major_locator(_ticks())


def _curve(axis: Any, results: list[dict[str, Any]], value: Any, label: str, **style: Any) -> None:
    """Mean over the seeds, with a band from the least to the greatest; every run has the same points."""
    x = [point["tokens"] for point in results[0]["points"]]
    y = np.array([[value(point) for point in result["points"]] for result in results])
    axis.plot(x, y.mean(0), label=label, **style)
    axis.fill_between(x, y.min(0), y.max(0), color=style["color"], alpha=0.15, linewidth=0)


def scaling(points: dict[str, Any], laws: dict[str, tuple[float, float]], file: Path) -> None:
    figure, (axis,) = _panels(1, height=3.6)
    seeds = 0
    for (name, sizes), aside in zip(points.items(), (0.97, 1.03)):  # side by side, or one would hide the other
        compute = np.array([c for c, _ in sizes])
        for c, some in sizes:
            seeds = max(seeds, len(some))
            for marker, loss in zip(MARKERS, some):
                axis.plot(c * aside, loss, marker=marker, color=COLORS[name], **HOLLOW, zorder=3)
        line = np.geomspace(compute.min() / 1.5, compute.max() * 1.5)
        a, b = laws[name]
        axis.plot(line, a * line**-b, color=COLORS[name], label=f"{name}: ${a:.2f}\\,C^{{-{b:.3f}}}$")
    axis.set(xscale="log", yscale="log", xlabel="compute C = 6 N D (FLOPs)", ylabel=LOSS)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.yaxis.set_major_locator(_ticks())
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    handles = axis.get_legend_handles_labels()[0]
    _save(figure, file, [*handles, *_seeds(seeds, lambda _: "0.4", **HOLLOW)])


def shorter(shares: Sequence[float], curves: dict[int, Any], file: Path) -> None:
    figure, axes = _panels(len(curves), height=3)
    seeds = next(iter(curves.values()))[0].shape[1]
    gaps = (3, 3 * max(1, seeds - 1))  # the dashes of equal losses stand beside each other
    for axis, (layers, (muon, target)) in zip(axes, curves.items()):
        for seed in range(seeds):
            # What is compared is one seed's start and order of the data, so a colour is a seed.
            axis.plot(shares, muon[:, seed], color=_seed_color(seed), marker=MARKERS[seed])
            axis.axhline(target[seed], color=_seed_color(seed), linestyle=(3 * seed, gaps))
        axis.set(title=f"{layers} layers", xscale="log")  # on which the report's crossings are straight, too
        axis.set_xticks(shares)
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.minorticks_off()
    figure.supxlabel("tokens and FLOPs, share of AdamW's")
    figure.supylabel(LOSS)
    kinds = [_entry("Muon"), _entry("AdamW, 100%", linestyle="--")]
    _save(figure, file, [*kinds, *_seeds(seeds, _seed_color)])


def sweep(values: Sequence[float], muon: list[list[float]], adamw: list[float], file: Path) -> None:
    figure, (axis,) = _panels(1, height=3.6)
    axis.plot(values, np.mean(muon, 1), color=COLORS["Muon"], label="Muon")
    axis.axhline(np.mean(adamw), color=COLORS["AdamW"], label="AdamW")
    axis.axhspan(min(adamw), max(adamw), color=COLORS["AdamW"], alpha=0.15, linewidth=0)
    for value, some in zip(values, muon):
        for marker, loss in zip(MARKERS, some):
            axis.plot(value, loss, marker=marker, color=COLORS["Muon"], **HOLLOW)
    axis.set(xscale="log", xlabel=r"update RMS $r$ of the scale $r\sqrt{\max(A, B)}$ (no unit)", ylabel=LOSS)
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.minorticks_off()
    handles = axis.get_legend_handles_labels()[0]
    _save(figure, file, [*handles, *_seeds(len(adamw), lambda _: COLORS["Muon"], **HOLLOW)])


def _on_the_same_windows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the end of an old log, which has the validation loss on more windows than the other points only."""
    return [r if "quick_loss" in r["points"][-1] else {**r, "points": r["points"][:-1]} for r in results]


def decay(found: Results, file: Path) -> None:
    figure, axes = _panels(4)
    shown = {
        LOSS: lambda p: p.get("quick_loss", p["val_loss"]),
        "RMS of the MLP's weights": lambda p: p["weight_rms"]["mlp"],
        "RMS of RMSNorm's gamma": lambda p: p["weight_rms"]["gamma"],
        "gradient norm": lambda p: p["grad_norm"],
    }
    same = {label: _on_the_same_windows(results) for label, results in found.items()}
    for axis, (name, value) in zip(axes, shown.items()):
        for label, results in (same if name == LOSS else found).items():
            _curve(axis, results, value, label, color=COLORS[label])
        axis.set_title(name)
        _over_tokens(axis)
    ends = []
    for label, results in found.items():
        last = [result["points"][-1] for result in results]
        ends.append(np.mean([point["val_loss"] for point in last]))
        axes[0].plot(last[0]["tokens"], ends[-1], "o", color=COLORS[label], markersize=5)
    late = [r["points"][len(r["points"]) // 4 :] for results in same.values() for r in results]
    ends += [shown[LOSS](p) for points in late for p in points]
    axes[0].set_ylim(min(ends) - 0.04, max(ends) + 0.02)
    figure.supxlabel("training tokens")
    _save(figure, file)


def entropy(found: Results, file: Path) -> None:
    names = list(found["Muon"][0]["points"][-1]["entropy"])
    groups = [group for group in GROUPS if any(group_of(name) == group for name in names)]
    figure, axes = _panels(len(groups), height=2.1, sharex=True, sharey=True)
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
        axis.set_title(group)
        _over_tokens(axis)
    figure.supxlabel("training tokens")
    figure.supylabel("SVD entropy (no unit)")
    _save(figure, file)


def singular(found: Results, file: Path) -> None:
    names = list(found["Muon"][0]["points"][-1]["sigma"])
    groups = [group for group in GROUPS if any(group_of(name) == group for name in names)]
    figure, axes = _panels(len(groups), height=2.1, sharex=True, sharey=True)
    for axis, group in zip(axes, groups):
        members = [name for name in names if group_of(name) == group]
        for label, results in found.items():
            for name in members:
                sigma = np.array(results[0]["points"][-1]["sigma"][name])
                x = np.linspace(0, 1, len(sigma))
                axis.plot(x, sigma, color=COLORS[label], alpha=0.4 if len(members) > 10 else 0.8, linewidth=1)
        axis.set_title(group)
    figure.supxlabel("rank of the singular value, from 0 to 1")
    figure.supylabel("singular value, share of the largest")
    _save(figure, file, [_entry(label, color=COLORS[label]) for label in found])


def attention(found: Results, file: Path) -> None:
    figure, axes = _panels(2, height=3.4)
    layers = len(found["Muon"][0]["points"][0]["max_logit"])
    for label, results in found.items():
        for layer in range(layers):
            style = {"color": COLORS[label], "linestyle": DASHES[layer % len(DASHES)]}
            _curve(axes[0], results, lambda p, k=layer: p["max_logit"][k], label, **style)
        _curve(axes[1], results, lambda p: p["grad_norm"], label, color=COLORS[label])
    for axis, title in zip(axes, ("largest attention logit", "gradient norm")):
        axis.set_title(title)
        _over_tokens(axis)
    figure.supxlabel("training tokens")
    by_layer = [_entry(f"layer {layer}", linestyle=DASHES[layer % len(DASHES)]) for layer in range(layers)]
    _save(figure, file, [*(_entry(label, color=COLORS[label]) for label in found), *by_layer])
