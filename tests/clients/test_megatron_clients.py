"""Megatron-Bridge and verl, which train with Megatron-Core: Muon beside their AdamW."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.combinations import FULL
from tests.support.integers import differing
from tests.support.jobs import environment
from tests.support.ranks import client_libraries, release
from tests.support.session import free_port

pytestmark = pytest.mark.skipif(not FULL, reason="FULL=1")

LR, DECAY = 0.01, 0.1


def test_megatron_bridge_pretrains_with_muon_as_with_adamw(tmp_path):
    libraries = client_libraries("megatron/bridge"), release("0.19.2")
    printed = {}
    for optimizer, through in (("adam", []), ("muon", ["-m", "muon_plugin"])):
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
        script = ["-m", "tests.support.megatron_bridge", optimizer, str(tmp_path)]
        printed[optimizer] = run([*torchrun, *through, *script], *libraries)
    check(tmp_path, printed["muon"], fall=0.8)
    assert "muon_plugin ---" not in printed["adam"]


def test_verl_trains_with_muon_as_with_adamw_in_workers_of_ray(ranks, tmp_path):
    """With optimizer_offload, verl moves AdamW's state and the main parameters away between steps, and back."""
    libraries = client_libraries("verl"), client_libraries("megatron/bridge"), release("0.19.2")
    ranks.clients(1, prepare, tmp_path)
    printed = {}
    for arguments in (["adam"], ["muon"], ["muon", "--offload"]):
        command = ["-m", "tests.support.verl_engine", arguments[0], str(tmp_path), *arguments[1:]]
        printed["".join(arguments)] = run(command, *libraries)
    check(tmp_path, printed["muon"], fall=0.5)
    kept, offloaded = (torch.load(tmp_path / f"muon{end}.pt")["weights"][-1] for end in ("", "--offload"))
    assert differing(kept, offloaded) == []


def prepare(rank: int, folder: Path) -> None:
    from tests.support import hugging_face as hf

    hf.llama().save_pretrained(folder / "model")
    hf.tokenizer().save_pretrained(folder / "model")


def run(arguments: list[str], *libraries: Path) -> str:
    """What the program printed, with these folders in front of the environment's packages."""
    own = environment(*libraries, HF_HUB_OFFLINE="1")
    command = [sys.executable, *arguments]
    found = subprocess.run(command, env=own, capture_output=True, text=True, timeout=600, check=False)
    output = found.stdout + found.stderr
    assert found.returncode == 0, output[-5000:]
    return output


def check(folder: Path, printed: str, fall: float) -> None:
    """One table; from the same weights and gradients AdamW's bits in all that it trains, Muon's update in matrices."""
    assert printed.count("muon_plugin ---") == 1
    assert re.search(r"Muon +8 parameters, .*\n(.*\n)+.*AdamW +7 parameters", printed)
    adamw, muon = (_loaded(folder, optimizer) for optimizer in ("adam", "muon"))
    before, after, end = muon["weights"]
    assert differing(before, adamw["weights"][0]) == []
    matrices = {name for name, p in before.items() if p.dim() > 1 and not re.search("embedding|output_layer", name)}
    assert set(differing(after, adamw["weights"][1])) == matrices
    for name in matrices:
        size = (before[name] * (1 - LR * DECAY) - after[name]).square().mean().sqrt() / LR
        assert 0.12 < size < 0.25, name  # 0.2 if all singular values were 1 (Eq. 4)
    assert set(differing(before, end)) == set(before), "what did not move"
    fell = [run["losses"][0] - run["losses"][-1] for run in (adamw, muon)]
    assert min(fell) > fall, fell


def _loaded(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / f"{name}.pt")
