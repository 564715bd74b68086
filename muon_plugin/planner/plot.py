"""The plan as a picture: the balance over ranks, and step times over DP sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .planned import Planned
from .tables import stages_name, step_seconds


def check(path: str) -> None:
    """Checks, before anything is planned, that the plot can be drawn.

    Raises:
        ValueError: without matplotlib, or where no file can be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib; or leave it out, or use --json") from None
    if not Path(path).parent.is_dir() or not path.endswith(".png"):
        raise ValueError(f"--plot {path}: allowed: a file name that ends in .png, in a folder that exists")


def draw(planned: Planned, path: Path) -> None:
    import matplotlib.style
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    with matplotlib.style.context("muon_plugin.pictures"):
        figure = Figure(figsize=(7, 7))
        balance, times = figure.subplots(2, 1)
        _balance(planned, balance)
        _times(planned, times)
        figure.savefig(path)


def _balance(planned: Planned, axis: Any) -> None:
    for i, of_stage in enumerate(planned.stages):
        flops = sorted(of_stage.by_rank(lambda load: load.flops), reverse=True)
        numbers = of_stage.stage.numbers
        label = f"{'stages' if len(numbers) > 1 else 'stage'} {stages_name(numbers)}"
        # The later the thinner: where curves meet, the earlier ones stay visible beside them.
        style = {"linewidth": 2 + 1.2 * (len(planned.stages) - 1 - i), "color": f"C{2 + i % 5}"}
        axis.stairs([f / 1e12 for f in flops], range(1, len(flops) + 2), baseline=None, label=label, **style)
    # Logarithmic: the few busiest of many ranks are what decides.
    _powers_of_two(axis, "rank of a stage, the busiest is 1")
    axis.set(ylabel="Newton-Schulz (TFLOP a step)", ylim=(0, None), title="Balance")
    if len(planned.stages) > 1:
        axis.legend()


def _times(planned: Planned, axis: Any) -> None:
    sizes = {planned.model.sizes(ranks)["dp"]: step_seconds(planned, stages) for ranks, stages in planned.sweep.items()}
    for key, label, style in (("muon_step", "Muon", "C1o-"), ("adamw_step", planned.model.baseline, "C0o-")):
        axis.plot(list(sizes), [1e3 * seconds[key] for seconds in sizes.values()], style, label=label)
    _powers_of_two(axis, "DP (ranks)")
    axis.set(ylabel="optimizer step (ms)", ylim=(0, None))
    axis.set_title(f"Step at {planned.rates.tflops:g} TFLOP/s, {planned.rates.gb_per_s:g} GB/s a rank")
    axis.legend()


def _powers_of_two(axis: Any, label: str) -> None:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set_xlabel(label)
