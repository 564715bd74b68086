"""benchmarks/gpu.py on the CPU: each part as it runs on a GPU, with small sizes; and parts that are interrupted."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks import gpu
from benchmarks.parts import bits, newton_schulz, paper, profiles, steps
from benchmarks.parts.record import Found, Progress, Record, Setup
from tests.support import ROOT, staged
from tests.support.combinations import FULL
from tests.support.integers import config, differing, trained
from tests.support.megatron_model import Layout
from tests.support.megatron_model import trained as megatron_trained
from tests.support.ranks import Ranks, release

RELEASE = "0.19.2"


@pytest.fixture(autouse=True)
def _environment():
    """Parts set variables, for the process that runs them alone."""
    with mock.patch.dict(os.environ):
        yield


def worked(name: str, out: Path, leave: tuple[str, ...] = ()) -> dict[str, Found]:
    """What a part found in this process, in which torch is imported and the ranks' servers run.

    Args:
        leave: what begins so is left out.
    """
    setup, record = Setup("cpu", "tiny", out), Record(out / f"{name}.jsonl")
    part = importlib.import_module(gpu.PARTS[name])
    record.write(run=gpu.environment(setup))
    for case in part.cases(setup, gpu.ExitStack()) if leave else ():
        if case.name.startswith(leave):
            record.write(case=case.name, state="passed", value={})
    assert gpu.work(part, setup, record, time.time() + 300) == 0
    found = record.found()
    failed = {case: one.value for case, one in found.items() if one.state != "passed"}
    assert not failed
    gpu._report(name, setup, record)
    return found


def test_bits(tmp_path):
    release(RELEASE)
    found = worked("bits", tmp_path, leave=() if FULL else (bits.CORE,))
    assert found["ZeRO-1, bf16, 2 ranks"].value["elements"] > 10_000
    assert len(found["collectives between 2 processes"].value["operations"]) == 9
    text = (tmp_path / "bits.md").read_text()
    assert text.count("| passed |") == len(found)


def test_newton_schulz(tmp_path):
    found = worked("newton_schulz", tmp_path)
    time_of = found["time: 48x40, batch of 4"].value
    assert set(newton_schulz.forms(torch.device("cpu"))) < set(time_of)
    errors = found["errors: 24x96, normal"].value
    assert 0 < errors["gram, fp16, torch"] < errors["gram, bf16, torch"] < 0.1
    assert "| 24x96 | low rank |" in (tmp_path / "newton_schulz.md").read_text()


def test_each_library_of_the_products_is_measured_alone(monkeypatch):
    from dataclasses import dataclass

    from muon_plugin.core.products import Products

    @dataclass(frozen=True)
    class Shared(Products):
        releases: tuple[tuple[str, str], ...] = (("one", "1.0"), ("other", "2.0"))

    monkeypatch.setattr(newton_schulz, "products_on", lambda device, dtype: Shared())
    found = newton_schulz.backends(torch.device("cpu"), "fp16")
    assert list(found) == ["torch", "shared", "one", "other"]
    assert found["one"] == Shared((("one", "1.0"),))


@pytest.mark.skipif(not FULL, reason="FULL=1; benchmarks are no promise, and the same runs are in the engines' tests")
def test_steps(tmp_path):
    release(RELEASE)
    found = worked("steps", tmp_path)
    assert "DeepSpeed: muon_plugin and AdamW" not in found, "the cases in their place are not needed"
    for engine in ("Megatron", "DeepSpeed"):
        (ranks,) = found[f"{engine}: all"].value.values()
        ours, adamw = (ranks[0][name]["profile"] for name in ("muon_plugin", "AdamW"))
        assert ours["kernels"] > adamw["kernels"] > 0
    alone = next(one.value for name, one in found.items() if name.startswith("one rank"))
    assert alone["muon_plugin"]["profile"]["kernels"] > 0
    assert "kernel of muon_plugin" in (tmp_path / "steps.md").read_text()
    assert list((tmp_path / "traces").iterdir())


@pytest.mark.skipif(not FULL, reason="FULL=1: half a minute of a core, most of it imports")
def test_paper(tmp_path):
    (one,) = worked("paper", tmp_path).values()
    assert one.value == {"runs": 2, "report": "paper_report/report.md"}
    assert len(one.partial) == 2


def test_the_paper_goes_on_with_the_runs_of_another_machine(tmp_path, monkeypatch):
    """What was written down lies where run.py looks for results; what it adds is written down, once."""
    seen: list[Any] = []
    script = tmp_path / "examples" / "paper" / "run.py"
    script.parent.mkdir(parents=True)
    script.write_text(
        "import sys, pathlib\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--out') + 1], 'results')\n"
        "assert [file.name for file in folder.iterdir()] == ['a.json']\n"
        "(folder / 'b.json').write_text('{\"name\": \"b\"}')\n"
    )
    monkeypatch.setattr(paper, "ROOT", tmp_path)
    monkeypatch.setattr(paper, "drawn", lambda logged, out: "drawn")
    found = paper.train(Setup("cpu", "tiny", tmp_path), "test", Progress(seen.append, [{"name": "a"}]))
    assert seen == [{"name": "b"}]
    assert found == {"runs": 2, "report": "drawn"}
    script.write_text("raise SystemExit('out of memory')")
    with pytest.raises(RuntimeError, match="ended with 1: out of memory"):
        paper.train(Setup("cpu", "tiny", tmp_path), "test", Progress(seen.append))


def everything_staged(rank: int) -> None:
    staged.install(lambda tensor: True)


def test_ranks_that_share_a_gpu_train_to_the_same_bits(ranks):
    """Here tensors on the CPU are copied and copied back in the place of those on a GPU."""
    for megatron, function, arguments in (
        (None, trained, (config(3, "bf16"), 2)),
        (RELEASE, megatron_trained, (Layout("moe", ep=2), 2)),
    ):
        alone = (config(0, "bf16"), 2) if megatron is None else (Layout("moe"), 2)
        expected = ranks.alone(function, *alone, megatron=megatron)
        pool = Ranks(2, megatron)
        try:
            pool.run(everything_staged)
            operations, _ = pool.run(bits.communicate, "cpu")[0]
            assert set(operations.values()) == {"right"}, operations
            for found in pool.run(function, *arguments):
                assert differing(found, expected) == []
        finally:
            pool.close()


def unstaged(rank: int) -> list[float]:
    """What arrives where a process group hands over the copies and nobody copies back."""
    staged._copy_back = lambda pairs: None
    everything_staged(rank)
    operations, _ = bits.communicate(rank, "cpu")
    return sorted(name for name, what in operations.items() if what != "right")


def test_the_check_of_the_collectives_finds_those_that_do_not_work():
    pool = Ranks(2)
    try:
        wrong = pool.run(unstaged)[0]
    finally:
        pool.close()
    assert len(wrong) == 9


def test_differing_bits_are_found_and_said():
    alone = {"a.weight": torch.ones(4), "a.weight (fp32)": torch.ones(4), "norm (fp32)": torch.ones(3)}

    def changed(name: str, by: float) -> list[dict[str, Tensor]]:
        return [{key: value + by if key == name else value for key, value in alone.items()}]

    assert bits.compared([alone], alone) == {"ranks": 1, "tensors": 3, "elements": 11}
    with pytest.raises(AssertionError, match=r"rank 0: norm \(fp32\)': '3 of 3 elements, 9.5e-07"):
        bits.compared(changed("norm (fp32)", 1e-6), alone)
    assert bits.compared(changed("norm (fp32)", 1e-6), alone, {"a.weight"})["tensors"] == 3
    for name, by in (("norm (fp32)", 1e-4), ("a.weight (fp32)", 1e-6)):
        with pytest.raises(AssertionError, match="bits differ"):
            bits.compared(changed(name, by), alone, {"a.weight"})


def event(category: str, start: float, length: float, name: str = "k", thread: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "ts": start, "dur": length, "name": name, "tid": thread}


def test_launches_and_gaps_of_a_trace():
    """Two streams overlap from 20 to 25; nothing runs from 10 to 20 and from 40 to 43, which is too short to count."""
    found = profiles.summarized(
        [
            event("kernel", 20, 15, "big"),
            event("kernel", 0, 10),
            event("gpu_memcpy", 25, 15, "copy"),
            event("kernel", 43, 1),
            event("cpu_op", 0, 100),
            event("gpu_user_annotation", 0, 1000),
            event("cuda_runtime", 1, 1, "cudaLaunchKernel"),
            event("cuda_runtime", 3, 1, "cudaDeviceSynchronize"),
        ],
        "cuda",
    )
    assert (found["kernels"], found["copies"], found["launches"], found["synchronizations"]) == (3, 1, 1, 1)
    assert (found["busy ms"], found["span ms"]) == (0.031, 0.044)
    assert (found["gaps over 5 us"], found["gaps ms"], found["longest gap ms"]) == (1, 0.01, 0.01)
    assert found["by kernel"] == [["big", 1, 0.015], ["copy", 1, 0.015], ["k", 2, 0.011]]
    nested = [event("cpu_op", 0, 10, "outer"), event("cpu_op", 2, 3, "inner"), event("cpu_op", 4, 9, "other", 2)]
    assert profiles.summarized(nested, "cpu")["by kernel"] == [["other", 1, 0.009], ["inner", 1, 0.003]]
    assert profiles.summarized([], "cuda")["kernels"] == 0


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Runs the part of tests/support/made_up_part.py for so many seconds: what its record says then."""
    monkeypatch.setitem(gpu.PARTS, "made_up_part", "tests.support.made_up_part")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(seconds: float, again: bool = False) -> dict[str, Found]:
        return gpu.run_part("made_up_part", Setup("cpu", "tiny", tmp_path), seconds / 60, again).found()

    return run


