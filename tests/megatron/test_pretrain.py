"""Megatron's own training loop with Muon, beside its AdamW: what moves, what is printed, what changes no bit."""

from __future__ import annotations

import math
import re

import pytest
from torch import Tensor

from tests.support import session
from tests.support.combinations import FULL
from tests.support.integers import differing
from tests.support.megatron_pretrain import EXPERTS, UNTIED, Run, pretrained
from tests.support.ranks import RankError

LR, DECAY = 0.01, 0.1
MUON, ADAMW = "--optimizer muon --muon-paper", "--optimizer adam"
TP, PP, EP = (f"--{name}-model-parallel-size 2" for name in ("tensor", "pipeline", "expert"))
MTP, VIRTUAL = "--mtp-num-layers 1", "--num-virtual-stages-per-pipeline-rank 2"

RUNS = {
    "experts, EP 2": (2, f"{UNTIED} {EP} {EXPERTS}"),
}
if FULL:
    RUNS |= {
        "dense, TP 2": (2, f"{UNTIED} {TP}"),
        "tied, PP 2, multi-token prediction": (2, f"{PP} {MTP}"),
        "dense": (1, UNTIED),
        "tied": (1, ""),
        "tied, TP 2, PP 2": (4, f"{TP} {PP}"),
        "multi-token prediction": (1, f"{UNTIED} {MTP}"),
        "untied, PP 2, multi-token prediction": (2, f"{UNTIED} {PP} {MTP}"),
        "experts, PP 2, EP 2": (4, f"{UNTIED} {PP} {EP} {EXPERTS}"),
        "biases, learned positions": (2, f"{TP} --position-embedding-type learned_absolute --add-qkv-bias"),
    }


@pytest.mark.parametrize("case", RUNS)
def test_megatrons_loop_trains_with_muon_as_with_adamw(case):
    """Copies of a tied embedding go to AdamW on every stage, also that of multi-token prediction."""
    world, arguments = RUNS[case]
    arguments += " --train-iters 8 --log-interval 2"
    adamw = pretrained(world, arguments, ADAMW, keep=[0, 1])
    muon = pretrained(world, arguments, MUON, keep=[0, 1, 2])
    assert fell(adamw) > 0.8
    assert fell(muon) > 0.8 * fell(adamw)
    check_first_step(muon[0], adamw[0])
    assert set(differing(muon[0].weights[0], muon[0].weights[-1])) == set(muon[0].weights[0]), "what did not move"
    check_table(muon)
    check_log(muon)


def fell(runs: list[Run]) -> float:
    """By how much the loss fell, on the last stage."""
    losses = runs[-1].losses
    return sum(losses[:2]) / 2 - sum(losses[-2:]) / 2


def is_matrix(name: str, p: Tensor) -> bool:
    """Megatron's own rule for Muon."""
    return p.dim() > 1 and "embedding" not in name and "output_layer" not in name


def check_first_step(muon: Run, adamw: Run) -> None:
    """From the same weights and gradients: the same bits in all that AdamW trains, Muon's update in all matrices."""
    before, after = muon.weights[0], muon.weights[1]
    assert differing(before, adamw.weights[0]) == []
    matrices = {name for name, p in before.items() if is_matrix(name, p)}
    assert set(differing(after, adamw.weights[1])) == matrices
    for name in matrices:
        size = rms([before[name] * (1 - LR * DECAY) - after[name]]) / LR
        assert 0.12 < size < 0.25, name  # 0.2 if all singular values were 1 (Eq. 4)


def rms(tensors: list[Tensor]) -> float:
    squares = sum(float(t.double().square().sum()) for t in tensors)
    return math.sqrt(squares / sum(t.numel() for t in tensors))


def check_table(runs: list[Run]) -> None:
    """Rank 0 prints one, of its own stage and experts."""
    assert [run.printed.count("muon_plugin ---") for run in runs] == [1] + [0] * (len(runs) - 1)
    held = {name: runs[0].weights[0][name] for name in runs[0].held}
    for half, of_muon in (("Muon", True), ("AdamW", False)):
        mine = [p for name, p in held.items() if is_matrix(name, p) is of_muon]
        line = rf"^  {half} +{len(mine)} parameters, .*\b{sum(p.numel() for p in mine):,} elements"
        assert re.search(line, runs[0].printed, re.M), runs[0].printed
    assert "as in the paper" in runs[0].printed


