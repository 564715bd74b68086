"""configs/: every commented file has a plain twin, and every twin trains.

After an edit of a .jsonc, ``python -m tests.repository.test_configs`` writes the twins.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.support import ROOT
from tests.support.deepspeed_runs import resume, save
from tests.support.integers import IntegerModel, build, differing, train, trained
from tests.support.parallel_models import in_a_pipeline, with_experts

CONFIGS = ROOT / "configs"
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
    assert twin == plain(path.read_text()), "python -m tests.repository.test_configs writes the twins anew"
    json.loads(twin)


#: files whose models need more than a JSON, each tested below
OF_THEIR_OWN = ("autotp", "moe", "pipeline", "qk_clip", "resume_elsewhere")


@pytest.mark.parametrize(
    "path", [p for p in COMMENTED if not p.stem.endswith(OF_THEIR_OWN)], ids=lambda path: path.stem
)
def test_it_trains(ranks, tmp_path, path):
    settings = filled(json.loads(path.with_suffix(".json").read_text()), tmp_path)
    if settings["zero_optimization"].get("offload_optimizer", {}).get("device") == "nvme":
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible():
            pytest.skip("DeepSpeed cannot build async_io here: libaio is missing (apt install libaio-dev)")
        if not os.environ.get("TEST_NVME"):
            pytest.skip("DeepSpeed compiles async_io for minutes: TEST_NVME=1 runs it")
    apart = "sequence" if "ulysses" in path.stem else None
    for table, steps in ranks(2, apart=apart).run(two_steps, settings, "init" in path.stem):
        assert "Muon   8 parameters, 13 matrices" in table or ("fused" in path.stem and "7 parameters" in table)
        assert steps == 2


def settings_of(name: str, folder: Path) -> dict[str, Any]:
    return filled(json.loads((CONFIGS / f"deepspeed_{name}.json").read_text()), folder)


def test_autotp_trains_a_hugging_face_model_as_one_process_does(ranks, tmp_path):
    settings = settings_of("autotp", tmp_path)
    cut = ranks(2, apart="autotp").run(llama, settings)
    settings.pop("tensor_parallel")
    for whole in ranks(1, apart="autotp").run(llama, settings):
        for losses, table in cut:
            assert losses == pytest.approx(whole[0], rel=1e-3)
            assert "14 parameters, 14 matrices, 15,360 elements" in table
            assert "over 2 ranks" in table


def llama(rank: int, settings: dict[str, Any]) -> tuple[list[float], str]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, use_cache=False, **sizes))
    engine = build(rank, settings, model)
    losses = []
    for step in range(3):
        tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(step))
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses, engine.basic_optimizer.summary()


def test_qk_clip_trains_a_hugging_face_model(ranks, tmp_path):
    for losses, table in ranks(2).run(llama, settings_of("qk_clip", tmp_path)):
        assert len(losses) == 3
        assert "QK-Clip at 100 (alpha 0.5): 2 attention layers, 8 heads" in table


def test_moe_and_pipeline_train(ranks, tmp_path):
    assert (
        len(ranks(2, apart="experts").run(with_experts, settings_of("moe", tmp_path), 2)[0]) == 11
    )  # two of four experts a rank
    pipeline = settings_of("pipeline", tmp_path) | {"gradient_accumulation_steps": 2}
    assert len(ranks(2, apart="pipeline").run(in_a_pipeline, pipeline, 2)[1]) == 3  # one layer has no bias


def test_resuming_elsewhere(ranks, tmp_path):
    settings = settings_of("resume_elsewhere", tmp_path) | {"gradient_clipping": 0.0}  # to the bit
    ranks(1).run(save, {**settings, "checkpoint": {}}, tmp_path, 2)
    whole = ranks(1).run(trained, {**settings, "checkpoint": {}}, 3)[0]
    assert differing(ranks(2).run(resume, settings, tmp_path, 2, 1)[0], whole) == []


def filled(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """With values for "auto", a folder for NVMe, and the batches of IntegerModel."""
    settings.pop("train_batch_size", None)
    found = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found[key] = filled(value, folder)
        elif key in ("nvme_path", "output_path"):
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
