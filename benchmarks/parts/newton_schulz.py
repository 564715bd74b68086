"""Newton-Schulz on one device: time by form, dtype and what multiplies, against others' iterations; errors in float64.

All competitors of a shape run in one process on the same bf16 matrices, in alternating rounds: a drifting clock touches
them all.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import SPECTRA, in_float64
from benchmarks.parts.record import Case, Found, Progress, Setup
from benchmarks.parts.tables import failures, table, title
from muon_plugin.core.orthogonalize import DTYPES, NewtonSchulz, _batch_is_exact
from muon_plugin.core.products import TORCH, products_on
from muon_plugin.core.settings import Settings

#: ROWSxCOLS or ROWSxCOLSxBATCH, the most telling first: batches of experts and of heads, dense layers, large squares.
SHAPES = (
    "1024x1024x32,2048x1408x11,2048x1408x64,2048x8192,4096x4096,4096x16384,"
    "1024x1024,2048x2048x6,1024x4096x8,128x2048x64"
)
TINY_SHAPES = "48x40x4,64x256"
#: ROWSxCOLS of the errors, rows <= cols.
ERRORS = "384x1536,1024x1024,1408x2048,2048x8192,4096x4096,4096x16384"
TINY_ERRORS = "24x96"
RATE_SIZES = {"full": (4096, 8192, 16384), "tiny": (64, 128)}
AUTO, TORCHS = "auto", "torch.optim.Muon"
ROUNDS = 7
#: torch.compile with CUDA graphs, in gram-newton-schulz, compiles at the first call and records at the next two.
WARM_UP = 4

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
        text = " ".join(str(error).split())[:200]
        missing = error.name if isinstance(error, ImportError) else None
        self.run, self.why = None, f"not installed: {missing}" if missing else f"{type(error).__name__}: {text}"


@dataclass(frozen=True)
class Shape:
    rows: int
    cols: int
    batch: int = 1

    @staticmethod
    def of(text: str) -> Shape:
        return Shape(*map(int, text.split("x")))

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}" + (f", batch of {self.batch}" if self.batch > 1 else "")

    def draw(self, device: torch.device) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        size = (self.batch, self.rows, self.cols)
        return torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)


#: Where the device's result is compared with the CPU's.
SMALL = {"full": Shape(256, 640), "tiny": Shape(24, 64)}


def backends(device: torch.device, dtype: str) -> dict[str, Any]:
    """What can multiply on the device: torch, what is fastest, and each library of it alone."""
    fastest = products_on(device, dtype)
    found: dict[str, Any] = {"torch": TORCH}
    if fastest != TORCH:
        found[type(fastest).__name__.lower()] = fastest
    libraries = vars(fastest).get("releases", ())  # (name, release) of each, where several share the products
    if len(libraries) > 1:
        found |= {name: replace(fastest, releases=((name, release),)) for name, release in libraries}
    return found


def forms(device: torch.device) -> dict[str, NewtonSchulz]:
    """Ours: what runs by default, and each form by itself, with each backend."""
    default = Settings().newton_schulz
    found = {AUTO: default.on(device), "standard": replace(default, method="standard").on(device)}
    for dtype in DTYPES:
        if dtype != "auto":
            gram = replace(default, method="gram", dtype=dtype)
            for name, products in backends(device, dtype).items():
                found[f"gram, {dtype}, {name}"] = replace(gram, products=products)
    return found


def competitors(shape: Shape, device: torch.device) -> list[Competitor]:
    """Ours, torch's, and gram-newton-schulz's, all with our default coefficients."""
    ours = forms(device)
    found = [Competitor(name, form, shape.batch * form.flops(shape.rows, shape.cols)) for name, form in ours.items()]
    coefficients, standard = ours[AUTO].coefficients, replace(ours["standard"], products=TORCH)
    flops = shape.batch * standard.flops(shape.rows, shape.cols)
    for name, build, work in ((TORCHS, _torchs, flops), ("gram-newton-schulz", _gram_package, None)):
        competitor = Competitor(name, None, work)
        try:
            competitor.run = build(coefficients, device)
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
                calls[one.name] = calls_for(functools.partial(run, x), seconds, x.device)
            except Exception as error:  # a package that does not know this device, or a lack of memory
                one.fail(error)
    for _ in range(ROUNDS):
        for one in entrants:
            if (run := one.run) is not None:
                one.seconds.append(elapsed(functools.partial(run, x), calls[one.name], x.device))


def rate(setup: Setup, device: torch.device, seconds: float, _: Progress) -> dict[str, Any]:
    """The best bf16 FLOP/s of torch.mm over a few sizes, and the size."""
    rates = []
    for size in RATE_SIZES[setup.size]:
        a, b = (Shape(size, size).draw(device)[0] for _ in range(2))
        run = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
        calls = calls_for(run, seconds, device)
        rates.append((2 * size**3 / median(elapsed(run, calls, device) for _ in range(ROUNDS)), size))
    best, size = max(rates)
    return {"flops": best, "size": size}


def against_cpu(setup: Setup, device: torch.device, _: Progress) -> dict[str, Any]:
    """The largest difference between the device's result and the CPU's, by form."""
    x = SMALL[setup.size].draw(torch.device("cpu"))
    found = {}
    for name, form in forms(device).items():
        there = form(x.to(device, copy=True))[0].cpu().float()
        here = replace(form, products=None)(x.clone())[0].float()
        found[name] = {"difference": float((there - here).abs().max()), "largest": float(here.abs().max())}
    return found


def times(shape: Shape, device: torch.device, seconds: float, _: Progress) -> dict[str, Any]:
    """By competitor. Fails only where ours has none."""
    entrants = competitors(shape, device)
    time_all(entrants, shape.draw(device), seconds)
    found: dict[str, Any] = {}
    for one in entrants:
        found[one.name] = {"why": one.why}
        if one.seconds:
            middle = median(one.seconds)
            found[one.name] = {"seconds": middle, "spread": (max(one.seconds) - min(one.seconds)) / middle}
            found[one.name] |= {"flops": one.flops}
        if one.seconds and isinstance(one.run, NewtonSchulz):
            size = shape.batch, shape.rows, shape.cols
            found[one.name] |= {"together": _batch_is_exact(one.run, size, device)}
    del entrants  # with what they compiled and recorded
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if "seconds" not in found[AUTO]:
        raise AssertionError(f"{AUTO}: {found}")
    return found


def errors(shape: Shape, spectrum: str, device: torch.device, _: Progress) -> dict[str, Any]:
    """By competitor: the relative error (Frobenius) against the same iteration in float64."""
    generator = torch.Generator(device).manual_seed(0)
    matrix = SPECTRA[spectrum](generator, shape.rows, shape.cols).bfloat16()
    exact, found = in_float64(matrix), {}
    for one in competitors(shape, device):
        if one.run is not None:
            try:
                update = one.run(matrix[None].clone())[0].double()
                found[one.name] = float((update - exact).norm() / exact.norm())
            except Exception as error:
                one.fail(error)
        if one.why and one.name == AUTO:
            raise AssertionError(one.why)
    return found


def cases(setup: Setup, opened: ExitStack) -> Iterator[Case]:
    device = torch.device(setup.device, 0) if setup.device == "cuda" else torch.device("cpu")
    seconds = 0.002 if setup.tiny else 0.5
    yield Case("the device's rate", functools.partial(rate, setup, device, seconds))
    for text in (TINY_SHAPES if setup.tiny else SHAPES).split(","):
        shape = Shape.of(text)
        yield Case(f"time: {shape}", functools.partial(times, shape, device, seconds))
    yield Case("against the CPU", functools.partial(against_cpu, setup, device))
    for text in (TINY_ERRORS if setup.tiny else ERRORS).split(","):
        shape = Shape.of(text)
        for spectrum in SPECTRA:
            yield Case(f"errors: {shape}, {spectrum}", functools.partial(errors, shape, spectrum, device))


def report(setup: Setup, found: dict[str, Found], on: dict[str, Any]) -> str:
    passed = {name: one.value for name, one in found.items() if one.state == "passed"}
    best = passed.get("the device's rate", {"flops": None, "size": "?"})
    rows, wrong = [], dict[tuple[str, str], dict[str, float]]()
    for name, value in passed.items():
        kind, _, what = name.partition(": ")
        if kind == "time":
            rows += time_rows(what, value, best["flops"])
        elif kind == "errors":
            shape, _, spectrum = what.partition(", ")
            wrong[shape, spectrum] = value
    who = list(dict.fromkeys(name for value in wrong.values() for name in value))
    cells = [[*key, *[f"{value[name]:.2%}" if name in value else "" for name in who]] for key, value in wrong.items()]
    differences = [
        f"{name} {v['difference']:.1e} (entries up to {v['largest']:.2f})"
        for name, v in passed.get("against the CPU", {}).items()
    ]
    head = ["shape", "iteration", "time", "spread", "of the rate", f"{TORCHS}'s time over it", "batch"]
    return f"""{title("Newton-Schulz on one device", on)}