def test_a_part_that_is_started_again_goes_on_where_it_stopped(made_up, tmp_path):
    seconds = 3.0
    while True:  # a busy machine takes longer to come as far as the case that hangs
        first = made_up(seconds)
        if "hangs" in first or seconds > 100:
            break
        seconds *= 2
    states = {name: one.state for name, one in first.items()}
    assert states == {
        "first": "passed",
        "fails": "failed",
        "in place of fails": "passed",
        "dies": "died",
        "hangs": "late",
    }
    assert first["fails"].value["error"] == "ValueError: not today"
    assert first["dies"].value["error"] == "the process ended with SIGSEGV"
    assert first["hangs"].partial == [{"half": 1}]
    assert "dies died" in (tmp_path / "made_up_part.md").read_text()
    text, good = gpu.summary(["made_up_part"], Setup("cpu", "tiny", tmp_path))
    assert "2 passed, 2 failed, stopped before the end" in text
    assert not good

    second = made_up(60)
    order = [line["case"] for line in Record(tmp_path / "made_up_part.jsonl").lines() if line.get("state") == "began"]
    assert order == ["first", "fails", "in place of fails", "dies", "hangs", "last", "hangs"]
    assert second["hangs"].value == {"before": [{"half": 1}]}
    assert (second["fails"].state, second["dies"].state) == ("failed", "died"), "not again by itself"

    assert "4 passed, 2 failed, 0 left" in gpu.summary(["made_up_part"], Setup("cpu", "tiny", tmp_path))[0]

    third = made_up(60, again=True)
    assert (third["fails"].state, third["dies"].state) == ("passed", "died")
    assert {name: one.value["begun"] for name, one in third.items() if "begun" in one.value} == {
        "first": 1,
        "in place of fails": 1,
        "last": 1,
    }


