"""Newton-Schulz on one device: time against others' iterations, share of the device's own matrix rate, accuracy.

    python benchmarks/gpu.py --out benchmarks/results/gpu.md
    python benchmarks/gpu.py --device cpu        # the same code on small shapes

All competitors run in one process on the same bf16 matrices, in alternating rounds: a drifting clock touches them all.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from muon_plugin.core.settings import Settings

#: ROWSxCOLS or ROWSxCOLSxBATCH
SHAPES = {"cuda": "1024x1024,2048x1408x64,2048x8192,4096x4096,4096x16384", "cpu": "64x64,48x40x4,64x256,256x64"}
RATE_SIZES = {"cuda": (4096, 8192, 16384), "cpu": (256, 512, 1024)}
SMALL = (256, 640)  # where the device's result is compared with the CPU's
TORCHS = "torch.optim.Muon"
ROUNDS = 7
#: torch.compile with CUDA graphs, in gram-newton-schulz, compiles at the first call and records at the next two.
WARM_UP = 4
#: SVDs in float64 are taken up to this short side, and as long as one is foretold to take no longer than this.
SVD_SHORT_SIDE, SVD_SECONDS = 4096, 15.0

Iteration = Callable[[Tensor], Any]  # (batch, rows, cols) to (batch, rows, cols) or a list of matrices


@dataclass
class Competitor:
    """One implementation at one shape; `run` is None, or `why` is set later, where it cannot run."""

    name: str
    run: Iteration | None
    flops: int | None = None
    why: str = ""
    seconds: list[float] = field(default_factory=list)

    def fail(self, error: Exception) -> None:
        """Says in a few words why there is no number."""
        text = " ".join(str(error).split()).replace("|", "/")[:60]
        missing = error.name if isinstance(error, ImportError) else None
        self.run, self.why = None, f"not installed: {missing}" if missing else f"{type(error).__name__}: {text}"


@dataclass(frozen=True)
class Shape:
    rows: int
    cols: int
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}" + (f", batch of {self.batch}" if self.batch > 1 else "")

    def draw(self, device: torch.device) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        size = (self.batch, self.rows, self.cols)
        return torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)


def competitors(shape: Shape, device: torch.device) -> list[Competitor]:
    """Ours in its forms, torch's, and gram-newton-schulz's, all with our default coefficients."""
    default = Settings().newton_schulz
    forms = [replace(default, method=method).on(device) for method in ("auto", "standard", "gram")]
    found = [Competitor(form.method, form, shape.batch * form.flops(shape.rows, shape.cols)) for form in forms]
    for name, build, flops in ((TORCHS, _torchs, found[1].flops), ("gram-newton-schulz", _gram_package, None)):
        competitor = Competitor(name, None, flops)
        try:
            competitor.run = build(default.coefficients, device)
        except Exception as error:  # not installed, or not for this device
            competitor.fail(error)
        found.append(competitor)
    return found


def _torchs(coefficients: Sequence[tuple[float, float, float]], device: torch.device) -> Iteration:
    from torch.optim._muon import _zeropower_via_newtonschulz

    (triple,) = set(coefficients)  # torch's iteration has one triple for all steps
    return lambda x: [_zeropower_via_newtonschulz(matrix, triple, len(coefficients), 1e-7) for matrix in x]


def _gram_package(coefficients: Sequence[tuple[float, float, float]], device: torch.device) -> Iteration:
    from gram_newton_schulz import GramNewtonSchulz

    # A new one for each shape, and nothing left of the last: else torch.compile goes over to kernels for any shape.
    torch._dynamo.reset()
    options: dict[str, Any] = {"ns_coefficients": [list(triple) for triple in coefficients]}
    if device.type == "cpu":
        options |= {"ns_use_kernels": False, "compile_kwargs": None}  # its kernels are for Hopper and Blackwell
    return GramNewtonSchulz(**options)


def elapsed(run: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Seconds a call, over `calls` calls one after the other."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
    begin = time.perf_counter()
    if events:
        torch.cuda.synchronize()
        events[0].record()
    for _ in range(calls):
        run()
    if not events:
        return (time.perf_counter() - begin) / calls
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) / 1e3 / calls


def calls_for(run: Callable[[], Any], seconds: float, device: torch.device) -> int:
    """How many calls of a round make all rounds take about `seconds`; warms up on the way."""
    for _ in range(WARM_UP):
        run()
    return max(1, int(seconds / ROUNDS / max(elapsed(run, 1, device), 1e-7)))


def time_all(entrants: Sequence[Competitor], x: Tensor, seconds: float) -> None:
    """Times those that can run, in alternating rounds. Ours and torch's scale x in place, to norm 1: harmless."""
    calls: dict[str, int] = {}
    for one in entrants:
        if (run := one.run) is not None:
            try:
                calls[one.name] = calls_for(partial(run, x), seconds, x.device)
            except Exception as error:  # a package that does not know this device, or a lack of memory
                one.fail(error)
    for _ in range(ROUNDS):
        for one in entrants:
            if (run := one.run) is not None:
                one.seconds.append(elapsed(partial(run, x), calls[one.name], x.device))