{Settings().ns_steps} steps, default coefficients, matrices of normal numbers.

## Time

A call on the whole batch: median of {ROUNDS} alternating rounds, and how far they lie apart. "auto" is what runs by \
default, "standard" has torch's bits, "gram" is computed with the products that are named. Of the rate: FLOPs of the \
iteration's products over time, as a share of torch.mm's best in bf16 here ({(best["flops"] or 0) / 1e12:.3g} TFLOP/s \
at {best["size"]}). A batch is computed together where that gives each matrix the bits that it has alone.

{table(head, rows)}

## Errors

Relative error (Frobenius) of one matrix against the same iteration in float64; the result's rounding to bf16 alone is \
0.17%.

{table(["shape", "spectrum", *who], cells)}

Largest difference from the CPU's result at {SMALL[setup.size]}: {"; ".join(differences) or "not measured"}.\
{failures(found)}
"""


def time_rows(shape: str, value: dict[str, Any], best: float | None) -> list[list[str]]:
    rows = []
    for name, one in value.items():
        if "seconds" not in one:
            rows.append([shape, name, one["why"].replace("|", "/"), *[""] * 4])
            continue
        share = f"{one['flops'] / one['seconds'] / best:.0%}" if best and one["flops"] else ""
        ratio = f"{value[TORCHS]['seconds'] / one['seconds']:.2f}" if "seconds" in value[TORCHS] else ""
        batch = {True: "together", False: "one by one", None: ""}[one.get("together")]
        rows.append([shape, name, f"{one['seconds'] * 1e3:.3f} ms", f"{one['spread']:.0%}", share, ratio, batch])
    return rows
