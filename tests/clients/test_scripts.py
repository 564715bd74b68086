"""LLaMA-Factory and ms-swift, started by their own scripts with their own configuration, on DeepSpeed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import ROOT
from tests.support.combinations import FULL
from tests.support.integers import differing
from tests.support.jobs import environment
from tests.support.moves import check
from tests.support.ranks import client_libraries
from tests.support.session import free_port

pytestmark = pytest.mark.skipif(not FULL, reason="FULL=1")

STEPS, SAVED = 4, 2
RATE, DECAY = 0.01, 0.1
#: What both are told, under the names that Hugging Face gives.
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": STEPS,
    "save_steps": 1,
    "logging_steps": 1,
    "learning_rate": RATE,
    "weight_decay": DECAY,
    "lr_scheduler_type": "linear",
    "use_cpu": True,
    "bf16": False,
    "fp16": False,
    "report_to": "none",
}


def llamafactory(folder: Path, out: Path, checkpoint: Path | None) -> list[str]:
    """Its launcher, started by torchrun through the plugin; the optimizer is in the JSON."""
    config = {
        "model_name_or_path": str(folder / "model"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "text",
        "dataset_dir": str(folder),
        "template": "empty",
        "output_dir": str(out),
        "deepspeed": str(folder / "muon.json"),
        **COMMON,
    }
    if checkpoint is not None:
        config["resume_from_checkpoint"] = str(checkpoint)
    file = folder / f"{out.name}.yaml"  # of which JSON is a part
    file.write_text(json.dumps(config))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    return [*torchrun, "-m", "muon_plugin", "-m", "llamafactory.launcher", str(file)]


def swift(folder: Path, out: Path, checkpoint: Path | None) -> list[str]:
    """`swift sft`, which starts torchrun itself; the optimizer is a plugin of swift's."""
    config = {
        "model": folder / "model",
        "model_type": "llama",
        "template": "dummy",
        "tuner_type": "full",
        "dataset": folder / "messages.jsonl",
        "split_dataset_ratio": 0,
        "output_dir": out,
        "add_version": False,
        "torch_dtype": "float32",
        "deepspeed": folder / "none.json",
        "external_plugins": ROOT / "examples" / "swift" / "muon.py",
        "optimizer": "muon_plugin",
        "warmup_ratio": 0,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        **COMMON,
    }
    if checkpoint is not None:
        config["resume_from_checkpoint"] = checkpoint
    return [
        "-m",
        "swift.cli.main",
        "sft",
        *(word for key, value in config.items() for word in (f"--{key}", str(value))),
    ]


@pytest.mark.parametrize("client", [llamafactory, swift])
def test_a_client_of_its_own_script(ranks, tmp_path, client):
    libraries = client_libraries(client.__name__)
    ranks.clients(1, prepare, tmp_path)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    printed = launch(libraries, client, tmp_path, whole)
    assert printed.count("muon_plugin ---") == 1
    launch(libraries, client, tmp_path, resumed, whole / f"checkpoint-{SAVED}")

    # Few tokens have labels: gradients lack rank, which makes updates smaller.
    names = check(moves(weights(tmp_path / "model"), weights(whole / "checkpoint-1")), spread=0.1)
    assert [len(names["muon"]), len(names["adamw"])] == [14, 7]
    state = json.loads((whole / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    ends = [weights(run / f"checkpoint-{STEPS}") for run in (whole, resumed)]
    assert differing(*ends) == []


def launch(
    libraries: Path, client: Callable[..., list[str]], folder: Path, out: Path, resume: Path | None = None
) -> str:
    for_swift = {"USE_HF": "1", "NPROC_PER_NODE": "2", "MASTER_PORT": str(free_port())}
    own = environment(libraries, HF_HUB_OFFLINE="1", **for_swift)
    command = [sys.executable, *client(folder, out, resume)]
    found = subprocess.run(command, env=own, capture_output=True, text=True, timeout=900, check=False)
    output = found.stdout + found.stderr
    assert found.returncode == 0, output[-5000:]
    return output


def prepare(rank: int, folder: Path) -> None:
    """A model with its tokenizer, the data as either client reads it, a JSON with Muon and one without an optimizer."""
    from tests.support import hugging_face as hf

    hf.llama().save_pretrained(folder / "model")
    hf.tokenizer().save_pretrained(folder / "model")
    pairs = [(hf.words(ids[:6]), hf.words(ids[6:])) for ids in hf.texts()]
    rows = [{"instruction": asked, "input": "", "output": answer} for asked, answer in pairs]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"text": {"file_name": "alpaca.json"}}))
    roles = [[{"role": "user", "content": asked}, {"role": "assistant", "content": answer}] for asked, answer in pairs]
    (folder / "messages.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for messages in roles))
    (folder / "muon.json").write_text(json.dumps(hf.settings(2)))
    (folder / "none.json").write_text(json.dumps(hf.settings(2, optimizer=False)))


def weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def moves(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, tuple[str, list[float]]]:
    """What `Moves` finds, from files: the first step, at the full rate."""
    found = {}
    for name, p in before.items():
        half = "adamw" if re.search("norm|embed|lm_head", name) else "muon"
        update = after[name].double() - p.double() * (1 - RATE * DECAY)
        size = update.abs().max() if half == "adamw" else update.square().mean().sqrt()
        found[name] = (half, [float(size / RATE)])
    assert all(torch.isfinite(p).all() for p in after.values())
    return found
