"""The paper's experiments at toy size: all run, resume and are reported; the arithmetic of the report by hand."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import ROOT
from tests.support.combinations import FULL
from tests.support.jobs import Process, environment
from tests.support.ranks import RankError

pytest.importorskip("transformers")
FOLDER = ROOT / "examples" / "paper"
sys.path.insert(0, str(FOLDER))

import experiments  # noqa: E402
import figures  # noqa: E402
import report  # noqa: E402
import trainer  # noqa: E402
from experiments import SCALES, Lab  # noqa: E402

TEXT = ROOT / "muon_plugin"


def execute(out: Path, *options: str) -> None:
    texts = ["--data", str(TEXT), "--shifted", str(ROOT / "docs")]
    with (out / "log").open("w") as log:
        process = Process(
            [str(FOLDER / "run.py"), "--scale", "test", *texts, "--out", str(out), *options], environment(), log
        )
    try:
        assert process.wait(timeout=300) == 0, (out / "log").read_text()[-3000:]
    finally:
        process.close()


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of all experiments, run once."""
    if not FULL:
        pytest.skip("FULL=1: all experiments of the paper, in a minute and a half of two cores")
    folder = tmp_path_factory.mktemp("paper")
    execute(folder, "--jobs", "2")
    return folder


def logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "test.jsonl").read_text().splitlines()][1:]


def test_every_experiment_runs_and_is_in_the_report(out):
    head, *results = [json.loads(line) for line in (out / "test.jsonl").read_text().splitlines()]
    text = report.report(head, results, out, "A note by hand.")
    assert "Not run" not in text
    assert "A note by hand." in text
    for picture in ("scaling", "shorter", "batch", "sweep", "decay", "entropy", "singular", "attention"):
        assert (out / f"{picture}.png").stat().st_size > 5_000, picture
        assert f"({picture}.png)" in text
    assert set(report.SECTIONS) == set(experiments.EXPERIMENTS)
    for result in results:
        assert len(result["points"]) == 2
        assert {"torch", "transformers", "muon_plugin", "processes"} <= set(result["versions"])
    missing = report.report(head, [r for r in results if r["config"]["kind"] != "moe"], out, "")
    assert missing.endswith("--scale test --experiments spectra\n")


def test_what_has_run_is_not_run_again(out):
    times = {file: file.stat().st_mtime_ns for file in (out / "results").iterdir()}
    gone = next(file for file in times if "moe" in file.name)
    gone.unlink()
    execute(out, "--jobs", "1", "--experiments", "spectra")
    assert {file for file in times if file.stat().st_mtime_ns != times[file]} == {gone}


def test_variants_of_muon_are_the_papers(out):
    """The update's RMS is r of full-rank matrices in the sweep; the baseline misses it where max(A, B) is not H."""
    found = {(r["config"]["update_rms"], r["config"]["scaling"], r["config"]["intermediate"]): r for r in logged(out)
             if r["config"]["optimizer"] == "Muon" and r["config"]["kind"] == "llama" and not r["config"]["start"]
             and r["config"]["layers"] == 2}  # fmt: skip
    for rms in experiments.UPDATE_RMS:
        update = found[rms, "adjusted", 40]["points"][-1]["update_rms"]
        assert update["query"] == pytest.approx(rms, rel=0.25)
        assert update["mlp"] == pytest.approx(rms, rel=0.25)
    wide = {name: found[0.2, name, 64]["points"][-1]["update_rms"] for name in experiments.SCALINGS}
    assert wide["update norm"]["mlp"] == pytest.approx(0.2, rel=1e-3)
    # Matrices of H x 4H get sqrt(H) where they need sqrt(4 H): half.
    assert wide["baseline"]["mlp"] / wide["adjusted"]["mlp"] == pytest.approx(0.5, rel=0.05)
    assert wide["baseline"]["query"] / wide["adjusted"]["query"] == pytest.approx(1.0, rel=0.05)


def run_of(kind: str, optimizer: str, **changes: Any) -> trainer.Run:
    scale = replace(SCALES["test"], limit=6)
    run = Lab(scale, lambda runs: []).run(2, kind, optimizer=optimizer)
    return replace(run, evaluations=3, **changes)