def check_log(runs: list[Run]) -> None:
    """The last rank prints the sizes of every second step, which Megatron logs: those of the whole model."""
    lines = [re.findall(r"^ \[muon\] iteration +(\d+)/ +8 \| (.*)$", run.printed, re.M) for run in runs]
    assert lines[:-1] == [[]] * (len(runs) - 1)
    assert [int(at) for at, _ in lines[-1]] == [2, 4, 6, 8]
    sizes = {name: float(value) for name, value in (pair.rsplit(" ", 1) for pair in lines[-1][0][1].split(" | "))}
    before, after = runs[0].weights[1], runs[0].weights[2]
    for experts in ("", "_experts"):
        names = [n for n, p in before.items() if is_matrix(n, p) and (".experts." in n) is bool(experts)]
        if names:
            updates = [(before[n] * (1 - LR * DECAY) - after[n]) / LR for n in names]
            assert sizes[f"update_rms/muon{experts}"] == pytest.approx(rms(updates), rel=2e-3)
            assert sizes[f"weight_rms/muon{experts}"] == pytest.approx(rms([after[n] for n in names]), rel=2e-3)
    assert 0 <= sizes["exchange_share"] < sizes["optimizer_share"] < 1


FROZEN = "*layers.0.mlp.linear_fc2.weight"
#: Layouts in which Megatron sums the same gradients in the same order, since there are two micro-batches in all.
SAME = {
    "PP 2": (2, PP),
    "DP 2, overlaps": (2, "--overlap-grad-reduce --overlap-param-gather"),
}
if FULL:
    SAME |= {
        "DP 2 x PP 2": (4, PP),
        "virtual stages": (2, f"{PP} {VIRTUAL}"),
        "virtual stages, overlapped": (
            2,
            f"{PP} {VIRTUAL} --overlap-grad-reduce --overlap-param-gather --overlap-param-gather-with-optimizer-step "
            "--ckpt-format torch",
        ),
        "offload": (2, "--muon-offload"),
    }


def alone() -> Run:
    """One process, for all tests of this run."""
    return session.once("pretrained alone", lambda: pretrained(1, UNTIED, MUON, LAYERS, keep=[0], frozen=FROZEN)[0])


LAYERS = "--num-layers 4"  # for two virtual stages on each rank


@pytest.mark.parametrize("case", SAME)
def test_the_layout_changes_no_bit_and_what_is_frozen_stays(case):
    world, arguments = SAME[case]
    expected = alone()
    moved = differing(expected.weights[0], expected.weights[-1])
    assert set(expected.weights[0]) - set(moved) == {"decoder.layers.0.mlp.linear_fc2.weight"}
    assert re.search(r"decoder\.layers\.\*\.mlp\.linear_fc2\.weight +32x80 +\(3\)", expected.printed)
    for run in pretrained(world, UNTIED, MUON, LAYERS, arguments, frozen=FROZEN):
        assert differing(run.weights[-1], expected.weights[-1]) == []


def test_a_model_that_is_frozen_as_a_whole_is_left_alone():
    """Megatron then turns the distributed optimizer off; with "muon" left on, it would look for a Muon of its own."""
    (run,) = pretrained(1, UNTIED, MUON, "--freeze-all-layers", keep=[0])
    assert differing(run.weights[0], run.weights[-1]) == []
    assert "muon_plugin ---" not in run.printed


def test_megatrons_own_muon_is_not_trained_with_the_papers_flag():
    with pytest.raises(RankError, match="--muon-paper with --optimizer muon without --use-distributed-optimizer"):
        pretrained(1, UNTIED, MUON, without="--use-distributed-optimizer")


def test_a_launch_line_stores_the_low_bits_of_main_parameters():
    """Though every launch line has an --fp8-recipe, whether it asks for fp8 or not."""
    precision = "--bf16 --use-precision-aware-optimizer --exp-avg-dtype bf16"
    (run,) = pretrained(1, UNTIED, MUON, precision, keep=[0])
    assert set(differing(run.weights[0], run.weights[-1])) == set(run.weights[0])
    settings = " ".join(run.printed.split())
    assert "exp_avg in bf16, of main parameters the 16 bits that weights lack" in settings


RESUMED = {
    "DP 2 to PP 2, bf16": (2, "--bf16", 2, f"--bf16 {PP}"),
}
if FULL:
    RESUMED |= {
        "experts, EP 2": (2, f"{EP} {EXPERTS}", 2, f"{EP} {EXPERTS}"),
        "PP 2 to DP 2, bf16": (2, f"--bf16 {PP}", 2, "--bf16"),
        "TP 2": (2, TP, 2, TP),
        "TP 2 x PP 2 to TP 2": (4, f"{TP} {PP}", 2, TP),
        "DP 2 to one, asynchronously": (2, "--async-save", 1, ""),
    }


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_ends_in_the_bits_of_one_that_never_stopped(case, tmp_path):
    """With --no-initialization, the weights are what was in memory until the checkpoint is loaded: here NaN."""
    world, arguments, other_world, other_arguments = RESUMED[case]
    saving = f"--save {tmp_path} --save-interval 3"
    straight = pretrained(world, UNTIED, MUON, arguments, saving, keep=[3])[0]
    loading = f"--load {tmp_path} --ckpt-step 3 --no-initialization"
    for run in pretrained(
        other_world, UNTIED, MUON, other_arguments, loading, keep=[3], filled=False, uninitialized_is_nan=True
    ):
        for step in (3, -1):
            assert differing(run.weights[step], straight.weights[step]) == [], step
