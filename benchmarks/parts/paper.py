"""The paper's claim at a small scale: Muon with fewer tokens, and AdamW with as few as the control (examples/paper).

One case of many runs. Each run is written down when it ends, so that a machine that comes later goes on with the rest.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.parts.record import Case, Found, Progress, Setup
from benchmarks.parts.tables import failures, table, title

ROOT = Path(__file__).resolve().parent.parent.parent
EXPERIMENTS = {"full": ("control", "scaling", "shorter", "attention"), "tiny": ("control",)}
#: 14 runs at a time share an H100 under MPS. Each takes a core.
JOBS = 14
POLL = 0.5  # seconds


def cases(setup: Setup, opened: ExitStack) -> Iterator[Case]:
    scale = "test" if setup.tiny else "small"
    yield Case(f"scale {scale}: {', '.join(EXPERIMENTS[setup.size])}", functools.partial(train, setup, scale))


def train(setup: Setup, scale: str, progress: Progress) -> dict[str, Any]:
    """Runs the experiments, or what is left of them, and draws the report."""
    work = setup.out / "paper"
    results = work / "results"
    results.mkdir(parents=True, exist_ok=True)
    known = {line["name"] for line in progress.before}
    for line in progress.before:
        (results / f"{line['name']}.json").write_text(json.dumps(line))
    jobs = 1 if setup.device == "cpu" else max(1, min(JOBS, len(os.sched_getaffinity(0)) - 2))
    command = [sys.executable, str(ROOT / "examples" / "paper" / "run.py"), "--scale", scale, "--out", str(work)]
    command += ["--experiments", *EXPERIMENTS[setup.size], "--jobs", str(jobs)]
    if setup.tiny:
        command += ["--data", str(ROOT / "muon_plugin" / "core"), "--shifted", str(ROOT / "docs")]

    def write_new() -> None:
        for file in sorted(results.glob("*.json")):
            if file.stem not in known:
                known.add(file.stem)
                progress.write(json.loads(file.read_text()))

    with sharing(setup.device, work) as variables, (work / "log").open("w") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
        while process.poll() is None:
            time.sleep(POLL)
            write_new()
    write_new()
    if process.returncode:
        raise RuntimeError(
            f"examples/paper/run.py ended with {process.returncode}: {(work / 'log').read_text()[-3000:]}"
        )
    return {"runs": len(known), "report": drawn(work / f"{scale}.jsonl", setup.out / "paper_report")}


def drawn(logged: Path, out: Path) -> str:
    """Where the report with its pictures is, or why there is none."""
    command = [sys.executable, str(ROOT / "examples" / "paper" / "report.py"), "--logged", str(logged)]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    return f"{out.name}/report.md" if done.returncode == 0 else done.stderr.strip()[-1000:]


@contextmanager
def sharing(device: str, work: Path) -> Iterator[Mapping[str, str]]:
    """Environment variables for processes that share a GPU under NVIDIA's MPS, where that is installed and works."""
    plain = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if device == "cpu" or shutil.which("nvidia-cuda-mps-control") is None:
        yield plain
        return
    shared = plain | {f"CUDA_MPS_{kind}_DIRECTORY": str(work / "mps" / kind.lower()) for kind in ("PIPE", "LOG")}
    for kind in ("pipe", "log"):
        (work / "mps" / kind).mkdir(parents=True, exist_ok=True)

    def control(*arguments: str, said: str = "") -> bool:
        command = ["nvidia-cuda-mps-control", *arguments]
        try:
            return subprocess.run(command, env=shared, input=said, text=True, timeout=30).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    there = control(said="get_server_list\n") or control("-d")  # one that an interrupted run has left is taken
    works = [sys.executable, "-c", "import torch; torch.zeros(1, device='cuda').item()"]
    try:
        yield shared if there and subprocess.run(works, env=shared).returncode == 0 else plain
    finally:
        if there:
            control(said="quit\n")


def report(setup: Setup, found: dict[str, Found], on: dict[str, Any]) -> str:
    parts = [title("The paper at a small scale", on)]
    for name, one in found.items():
        parts += [f"## {name}", f"{len(one.partial)} runs ({one.state}). {one.value.get('report', '')}".strip()]
        parts.append(losses(one.partial))
    return "\n\n".join(parts) + failures(found) + "\n"


def losses(runs: list[dict[str, Any]]) -> str:
    """Validation loss by size, optimizer and tokens; those runs that differ in their seed alone together."""
    groups: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for run in runs:
        config = run["config"]
        loss = float("nan") if run["diverged"] else run["points"][-1]["val_loss"]
        kept = ("layers", "optimizer", "tokens", "lr", "batch")
        groups[(run["parameters"], *(config[key] for key in kept))].append(loss)
    rows = []
    for (parameters, layers, optimizer, tokens, lr, batch), values in sorted(groups.items()):
        spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
        rows.append([f"{parameters:,}", layers, optimizer, f"{tokens:,}", lr, batch, f"{mean(values):.3f}{spread}"])
    return table(["parameters", "layers", "optimizer", "tokens", "learning rate", "batch", "validation loss"], rows)