@pytest.mark.parametrize("changes", [{"update_rms": 0.4}, {"scaling": "baseline"}, {"norm_decay": False}, {}])
def test_decay_is_the_same_for_every_variant(changes):
    run = run_of("llama", "Muon", **changes)
    model = trainer.make_model(run)
    optimizer = trainer.make_optimizer(run, model)
    decays = {p: group["lr"] * group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for p in model.parameters():
        expected = 0.0 if p.dim() == 1 and not run.norm_decay else run.lr * 0.1
        assert decays[p] == pytest.approx(expected)


@pytest.mark.parametrize(("kind", "optimizer"), [("llama", "AdamW"), ("moe", "Muon")])
def test_an_interrupted_run_goes_on_to_the_same_bits(out, tmp_path, kind, optimizer, monkeypatch):
    (tmp_path / "data").symlink_to(out / "data")
    run = run_of(kind, optimizer)
    whole = trainer.train(run, tmp_path)
    (tmp_path / "results" / f"{run.name}.json").rename(tmp_path / "whole.json")
    monkeypatch.setattr(trainer, "SAVE_SECONDS", -1)
    monkeypatch.setattr(trainer, "SAVE_STEPS", 3)  # between two points, so that losses since the last one matter
    steps = iter(range(4))

    def killed(self: Any) -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        step(self)

    step = trainer.Trainer.step
    monkeypatch.setattr(trainer.Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(run, tmp_path)
    assert torch.load(tmp_path / "checkpoints" / f"{run.name}.pt", weights_only=True)["done"] == 3
    monkeypatch.setattr(trainer.Trainer, "step", step)
    assert trainer.train(run, tmp_path)["points"] == whole["points"]
    assert not list((tmp_path / "checkpoints").iterdir()), "a run that is done needs no checkpoint"


def test_another_text_needs_another_folder(out, tmp_path, monkeypatch):
    run = run_of("llama", "AdamW")
    texts = tmp_path / "data" / str(run.vocab) / "main"
    shutil.copytree(out / "data" / str(run.vocab) / "main", texts)
    before = trainer.train(run, tmp_path)
    assert trainer.train(run, tmp_path) == before
    np.save(texts / "train.npy", np.load(texts / "train.npy")[::-1])
    trainer.digest_of.cache_clear()  # as in a new process
    with pytest.raises(ValueError, match=f"{run.name}.json was trained on another text.*allowed: another --out"):
        trainer.train(run, tmp_path)


def test_a_batch_smaller_than_the_ranks_is_refused(ranks, out, tmp_path):
    (tmp_path / "data").symlink_to(out / "data")
    with pytest.raises(RankError) as caught:
        ranks(2).run(train_on_ranks, run_of("llama", "AdamW", batch=1), tmp_path, 1)
    assert all("a batch of 1 sequences on 2 ranks; allowed: at least one each" in e[1] for e in caught.value.errors)


class Gate(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("e_score_correction_bias", torch.zeros(3))


def balanced(rank: int, tokens: list[list[float]]) -> torch.Tensor:
    gate = Gate()
    biases = trainer.RouterBiases(gate)
    gate.tokens += torch.tensor(tokens[rank])
    biases.step(0.1)
    assert not gate.tokens.any(), "the next step counts from zero"
    return gate.e_score_correction_bias


def test_router_biases_count_the_tokens_of_all_ranks(ranks):
    """3, 5 and 4 tokens of both ranks together: rank 0 alone would lower the first expert."""
    for bias in ranks(2).run(balanced, [[3.0, 0.0, 1.0], [0.0, 5.0, 3.0]]):
        assert bias.tolist() == pytest.approx([0.1, -0.1, 0.0])


def train_on_ranks(rank: int, run: trainer.Run, folder: Path, micro_batch: int) -> dict[str, Any]:
    return trainer.train(run, folder, micro_batch)


@pytest.mark.parametrize(("kind", "optimizer"), [("llama", "Muon"), ("moe", "AdamW")])
def test_two_ranks_train_the_same_run(ranks, out, tmp_path, kind, optimizer):
    """And passes smaller than a rank's share of the batch add up to it."""
    run = run_of(kind, optimizer, batch=8)
    points = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "data").symlink_to(out / "data")
        points.append(ranks(number).run(train_on_ranks, run, folder, 8 if number == 1 else 2)[0]["points"])
    for one, two in zip(*points):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
        assert one["val_loss"] == pytest.approx(two["val_loss"], rel=1e-3)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-2)


def search_on(surface: Any, smallest: int = 1) -> tuple[trainer.Run, list[trainer.Run]]:
    asked: list[trainer.Run] = []

    def pretend(runs: Any) -> list[dict[str, Any]]:
        asked.extend(runs)
        return [{"diverged": run.lr > 1, "points": [{"val_loss": surface(run)}]} for run in runs]

    scale = replace(SCALES["test"], tuned={}, lr=2.0**-8, batch=2, smallest_batch=smallest)
    return Lab(scale, pretend).searched(1), asked


def test_the_search_finds_the_best_of_a_valley():
    def surface(run: trainer.Run) -> float:
        return abs(math.log2(run.lr) + 4) + abs(math.log2(run.batch) - 3)

    best, asked = search_on(surface)
    assert (best.lr, best.batch) == (2.0**-4, 8)
    around = {(run.lr, run.batch) for run in asked}
    assert around >= {(2.0**-3, 8), (2.0**-5, 8), (2.0**-4, 4), (2.0**-4, 16)}


def test_the_search_keeps_off_what_diverges_and_small_batches():
    best, asked = search_on(lambda run: -run.lr + run.batch, smallest=2)
    assert (best.lr, best.batch) == (1.0, 2)
    assert min(run.batch for run in asked) == 2
    assert experiments.loss_of({"diverged": False, "points": [{"val_loss": math.nan}]}) == math.inf


def test_laws_ratio_and_interval_by_hand():
    compute = np.array([1e10, 1e11, 1e12])
    adamw, muon = (10.0, 0.05), (9.8, 0.05)
    assert report.power_law(compute, adamw[0] * compute ** -adamw[1]) == pytest.approx(adamw)
    expected = (9.8 / 10) ** 20  # a_M C_M^-b = a_A C^-b
    assert report.flops_ratio(adamw, muon, 1e11) == pytest.approx(expected)
    loss = [(name, law) for name, law in (("AdamW", adamw), ("Muon", muon))]
    same = {name: [(c, [a * c**-b] * 3) for c in compute] for name, (a, b) in loss}
    assert report.ratio_interval(same, 1e11) == pytest.approx((expected, expected))
    spread = {name: [(c, [x * a * c**-b for x in (0.995, 1, 1.005)]) for c in compute] for name, (a, b) in loss}
    low, high = report.ratio_interval(spread, 1e11)
    assert low < expected - 0.02 < expected + 0.02 < high
    assert figures.crossing([0, 1, 2], [3.0, 2.0, 0.0], 1.0) == 1.5
    assert figures.crossing([0, 1], [3.0, 2.0], 1.0) is None
    assert report.mean_sd([1.0, 2.0, 3.0]) == "2.000 ± 1.000"


def test_the_scales_are_the_papers_where_they_say_so():
    """Table 2: heads = layers, hidden = 128 x layers, learning rate, batch, tokens; no search."""
    lab = Lab(SCALES["paper"], lambda runs: pytest.fail("a search"))
    run = lab.searched(12)
    assert (run.heads, run.hidden, run.lr, run.batch, run.tokens) == (12, 1536, 9.503e-4, 96, 8.92e9)
    assert run.parameters == pytest.approx(12 * 12 * 1536**2, rel=0.01)


@pytest.mark.skipif(not FULL, reason="FULL=1")
@pytest.mark.parametrize("log", ["toy.jsonl", "small/small.jsonl"])
def test_the_repositorys_report_is_what_its_log_gives(tmp_path, log):
    file = ROOT / "docs" / "paper" / log
    shown = file.parent
    head, *results = [json.loads(line) for line in file.read_text().splitlines()]
    text = report.report(head, results, tmp_path, (shown / "notes.md").read_text())
    assert text == (shown / "report.md").read_text()
    assert sum(file.stat().st_size for file in shown.iterdir()) < 3e6
