"""Table and picture of the weights of a checkpoint: RMS, SVD entropy, singular values, by the paper's groups.

    python -m muon_plugin.metrics CHECKPOINT [CHECKPOINT ...] [--plot weights.png] [--json weights.json]

A checkpoint of DeepSpeed (ZeRO, universal), of Megatron (torch_dist, or legacy of one rank) or of Hugging Face. With
several, such as one model at several steps or trained by several optimizers, they stand side by side.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .checkpoints import matrices, read
from .groups import GROUPS, cut, group_of
from .spectra import rms, singular_values, svd_entropy


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m muon_plugin.metrics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--split", type=json.loads, default={}, help='JSON, as in Muon\'s settings: {"linear_qkv": 3}')
    parser.add_argument("--trust", action="store_true", help="unpickle everything: it runs code that the files hold")
    parser.add_argument("--each", action="store_true", help="a line for every matrix, not only for every group")
    parser.add_argument("--plot", type=Path, help="picture: entropy by group, singular values")
    parser.add_argument("--json", type=Path, help="everything, with all singular values")
    return parser.parse_args(arguments)


def measure(path: Path, split: dict[str, Any], trust: bool) -> list[dict[str, Any]]:
    """One entry a matrix: name, group, shape, rms, entropy, sigma (singular values, the largest first)."""
    routing, tensors = matrices(*read(path, trust), split)
    for note in routing.notes:
        print(f"note: {note}", file=sys.stderr)
    found = []
    for name, matrix in cut(tensors, routing):
        if min(matrix.shape) < 2:
            continue  # a vector in all but name, such as a gate with one output
        sigma = singular_values(matrix)
        found.append(
            {
                "name": name,
                "group": group_of(name),
                "shape": list(matrix.shape),
                "rms": rms(matrix),
                "entropy": svd_entropy(sigma),
                "sigma": sigma.tolist(),
            }
        )
    if not found:
        raise ValueError(f"{path}: none of its {len(tensors)} tensors is a matrix of a hidden layer")
    return found


def _mean(entries: list[dict[str, Any]], key: str) -> float:
    return sum(entry[key] for entry in entries) / len(entries)


def table(measured: dict[str, list[dict[str, Any]]], each: bool) -> str:
    """Means by group, a block for each checkpoint; with `each`, all matrices."""
    lines = []
    for path, entries in measured.items():
        lines += [path, f"{'':60} {'matrices':>9} {'RMS':>10} {'entropy':>8} {'smallest/largest':>17}"]
        for group in GROUPS:
            members = [entry for entry in entries if entry["group"] == group]
            for name, some in [(group, members)] + [(f"  {e['name']}", [e]) for e in members if each]:
                if some:
                    ratio = sum(e["sigma"][-1] / (e["sigma"][0] or 1.0) for e in some) / len(some)
                    values = f"{len(some):9} {_mean(some, 'rms'):10.3e} {_mean(some, 'entropy'):8.4f} {ratio:17.3e}"
                    lines.append(f"{name:60} {values}")
        lines.append("")
    return "\n".join(lines)


def draw(measured: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Above the mean entropy of each group; below the singular values, over the largest, of every matrix."""
    import matplotlib.style
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    with matplotlib.style.context("muon_plugin.pictures"):
        figure = Figure(figsize=(7, 7.5))
        upper, lower = figure.subplots(2, 1)
        _draw_entropy(measured, upper)
        _draw_sigma(measured, lower)
        figure.legend(*upper.get_legend_handles_labels(), loc="outside upper left")  # paths may be long
        figure.savefig(file)


def _draw_entropy(measured: dict[str, list[dict[str, Any]]], axis: Any) -> None:
    present = [group for group in GROUPS if any(e["group"] == group for entries in measured.values() for e in entries)]
    for number, (path, entries) in enumerate(measured.items()):
        means = [[e for e in entries if e["group"] == group] for group in present]
        shift = (number - (len(measured) - 1) / 2) * 0.8 / len(measured)
        places = [place + shift for place, some in enumerate(means) if some]
        axis.bar(places, [_mean(some, "entropy") for some in means if some], 0.8 / len(measured), label=path)
    axis.set_xticks(range(len(present)), present, rotation=20, ha="right")
    axis.grid(visible=False, axis="x")
    axis.set(ylabel="SVD entropy (no unit)", ylim=(min(0.9, axis.dataLim.ymin), 1))


def _draw_sigma(measured: dict[str, list[dict[str, Any]]], axis: Any) -> None:
    for number, entries in enumerate(measured.values()):
        for entry in entries:
            sigma = entry["sigma"]
            places = [place / (len(sigma) - 1) for place in range(len(sigma))]
            axis.plot(places, [value / (sigma[0] or 1.0) for value in sigma], color=f"C{number}", alpha=0.3, lw=1)
    axis.set(xlabel="rank of the singular value, from 0 to 1", ylabel="singular value / largest", yscale="log")


def main(arguments: list[str] | None = None) -> None:
    """Reads, prints, draws."""
    args = parse_args(arguments)
    try:
        measured = {str(path): measure(path, args.split, args.trust) for path in args.checkpoints}
        print(table(measured, args.each))
        if args.plot:
            draw(measured, args.plot)
        if args.json:
            args.json.write_text(json.dumps(measured))
    except (ValueError, ImportError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
