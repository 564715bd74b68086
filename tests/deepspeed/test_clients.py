"""Hugging Face's Trainer and accelerate: the user's script (clients.py) stays as it is, the JSON says Muon."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import SUPPORT
from tests.support.client_runs import CASES, STEPS
from tests.support.combinations import FULL
from tests.support.integers import IntegerModel, build, config, differing
from tests.support.jobs import environment, free_port
from tests.support.ranks import RankError

SCRIPT = SUPPORT / "clients.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "PORT"]
DEEPSPEED = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", "PORT"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed", "--num_processes", "2"]
ACCELERATE += ["--num_machines", "1", "--main_process_port", "PORT"]
#: client -> how the whole run is launched, and how the one that goes on from its checkpoint
LAUNCHES = {
    "trainer": ([*TORCHRUN, "-m", "muon_plugin"], [*DEEPSPEED, "--module", "muon_plugin"]),
    "accelerate": (TORCHRUN, [*ACCELERATE, "-m", "muon_plugin"]),
}


def launch(command: list[str], *arguments: str) -> str:
    register = [] if "muon_plugin" in command else ["--register"]
    port = str(free_port())
    command = [port if word == "PORT" else word for word in command]
    command += [str(SCRIPT), *arguments, *register]
    own = environment(HF_HUB_OFFLINE="1")
    found = subprocess.run(command, env=own, capture_output=True, text=True, timeout=600, check=False)
    output = found.stdout + found.stderr
    assert found.returncode == 0, output
    assert output.count("ended") == 2, output
    return output


@pytest.fixture(scope="module", params=LAUNCHES)
def runs(request, tmp_path_factory) -> dict[str, Any]:
    """The client's name, what each of two launches printed, and what they left: by stage, (whole run, resumed)."""
    if not FULL:
        pytest.skip("FULL=1; tests/clients trains with both in processes of its own")
    out = tmp_path_factory.mktemp(request.param)
    first, second = LAUNCHES[request.param]
    printed = [launch(first, request.param, str(out)), launch(second, request.param, str(out), "--resume")]
    left = {
        stage: [torch.load(out / f"{stage}-{run}.pt", weights_only=False) for run in ("whole", "resumed")]
        for stage in CASES
    }
    return {"client": request.param, "printed": printed, "left": left}


def test_our_muon_runs(runs):
    for printed in runs["printed"]:
        assert printed.count("muon_plugin ---") == len(CASES)
        assert printed.count("Muon   14 parameters, 14 matrices, 18,432 elements") == len(CASES)
    for stage, found in runs["left"].items():
        assert [run["optimizer"] for run in found] == ["muon_plugin.core.muon.Muon"] * 2
        assert [run["stage"] for run in found] == [stage] * 2


def test_auto_is_filled_in(runs):
    filled = {"lr": 0.01, "weight_decay": 0.1}
    if runs["client"] == "trainer":
        filled |= {"betas": [0.9, 0.95], "eps": 1e-8}
    for stage, (whole, _) in runs["left"].items():
        halves = {"muon_lr": 0.02, "adam_lr": 0.005} if runs["client"] == "trainer" and stage == 2 else {}
        assert whole["params"] == filled | halves
        assert {g["weight_decay"] for g in whole["groups"] if g["use_muon"]} == {0.1}
        if runs["client"] == "accelerate":  # a group of the user's own
            assert whole["groups"][-1]["weight_decay"] == 0.0


def test_hugging_faces_scheduler_drives_each_half_from_its_own_rate(runs):
    whole, _ = runs["left"][2]
    expected = {True: 0.02, False: 0.005} if runs["client"] == "trainer" else {True: 0.01, False: 0.01}
    assert {g["use_muon"]: g["initial_lr"] for g in whole["groups"]} == expected
    assert {g["lr"] for g in whole["groups"]} == {0.0}  # a cosine at its end


@pytest.mark.parametrize("stage", CASES)
def test_it_learns(runs, stage):
    losses = runs["left"][stage][0]["losses"]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("stage", CASES)
def test_resuming_ends_in_the_same_bits(runs, stage):
    whole, resumed = runs["left"][stage]
    assert differing(whole["weights"], resumed["weights"]) == []
    assert whole["groups"] == resumed["groups"]
    half = len(whole["losses"]) // 2
    assert half >= STEPS // 2
    assert whole["losses"][half:] == resumed["losses"][-half:]


@pytest.mark.parametrize("key", ["momentum", "muon_lr", "ns_steps", "exclude"])
def test_an_auto_that_nobody_fills_in_is_an_error(ranks, key):
    with pytest.raises(RankError, match=f"{key}='auto' is not valid .*Trainer fills in lr, weight_decay, betas"):
        ranks(2).run(build, config(1, params={key: "auto"}))


def test_a_muon_that_accelerate_replaced_is_refused(ranks):
    """With offload, `accelerate` makes a DeepSpeedCPUAdam of the groups of any optimizer, and says nothing."""
    with pytest.raises(RankError) as caught:
        ranks(2).run(replaced)
    for kind, message in caught.value.errors:
        assert kind == "ValueError"
        assert re.match("optimizer=AdamW holds the parameter groups of a muon_plugin.Muon", message)


def replaced(rank: int) -> None:
    from muon_plugin import Muon

    model = IntegerModel()
    muon = Muon(model.named_parameters(), model=model)
    settings = config(1)
    del settings["optimizer"]
    build(rank, settings, model, optimizer=torch.optim.AdamW(muon.param_groups, lr=0.01, weight_decay=0.1))
