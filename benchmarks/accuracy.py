"""How exact Newton-Schulz is in its forms, against float64, over shapes and singular values.

    python benchmarks/accuracy.py --out benchmarks/results/accuracy.md
    python benchmarks/accuracy.py --device cuda --out benchmarks/results/accuracy_gpu.md

On the CPU bf16 and fp16 are emulated, which is faster there: products of rounded matrices in fp32, rounded once. All
shapes took half an hour on two cores. A file that is there is gone on with: its rows are kept.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from muon_plugin.core import orthogonalize
from muon_plugin.core.products import WIDENED
from muon_plugin.core.settings import Settings

SHAPES = "384x1536,512x512,1024x4096,2048x2048,2048x8192,4096x4096,4096x16384"
HEAD = """Relative error (Frobenius) against the same iteration in float64, in percent; 5 steps, default coefficients.
Every result is rounded to bf16, which alone is 0.17%. Spectrum: normal numbers; singular values from 1 down, evenly
spread in logarithm; of rank m / 32, with noise of 0.1% of its entries. "Emulated": on a CPU, with products of rounded
matrices in fp32 that are rounded once.

"""
COLUMNS = ("standard, bf16", "gram, bf16", "gram, fp16", "gram, fp16, the shorter run first")


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def spread(smallest: float, generator: torch.Generator, m: int, n: int) -> Tensor:
    """Singular values from 1 to `smallest`; singular vectors of normal matrices."""
    u, v = (torch.linalg.qr(normal(generator, size, m))[0] for size in (m, n))
    return u * torch.logspace(0, math.log10(smallest), m, device=u.device) @ v.mT


def low_rank(generator: torch.Generator, m: int, n: int) -> Tensor:
    rank = max(m // 32, 1)
    factors = normal(generator, m, rank) @ normal(generator, rank, n)
    return factors + 1e-3 * math.sqrt(rank) * normal(generator, m, n)


SPECTRA: dict[str, Callable[..., Tensor]] = {
    "normal": normal,
    "1 to 1e-2": lambda *args: spread(1e-2, *args),
    "1 to 1e-4": lambda *args: spread(1e-4, *args),
    "low rank": low_rank,
}


def in_float64(matrix: Tensor) -> Tensor:
    """The polynomial, all steps on the Gram matrix: what float64 loses by that is far below what is measured."""
    x = matrix.double()
    x /= x.norm()
    gram, polynomial = x @ x.mT, torch.eye(len(x), dtype=x.dtype, device=x.device)
    for a, b, c in Settings().newton_schulz.coefficients:
        step = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal().add_(a)
        gram = step @ gram @ step
        polynomial = polynomial @ step
    return polynomial @ x


def short_first(triples: Sequence[Any], most: int, cut: Any = orthogonalize.runs_of) -> list[Any]:
    """The runs in which the shorter ones come first."""
    steps = iter(triples)
    return [tuple(islice(steps, len(run))) for run in reversed(cut(triples, most))]


def errors(matrix: Tensor) -> list[str]:
    """Of each column."""
    exact = in_float64(matrix)
    default = Settings().newton_schulz
    if matrix.device.type == "cpu":
        default = replace(default, products=WIDENED)
    found = []
    for method, dtype, cut in (
        ("standard", "bf16", orthogonalize.runs_of),
        ("gram", "bf16", orthogonalize.runs_of),
        ("gram", "fp16", orthogonalize.runs_of),
        ("gram", "fp16", short_first),
    ):
        with mock.patch.object(orthogonalize, "runs_of", cut):
            update = replace(default, method=method, dtype=dtype)(matrix[None])[0]
        found.append(f"{float((update.double() - exact).norm() / exact.norm()):.2%}"[:-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file to write, or to go on with")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--shapes", default=SHAPES, help="ROWSxCOLS, rows <= cols, comma-separated")
    args = parser.parse_args()
    titles = ["| " + " | ".join(("shape", "spectrum", *COLUMNS, "on")) + " |"]
    titles += ["|---|---|" + "---:|" * len(COLUMNS) + "---|"]
    on = "emulated" if args.device == "cpu" else torch.cuda.get_device_name()
    there = args.out.read_text().splitlines() if args.out is not None and args.out.exists() else []
    rows = [line for line in there if line.startswith("| ") and line != titles[0]]
    for shape in args.shapes.split(","):
        for spectrum, draw in SPECTRA.items():
            start = f"| {shape} | {spectrum} |"
            if any(row.startswith(start) for row in rows):
                continue
            matrix = draw(torch.Generator(args.device).manual_seed(0), *map(int, shape.split("x"))).bfloat16()
            rows.append(f"{start} {' | '.join(errors(matrix))} | {on} |")
            print(rows[-1], flush=True)
            if args.out is not None:
                args.out.write_text(HEAD + "\n".join([*titles, *rows]) + "\n")


if __name__ == "__main__":
    main()
