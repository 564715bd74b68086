"""configs/: every commented file has a plain twin, and every twin trains.

After an edit of a .jsonc, ``python tests/test_configs.py`` writes the twins.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from integers import IntegerModel, build, train
from torch import nn

CONFIGS = Path(__file__).parent.parent / "configs"
COMMENTED = sorted(CONFIGS.glob("*.jsonc"))
#: what Hugging Face fills in, for IntegerModel
AUTO = {
    "lr": 0.01,
    "weight_decay": 0.1,
    "gradient_clipping": 1.0,
    "gradient_accumulation_steps": 1,
    "reduce_bucket_size": 1024,
    "stage3_prefetch_bucket_size": 921,
    "stage3_param_persistence_threshold": 320,
    "enabled": False,
    "warmup_min_lr": 0,
    "warmup_max_lr": 0.01,
    "warmup_num_steps": 2,
    "total_num_steps": 8,
}


def plain(commented: str) -> str:
    """Without the lines that are comments; none stands behind a value."""
    return re.sub(r"(?m)^ *//.*\n", "", commented)


def test_the_folder_is_pairs_and_its_readme_names_each():
    names = [path.stem for path in COMMENTED]
    assert sorted(path.stem for path in CONFIGS.glob("*.json")) == names
    lines = (CONFIGS / "README.md").read_text().splitlines()
    assert sorted(re.findall(r"\]\((.*?)\.jsonc\)", "\n".join(lines))) == names


@pytest.mark.parametrize("path", COMMENTED, ids=lambda path: path.stem)
def test_the_twin_is_the_commented_file_without_comments(path):
    twin = path.with_suffix(".json").read_text()
    assert twin == plain(path.read_text()), "python tests/test_configs.py writes the twins anew"
    json.loads(twin)


@pytest.mark.parametrize("path", COMMENTED, ids=lambda path: path.stem)
def test_it_trains(ranks, tmp_path, path):
    settings = filled(json.loads(path.with_suffix(".json").read_text()), tmp_path)
    if settings["zero_optimization"].get("offload_optimizer", {}).get("device") == "nvme":
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible():
            pytest.skip("DeepSpeed cannot build async_io here: libaio is missing (apt install libaio-dev)")
        if not os.environ.get("TEST_NVME"):
            pytest.skip("DeepSpeed compiles async_io for minutes: TEST_NVME=1 runs it")
    for table, steps in ranks(2).run(two_steps, settings, "init" in path.stem):
        assert "Muon   8 parameters, 13 matrices" in table or ("fused" in path.stem and "7 parameters" in table)
        assert steps == 2


def filled(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """With values for "auto", a folder for NVMe, and the batches of IntegerModel."""
    settings.pop("train_batch_size", None)
    found = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found[key] = filled(value, folder)
        elif key == "nvme_path":
            found[key] = str(folder)
        else:
            found[key] = 1 if key == "train_micro_batch_size_per_gpu" else AUTO[key] if value == "auto" else value
    return found


class Model(IntegerModel):
    """With a router, which one of the files keeps from Muon."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = nn.ModuleDict({"router": nn.Linear(24, 5)})


def two_steps(rank: int, settings: dict[str, Any], under_init: bool) -> tuple[str, int]:
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=under_init):
        model = Model()
    engine = build(rank, settings, model)
    train(engine, rank, 2)
    found = engine.basic_optimizer.summary(), engine.global_steps
    assert engine.skipped_steps == 0 or engine.fp16_enabled()
    engine.destroy()
    return found


if __name__ == "__main__":
    for path in COMMENTED:
        path.with_suffix(".json").write_text(plain(path.read_text()))
