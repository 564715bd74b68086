"""The checks and measurements on a GPU, in parts; docs/gpu.md says what each gives.

    python benchmarks/gpu.py                                # all parts, 8 minutes each at most
    python benchmarks/gpu.py --part bits --minutes 5
    python benchmarks/gpu.py --device cpu --size tiny       # the same code in seconds, without a GPU

Each part writes what it finds to OUT/PART.jsonl while it runs, and goes on there when it is started again. A case that
fails, or ends its process, is written down and does not stop the others.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib
import importlib.metadata
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.parts.record import FINAL, Case, Progress, Record, Setup, pending  # noqa: E402

#: In the order of their value. Each module has `cases(setup, opened)`, where `opened` is closed when all have
#: run, and `report(setup, found, on)`: Markdown.
PARTS = {name: f"benchmarks.parts.{name}" for name in ("bits", "newton_schulz", "steps", "paper")}
MINUTES = 8.0
#: Exit code of a worker whose device can no longer be used: a new process goes on.
BROKEN_DEVICE = 75
#: Releases on which results depend.
PACKAGES = ("torch", "triton", "deepspeed", "quack-kernels", "gram-newton-schulz", "transformers")


def environment(setup: Setup) -> dict[str, Any]:
    """What results depend on: those of another one do not count."""
    there = {name: _release(name) for name in PACKAGES}
    name, gpus = f"{platform.machine()}, CPU", 0
    if setup.device == "cuda":
        import torch

        name, gpus = torch.cuda.get_device_name(), torch.cuda.device_count()
    return {
        "device": name,
        "gpus": gpus,
        "size": setup.size,
        "python": platform.python_version(),
        **{name: release for name, release in there.items() if release},
        "muon_plugin": _digest(ROOT / "muon_plugin"),
    }


def _release(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _digest(folder: Path) -> str:
    """Of the source code in a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def work(part: ModuleType, setup: Setup, record: Record, until: float, again: bool = False) -> int:
    """Runs what is left of a part's cases, as long as there is time to begin one; the worker's exit code.

    Args:
        until: in the time of `time.time()`.
        again: those that failed too.
    """
    on = environment(setup)
    if record.last_run() != on:
        record.write(run=on)
    for name, one in record.found(on).items():
        if again and one.state in FINAL[1:]:
            record.write(case=name, state="again")
    with ExitStack() as opened:
        cases = list(part.cases(setup, opened))
        while (left := pending(cases, found := record.found(on))) and time.time() < until:
            before = found[left[0].name].partial if left[0].name in found else []
            if not attempt(left[0], record, before) and setup.device == "cuda" and not usable():
                return BROKEN_DEVICE
    record.write(left=[case.name for case in left])
    return 0


def attempt(case: Case, record: Record, before: list[dict[str, Any]]) -> bool:
    """Runs a case and writes down how it ended; whether it passed."""
    record.write(case=case.name, state="began")
    print(f"  {case.name} ...", end=" ", flush=True)
    start = time.perf_counter()
    try:
        found = case.run(Progress(lambda value: record.write(case=case.name, state="partial", value=value), before))
    except Exception as error:
        value = {"error": f"{type(error).__name__}: {error}"[:4000], "trace": traceback.format_exc()[-2000:]}
        state = "failed"
    else:
        value, state = found, "passed"
    seconds = round(time.perf_counter() - start, 2)
    record.write(case=case.name, state=state, seconds=seconds, value=value)
    print(f"{state} in {seconds:.1f} s" + (f": {value['error'][:300]}" if state == "failed" else ""), flush=True)
    return state == "passed"


def usable() -> bool:
    """Whether this process can still use its GPU: after an illegal access it cannot."""
    import torch

    try:
        torch.zeros(1, device="cuda").add_(1).item()
    except RuntimeError:
        return False
    return True


