"""What the planner's table says beside the counts, and what it says of models and launch lines that it cannot plan."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from muon_plugin import planner
from muon_plugin.planner.command import printed, run
from muon_plugin.planner.tables import as_json
from tests.support.planned import LLAMA, MODEL


def planned_for(tmp_path, config: dict[str, Any], *arguments: str) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = planner.report(["--hf", str(tmp_path), "--nodes", "1", "--gpus-per-node", "2", *arguments])
    return " ".join(found.split())


def test_a_whole_ranks_memory_and_muons_share_of_a_step_are_told(tmp_path):
    found = planned_for(tmp_path, LLAMA, "--gpu-memory-gb", "0.0001", "--tokens", "4000", "--tokens-per-s", "1000")
    assert "55.44 k parameters" in found
    assert "GPU's 100.00 kB, MORE THAN IT HAS = weights 110.88 kB + gradients 110.88 kB + masters" in found
    assert "a training step of 4.00 k tokens takes 2.00 s with AdamW; Muon adds" in found
    costs = "the costliest of matrices, 3.30 MFLOP each: model.layers.*.mlp.gate_proj.weight (87x42), "
    assert costs in found
    assert "units: k 1e3" in found
    with pytest.raises(ValueError, match=r"--tokens 4000\.0 with --tokens-per-s None; allowed: both"):
        planned_for(tmp_path, LLAMA, "--tokens", "4000")


@pytest.mark.parametrize(
    ("stage", "zero", "params", "weights", "masters_and_state"),
    [
        (1, {"offload_optimizer": {"device": "cpu"}}, {}, 110_880, 0),
        (3, {"offload_optimizer": {"device": "nvme"}, "offload_param": {"device": "nvme"}}, {}, 0, 0),
        (3, {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, {}, 55_440, 0.5),
        (1, {"offload_optimizer": {"device": "none"}}, {}, 110_880, 1),
    ],
)
def test_what_zero_keeps_off_the_gpu_is_not_in_its_memory(tmp_path, stage, zero, params, weights, masters_and_state):
    def planned(section: dict[str, Any]) -> dict[str, int]:
        settings = {"bf16": {"enabled": True}, "optimizer": {"type": "Muon", "params": params}}
        settings["zero_optimization"] = {"stage": stage, "reduce_bucket_size": 1000, **section}
        for name, content in (("config", LLAMA), ("ds", settings)):
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        arguments = ["--hf", str(tmp_path), "--deepspeed", str(tmp_path / "ds.json"), "--nodes", "1"]
        return as_json(run([*arguments, "--gpus-per-node", "2"]))["memory_bytes_a_rank"]

    here, there = planned({}), planned(zero)
    assert there["weights"] == weights
    assert there["masters"] + there["state"] == masters_and_state * (here["masters"] + here["state"])
    assert there["total"] + there["away"] == here["total"]
    assert there["buffers"] == 2 * 1000


def test_an_offloaded_momentum_is_not_in_the_gpus_memory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "ds.json").write_text(json.dumps({"optimizer": {"type": "Muon", "params": {"offload": True}}}))
    arguments = ["--hf", str(tmp_path), "--deepspeed", str(tmp_path / "ds.json"), "--nodes", "1"]
    found = as_json(run([*arguments, "--gpus-per-node", "1"]))["memory_bytes_a_rank"]
    assert found["away"] == 4 * 3 * (42 * 42 * 2 + 2 * 42 * 14 + 3 * 42 * 87)  # of the matrices
    assert found["state"] == 8 * (3 * 2 * 42 + 42 + 2 * 97 * 42)


def test_a_class_that_transformers_does_not_have_is_named(tmp_path):
    found = planned_for(tmp_path, LLAMA | {"architectures": ["MyLlamaForCausalLM"]})
    assert "note: planned as LlamaForCausalLM: transformers has no MyLlamaForCausalLM" in found


def test_a_model_type_that_transformers_does_not_know_is_told_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="does not know model_type 'llama9'") as error:
        planned_for(tmp_path, LLAMA | {"model_type": "llama9"})
    assert len(str(error.value)) < 400
    with pytest.raises(ValueError, match="it is not a language model"):
        planned_for(tmp_path, {"model_type": "resnet"})


def test_what_is_not_built_of_a_model_is_told(tmp_path):
    text = LLAMA | {"model_type": "llama4_text", "head_dim": 14, "intermediate_size_mlp": 87, "num_local_experts": 2}
    tower = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower |= {"image_size": 28, "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32}
    both = {"model_type": "llama4", "text_config": text, "vision_config": tower | {"projector_output_dim": 32}}
    assert "note: without" not in planned_for(tmp_path, both)
    found = planned_for(tmp_path, both | {"architectures": ["Llama4ForCausalLM"]})
    assert "note: without vision_config: Llama4ForCausalLM does not have it" in found
    found = planned_for(tmp_path, {**LLAMA, "model_type": "glm4_moe", "head_dim": 14, "num_nextn_predict_layers": 1})
    assert "note: without the 1 layers of num_nextn_predict_layers: Glm4MoeForCausalLM has none" in found


OF_OTHERS = {
    "--no-such-flag 3 --apply-layernorm-1p --num-experts 4 --moe-token-dispatcher-type flex": (
        "note: left out, as this Megatron-Core does not know them: --no-such-flag 3"
    ),
    "--hybrid-layer-pattern M*M*": "--hybrid-layer-pattern M*M*: the planner builds GPTModel, whose layers are",
    "--muon-speed 3": "unrecognized arguments: --muon-speed 3",
}


@pytest.mark.parametrize("extra", OF_OTHERS)
def test_launch_lines_of_others_end_in_a_plan_or_in_one_line(ranks, extra):
    """Dispatchers that are not installed, Apex's norms, flags of a fork; Mamba, which is another model; a slip."""
    arguments = [part for part in MODEL if part not in ("--normalization", "RMSNorm")]
    told = ranks.forked(planned_or_why, ["--", *arguments, *shlex.split(extra)], megatron="0.19.2")
    assert OF_OTHERS[extra] in " ".join(told.split())


def test_with_strict_an_unknown_argument_is_an_error(ranks):
    told = ranks.forked(planned_or_why, ["--strict", "--", *MODEL, "--no-such-flag", "3"], megatron="0.19.2")
    assert told == "invalid Megatron arguments: unrecognized arguments: --no-such-flag 3"


def planned_or_why(rank: int, arguments: list[str]) -> str:
    try:
        return printed(run(["--nodes", "1", "--gpus-per-node", "4", *arguments]))
    except ValueError as error:
        return str(error)