def matrix_rate(device: torch.device, seconds: float) -> tuple[float, int]:
    """The best bf16 FLOP/s of torch.mm over a few sizes, and the size."""
    rates = []
    for size in RATE_SIZES[device.type]:
        a, b = (Shape(size, size).draw(device)[0] for _ in range(2))
        run = partial(torch.mm, a, b, out=torch.empty_like(a))
        calls = calls_for(run, seconds, device)
        rates.append((2 * size**3 / median(elapsed(run, calls, device) for _ in range(ROUNDS)), size))
    return max(rates)


def polynomial(matrix: Tensor) -> Tensor:
    """The iteration in float64, on the matrix's device."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if tall else matrix).double()
    x = x / x.norm()
    for a, b, c in Settings().newton_schulz.coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def polar_factor(matrix: Tensor) -> Tensor:
    """U V^T in float64. A long matrix is made square by QR first: the polar factor of Q R is Q times that of R."""
    wide = matrix.shape[0] < matrix.shape[1]
    q, r = torch.linalg.qr((matrix.mT if wide else matrix).double())
    u, _, vh = torch.linalg.svd(r)
    return (q @ u @ vh).mT if wide else q @ u @ vh


class Polars:
    """Polar factors while they are affordable; the cost of an SVD is foretold from the last one's, cubically."""

    def __init__(self) -> None:
        self._seconds = 0.0  # of the last SVD, over its short side cubed

    def of(self, matrix: Tensor) -> Tensor | str:
        """The factor, or why there is none."""
        short = min(matrix.shape)
        foretold = self._seconds * short**3
        if short > SVD_SHORT_SIDE or foretold > SVD_SECONDS:
            return f"left out: short side over {SVD_SHORT_SIDE}, or SVD over {SVD_SECONDS:.0f} s"
        begin = time.perf_counter()
        try:
            found = polar_factor(matrix)
            float(found[0, 0])  # waits for the device
        except RuntimeError as error:  # out of memory, or no convergence
            return f"left out: {type(error).__name__}"
        self._seconds = (time.perf_counter() - begin) / short**3
        return found


def accuracies(entrants: Sequence[Competitor], x: Tensor, polars: Polars) -> list[list[str]]:
    """For each that can run: its error on the first matrix against the polynomial and against the polar factor."""
    references = [polynomial(x[0]), polars.of(x[0])]
    rows = []
    for one in entrants[1:]:  # auto is one of the two after it
        cells = [one.why, "-"]
        if one.run is not None:
            found = one.run(x.clone())[0].double()
            cells = [r if isinstance(r, str) else f"{float((found - r).norm() / r.norm()):.2%}" for r in references]
        rows.append([one.name, *cells])
    return rows