def run_part(name: str, setup: Setup, minutes: float, again: bool = False) -> Record:
    """Runs a part in processes of its own, and stops it at the time limit."""
    record = Record(setup.out / f"{name}.jsonl")
    until = time.time() + 60 * minutes
    print(f"{name}:", flush=True)
    while time.time() < until:
        command = [sys.executable, __file__, "--worker", PARTS[name], "--device", setup.device, "--size", setup.size]
        command += ["--out", str(setup.out), "--until", str(until), *(["--again"] if again else [])]
        again = False  # once
        process = subprocess.Popen(command, start_new_session=True, preexec_fn=_die_with_parent)
        try:
            code = process.wait(timeout=until - time.time())
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        if code == 0:
            break
        if code == BROKEN_DEVICE:
            continue
        running = record.running()
        if code is None:
            if running is not None:
                record.write(case=running, state="late")
            print(f"  stopped after {minutes:g} minutes; start it again to go on", flush=True)
            break
        why = f"the process ended with {-code and signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
        print(f"  {why}", flush=True)
        if running is None:  # not a case: the part itself
            record.write(part=name, state="failed", value={"error": why})
            break
        record.write(case=running, state="died", value={"error": why})
    _report(name, setup, record)
    return record


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _end(process: subprocess.Popen) -> None:
    """With all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _report(name: str, setup: Setup, record: Record) -> None:
    """OUT/PART.md; an error there must not cost what was measured, nor the next part."""
    try:
        if record.found():
            text = importlib.import_module(PARTS[name]).report(setup, record.found(), record.last_run() or {})
            (setup.out / f"{name}.md").write_text(text)
    except Exception:
        traceback.print_exc()


def summary(names: list[str], setup: Setup) -> tuple[str, bool]:
    """What the parts have come to, in a few lines, and whether everything has passed."""
    lines, good = [], True
    for name in names:
        record = Record(setup.out / f"{name}.jsonl")
        found = record.found()
        last = next(reversed(list(record.lines())), {})
        bad = {case: one for case, one in found.items() if one.state in FINAL[1:]}
        passed = sum(one.state == "passed" for one in found.values())
        left = f"{len(last['left'])} left" if "left" in last else "stopped before the end"
        lines.append(f"{name}: {passed} passed, {len(bad)} failed, {left}")
        lines += [f"    {case}: {one.state}: {one.value.get('error', '')[:200]}" for case, one in bad.items()]
        lines += [f"    {last['value']['error']}"] if "part" in last else []
        good = good and not bad and last.get("left") == []
    return "\n".join(lines), good


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS), help="(default: all, in this order)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "tiny"), help="(default: full on cuda, tiny on the CPU)")
    parser.add_argument("--out", type=Path, help="(default: benchmarks/results/gpu; runs/gpu_on_cpu on the CPU)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of each part at most (default: %(default)g)")
    parser.add_argument("--again", action="store_true", help="run again what has failed, too")
    parser.add_argument("--new", action="store_true", help="remove the results that are there, and begin anew")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.size = args.size or ("full" if args.device == "cuda" else "tiny")
    default = "benchmarks/results/gpu" if args.device == "cuda" else "runs/gpu_on_cpu"
    args.out = (args.out or ROOT / default).resolve()
    return args


def main() -> None:
    args = parse_args()
    setup = Setup(args.device, args.size, args.out)
    if args.worker:
        # A hang of ranks costs four minutes and not the part; a release that is missing is an error and not skipped.
        os.environ |= {"DS_ACCELERATOR": args.device, "RANKS_TIMEOUT": "240", "REQUIRE_RELEASES": "1"}
        name = args.worker.rpartition(".")[2]
        part = importlib.import_module(args.worker)
        sys.exit(work(part, setup, Record(args.out / f"{name}.jsonl"), args.until, args.again))
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            sys.exit("benchmarks/gpu.py: there is no CUDA device here; --device cpu runs the same code on small sizes")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.new:
        for name in args.part:
            (args.out / f"{name}.jsonl").unlink(missing_ok=True)
            shutil.rmtree(args.out / name, ignore_errors=True)
    for name in args.part:
        run_part(name, setup, args.minutes, args.again)
    text, good = summary(args.part, setup)
    print("\n" + text)
    sys.exit(not good)


if __name__ == "__main__":
    main()
