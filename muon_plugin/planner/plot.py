"""The plan as a picture: the balance over ranks, and step times over DP sizes."""

from __future__ import annotations

from pathlib import Path

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
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(11, 4), layout="constrained")
    balance, times = figure.subplots(1, 2)
    for of_stage in planned.stages:
        flops = sorted(of_stage.by_rank(lambda load: load.flops), reverse=True)
        label = f"stage {stages_name(of_stage.stage.numbers)}" if len(planned.stages) > 1 else None
        balance.step(range(len(flops)), [f / 1e12 for f in flops], where="post", label=label)
    balance.set(xlabel="ranks of a stage, the busiest first", ylabel="Newton-Schulz, TFLOP a step", ylim=(0, None))
    balance.set_title("Balance")
    if len(planned.stages) > 1:
        balance.legend()
    sizes = {planned.model.sizes(ranks)["dp"]: step_seconds(planned, stages) for ranks, stages in planned.sweep.items()}
    for key, label in (("muon_step", "Muon"), ("adamw_step", planned.model.baseline)):
        times.plot(list(sizes), [1e3 * seconds[key] for seconds in sizes.values()], "o-", label=label)
    times.set(xlabel="DP", ylabel="optimizer step, ms", ylim=(0, None))
    times.set_xscale("log", base=2)
    times.set_title(f"Step at {planned.rates.tflops:g} TFLOP/s, {planned.rates.gb_per_s:g} GB/s a rank")
    times.legend()
    figure.savefig(path, dpi=120)