def against_cpu(device: torch.device) -> str:
    """The largest difference between the device's result and the CPU's."""
    x = Shape(*SMALL).draw(torch.device("cpu"))
    parts = []
    for method in ("standard", "gram"):
        form = replace(Settings().newton_schulz, method=method)
        there, here = form(x.to(device, copy=True))[0].cpu().float(), form(x.clone())[0].float()
        parts.append(f"{method} {float((there - here).abs().max()):.1e}, entries up to {float(here.abs().max()):.2f}")
    return f"Largest difference between {device.type} and CPU at {SMALL[0]}x{SMALL[1]}: {'; '.join(parts)}."


def time_row(shape: Shape, entrants: Sequence[Competitor], rate: float) -> list[str]:
    cells = [str(shape)]
    for one in entrants:
        seconds = median(one.seconds or [1.0])  # no seconds: `why` is shown
        share = f", {one.flops / seconds / rate:.0%}" if one.flops is not None else ""
        cells.append(f"{seconds * 1e3:.3f} ms{share}" if one.seconds else one.why)
    ours, torchs = (next(one.seconds for one in entrants if one.name == name) for name in ("auto", TORCHS))
    return [*cells, f"{median(torchs) / median(ours):.2f}" if ours and torchs else "-"]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def device_line(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    package = next(iter(importlib.metadata.distributions(name="gram-newton-schulz")), None)
    rival = f"gram-newton-schulz {package.version if package else 'not installed'}"
    return f"{name}; torch {torch.__version__}; {rival}; {datetime.now(timezone.utc).date()}"


def measure(shapes: Sequence[Shape], device: torch.device, seconds: float) -> str:
    """The whole report, in Markdown."""
    rate, size = matrix_rate(device, seconds)
    polars, times, errors, spreads = Polars(), [], [], []
    for shape in shapes:
        entrants = competitors(shape, device)
        time_all(entrants, shape.draw(device), seconds)
        times.append(time_row(shape, entrants, rate))
        spreads += [(max(s) - min(s)) / median(s) for one in entrants if (s := one.seconds)]
        errors += [[str(shape), *row] for row in accuracies(entrants, shape.draw(device), polars)]
        print(" | ".join(times[-1]), flush=True)
        del entrants  # with what they compiled and recorded
        torch.cuda.empty_cache()  # nothing, on CPU
    columns = ["auto", "standard", "gram", TORCHS, "gram-newton-schulz"]
    return f"""# Newton-Schulz on one device

{device_line(device)}

Written by `benchmarks/gpu.py`; bf16, {Settings().ns_steps} steps, default coefficients, matrices of normal numbers.

## Time

A call on the whole batch: median of {ROUNDS} alternating rounds (within a cell they spread by up to \
{max(spreads, default=0):.0%}). Ours: auto (the form with fewer FLOPs), standard, gram. Percent: FLOPs of the form's \
products over time, as a share of this device's own bf16 rate, {rate / 1e12:.3g} TFLOP/s (best torch.mm: \
{size}x{size}). torch's counts as the standard form; gram-newton-schulz has symmetric kernels and is not counted.

{table(["shape", *columns, f"{TORCHS} / auto"], times)}

## Accuracy

Relative error (Frobenius) of one matrix. The polynomial: the same iteration in float64. The polar factor: U V^T of \
the SVD in float64, which these coefficients come near to and do not reach.

{table(["shape", "iteration", "against the polynomial", "against the polar factor"], errors)}

{against_cpu(device)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", help="ROWSxCOLS or ROWSxCOLSxBATCH, comma-separated")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each measurement, all rounds together")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/gpu.py: there is no CUDA device here, so nothing was measured")
        return
    shapes = [Shape(*map(int, shape.split("x"))) for shape in (args.shapes or SHAPES[args.device]).split(",")]
    report = measure(shapes, torch.device(args.device), args.seconds)
    print("\n" + report)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(report)


if __name__ == "__main__":
    main()