def test_results_on_something_else_do_not_count(tmp_path, monkeypatch):
    part = importlib.import_module("tests.support.made_up_part")
    monkeypatch.setattr(part, "cases", lambda setup, opened, whole=part.cases: [next(whole(setup, opened))])
    setup, record = Setup("cpu", "tiny", tmp_path), Record(tmp_path / "part.jsonl")
    for code in ("a", "a", "b", "a"):
        monkeypatch.setattr(gpu, "_digest", lambda folder, code=code: code)
        gpu.work(part, setup, record, time.time() + 60)
        assert gpu.summary(["part"], setup) == ("part: 1 passed, 0 failed, 0 left", True)
    assert sum(line.get("state") == "began" for line in record.lines()) == 2
    assert record.found()["first"].value == {"begun": 1}, "the last run's, which is on what the first one was on"


def test_a_line_that_a_kill_has_cut_off_is_passed_over(tmp_path):
    record = Record(tmp_path / "part.jsonl")
    record.write(run={"on": 1})
    record.write(case="a", state="passed", value={})
    with record.file.open("a") as file:
        file.write('{"case": "b", "sta')
    assert list(record.found()) == ["a"]
    record.write(case="c", state="began")
    assert (list(record.found()), record.running()) == (["a", "c"], "c")


def test_a_worker_does_not_outlive_its_parent(tmp_path):
    """The machine's limit on a command kills the parent alone."""
    script = (
        "import sys; from benchmarks import gpu; from benchmarks.parts.record import Setup; from pathlib import Path\n"
        "gpu.PARTS['made_up_part'] = 'tests.support.made_up_part'\n"
        "gpu.run_part('made_up_part', Setup('cpu', 'tiny', Path(sys.argv[1])), 5)\n"
    )
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=variables, stdout=subprocess.DEVNULL)
    file, until = tmp_path / "begun hangs", time.monotonic() + 120
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.05)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert children
    while any(_runs(child) for child in children) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(_runs(child) for child in children)
    assert Record(tmp_path / "made_up_part.jsonl").running() == "hangs"


def _runs(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not FULL, reason="FULL=1: the processes and imports of all parts take two minutes")
def test_all_parts_by_their_command(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--out", str(tmp_path)]
    variables = {key: value for key, value in os.environ.items() if key != "MUON_TESTS_FOLDER"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all((tmp_path / f"{name}.md").exists() for name in gpu.PARTS)


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="no CUDA device here; --device cpu runs the same code on small sizes"):
        gpu.main()
    assert not (tmp_path / "out").exists()


def test_the_readme_of_the_parts_names_all_of_them():
    text = (ROOT / "docs" / "gpu.md").read_text()
    assert all(f"`{name}`" in text for name in gpu.PARTS)
    assert steps.OURS in text
