"""The metrics against numpy and by hand; the command on checkpoints of every engine."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from muon_plugin.metrics import (
    GROUPS,
    attention_logits,
    cut,
    group_of,
    matrices_of,
    rms,
    singular_values,
    svd_entropy,
    watch_attention,
)
from muon_plugin.metrics.__main__ import main
from muon_plugin.metrics.checkpoints import matrices, read
from tests.support import ROOT
from tests.support.deepspeed_runs import convert
from tests.support.integers import build as build_deepspeed
from tests.support.integers import config, train, weights
from tests.support.megatron_checkpoints import first_half
from tests.support.megatron_model import Layout

SAVED = ROOT / "tests" / "data" / "saved_by_0.1.0"


def llama(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **options)).eval()


def test_rms_is_the_root_of_the_mean_square():
    assert rms(torch.tensor([[3.0, -4.0], [0.0, 0.0]])) == 2.5
    assert rms(torch.full((1000,), 300.0, dtype=torch.float16)) == 300.0  # its square is beyond fp16
    assert np.isnan(rms(torch.empty(0)))


def test_svd_entropy_is_the_papers_formula():
    assert svd_entropy(torch.ones(7)) == pytest.approx(1.0, abs=1e-12)
    assert svd_entropy(torch.tensor([5.0, 0.0, 0.0])) == 0.0
    # By hand: p = 9/25, 16/25.
    by_hand = -(0.36 * np.log(0.36) + 0.64 * np.log(0.64)) / np.log(2)
    assert svd_entropy(torch.tensor([3.0, 4.0])) == pytest.approx(by_hand, abs=1e-12)
    assert svd_entropy(10 * torch.tensor([4.0, 3.0])) == pytest.approx(by_hand, abs=1e-12)
    matrix = torch.randn(20, 33, generator=torch.Generator().manual_seed(0))
    squares = np.linalg.svd(matrix.numpy(), compute_uv=False).astype(np.float64) ** 2
    p = squares / squares.sum()
    assert svd_entropy(singular_values(matrix)) == pytest.approx(-(p * np.log(p)).sum() / np.log(20), abs=1e-6)
    assert np.isnan(svd_entropy(torch.zeros(3)))


@pytest.mark.parametrize("sigma", [torch.ones(1), torch.ones(2, 2)])
def test_entropy_of_what_has_none_is_an_error(sigma):
    with pytest.raises(ValueError, match="2 or more singular values"):
        svd_entropy(sigma)
    with pytest.raises(ValueError, match="takes a matrix"):
        singular_values(torch.ones(2, 2, 2))


def test_attention_logits_against_numpy():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 700, 8, generator=generator) for heads in (4, 2))
    logits = np.einsum("bhqd,bhkd->bhqk", query.numpy(), key.repeat_interleave(2, 1).numpy()) * 0.5
    lower = np.tril(np.ones((700, 700), bool))
    for causal, seen in ((True, logits[..., lower]), (False, logits)):
        found = attention_logits(query, key, 0.5, causal=causal, threshold=3.0)
        assert found.max == pytest.approx(seen.max(), rel=1e-5)
        assert (found.above, found.count) == ((seen > 3.0).sum(), seen.size)
        assert found.share == (seen > 3.0).mean()
    last = attention_logits(query[:, :, -1:], key, 0.5)  # one new token sees all that came before
    assert (last.max, last.count) == (pytest.approx(logits[:, :, -1].max(), rel=1e-5), 2 * 4 * 700)
    mask = torch.zeros(2, 1, 700, 700, dtype=torch.bool)
    mask[..., :3] = True
    assert attention_logits(query, key, 0.5, mask=mask).max == pytest.approx(logits[..., :3].max(), rel=1e-5)
    assert attention_logits(query, key).max == pytest.approx(logits[..., lower].max() * 2 * 8**-0.5, rel=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_watch_attention_sees_rotated_queries_and_keys(implementation):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = llama(attn_implementation=implementation)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(300)
    tokens = torch.arange(40).view(2, 20)
    outputs: dict[tuple[int, str], torch.Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        for name in ("q_proj", "k_proj"):
            module = getattr(layer.self_attn, name)
            module.register_forward_hook(lambda _, __, out, key=(number, name): outputs.update({key: out}))
    before = model(input_ids=tokens).logits
    with watch_attention(model, threshold=1.0) as seen:
        during = model(input_ids=tokens).logits
        model(input_ids=tokens)  # adds to the counts, not to the shares
    assert torch.equal(before, during)
    cos, sin = model.model.rotary_emb(before, torch.arange(20)[None])
    for number in (0, 1):
        q, k = (outputs[number, name].view(2, 20, -1, 8).transpose(1, 2) for name in ("q_proj", "k_proj"))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        expected = attention_logits(q, k, threshold=1.0)
        assert seen[number].max == pytest.approx(expected.max, rel=1e-4)
        assert seen[number].count == 2 * expected.count
        assert seen[number].share == pytest.approx(expected.share, abs=1e-3)
    assert seen[1].max > 100 * seen[0].max
    seen.clear()
    model(input_ids=tokens)
    assert not seen, "it goes on watching"


def test_what_has_no_attention_of_transformers_cannot_be_watched():
    with pytest.raises(ValueError, match="Hugging Face model"), watch_attention(torch.nn.Linear(2, 2)):
        pass


NAMES = {
    "model.layers.0.self_attn.q_proj.weight": GROUPS[0],
    "model.layers.0.self_attn.o_proj.weight": GROUPS[0],
    "decoder.layers.3.self_attention.linear_proj.weight": GROUPS[0],
    "decoder.layers.3.self_attention.linear_qkv.weight[0]": GROUPS[0],
    "transformer.h.0.attn.c_proj.weight": GROUPS[0],
    "transformer.h.0.attn.c_attn.weight[0]": GROUPS[0],
    "layers.0.attention.wq.weight": GROUPS[0],
    "model.layers.0.self_attn.k_proj.weight": GROUPS[1],
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": GROUPS[1],
    "decoder.layers.3.self_attention.linear_qkv.weight[2]": GROUPS[1],
    "decoder.layers.0.self_attention.linear_kv_up_proj.weight[1]": GROUPS[1],
    "model.layers.1.mlp.experts.gate_up_proj[3,0]": "experts",
    "decoder.layers.1.mlp.experts.linear_fc1.weight0": "experts",
    "model.layers.1.mlp.experts.7.down_proj.weight": "experts",
    "deepspeed_moe.experts.deepspeed_experts.0.fc1.weight": "experts",
    "model.layers.1.mlp.shared_experts.up_proj.weight": "shared experts",
    "decoder.layers.1.mlp.shared_experts.linear_fc1.weight[1]": "shared experts",
    "model.layers.1.mlp.gate.weight": "router",
    "decoder.layers.1.mlp.router.weight": "router",
    "deepspeed_moe.gate.wg.weight": "router",
    "model.layers.0.mlp.gate_proj.weight": "dense",
    "decoder.layers.0.mlp.linear_fc2.weight": "dense",
    "transformer.h.0.mlp.c_proj.weight": "dense",
}


def test_groups_are_the_papers():
    assert {name: group_of(name) for name in NAMES} == NAMES


def test_matrices_of_a_model_are_those_of_muon():
    model = llama()
    found = dict(matrices_of(model))
    assert len(found) == 2 * 7
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], model.model.layers[1].mlp.up_proj.weight)


def test_command_on_hugging_face_checkpoints(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    phi = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "pad_token_id": 0}
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**phi, num_attention_heads=4, num_key_value_heads=2))
    model.save_pretrained(tmp_path / "phi")
    llama().save_pretrained(tmp_path / "llama")
    picture, everything = tmp_path / "a.png", tmp_path / "a.json"
    both = [str(tmp_path / name) for name in ("llama", "phi")]
    main([*both, "--each", "--plot", str(picture), "--json", str(everything)])
    printed = capsys.readouterr().out
    assert "attention K and V" in printed
    assert picture.stat().st_size > 10_000
    found = {entry["name"]: entry for entry in json.loads(everything.read_text())[both[1]]}
    # Phi-3's fused projections are taken apart by its config: 32 rows of query, 16 of key, 16 of value.
    value = model.model.layers[0].self_attn.qkv_proj.weight[48:]
    entry = found["model.layers.0.self_attn.qkv_proj.weight[2]"]
    assert (entry["shape"], entry["group"]) == ([16, 32], GROUPS[1])
    assert entry["rms"] == pytest.approx(rms(value))
    np.testing.assert_allclose(entry["sigma"], np.linalg.svd(value.detach().numpy(), compute_uv=False), rtol=1e-4)
    assert found["model.layers.0.mlp.gate_up_proj.weight[1]"]["shape"] == [48, 32]


def save_deepspeed(rank: int, stage: int, folder: Path) -> dict[str, torch.Tensor]:
    engine = build_deepspeed(rank, config(stage, "bf16"))
    train(engine, rank, 1)
    engine.save_checkpoint(str(folder), tag="tag")
    if rank == 0 and stage:
        convert(folder)
    torch.distributed.barrier()
    found = weights(engine)
    engine.destroy()
    if stage == 0:
        return {name: value for name, value in found.items() if not name.endswith(" (fp32)")}
    return {name.removesuffix(" (fp32)"): value for name, value in found.items() if name.endswith(" (fp32)")}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_deepspeed_checkpoints_are_read_whole(ranks, tmp_path, stage):
    expected = ranks(2).run(save_deepspeed, stage, tmp_path)[0]
    for folder in [tmp_path, tmp_path / "tag"] + [tmp_path / "universal"] * bool(stage):
        tensors, _ = read(folder)
        assert set(tensors) >= set(expected)
        for name, whole in expected.items():
            assert torch.equal(tensors[name].float(), whole.float()), (folder, name)


@pytest.mark.parametrize("other", ["layer_0_expert_1_mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"])
def test_a_checkpoint_of_which_one_file_is_a_part_is_refused(tmp_path, other):
    for name in ("mp_rank_00_model_states.pt", other):
        torch.save({"module": {"w": torch.ones(2, 2)}}, tmp_path / name)
    with pytest.raises(ValueError, match=f"{other} and others hold .*; allowed: "):
        read(tmp_path)


def test_of_two_forms_of_one_model_one_is_read(tmp_path):
    for name in ("model-00001-of-00001", "consolidated"):
        save_file({name: torch.ones(2, 2)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"model-00001-of-00001": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert list(read(tmp_path)[0]) == ["model-00001-of-00001"]


def of_megatron(name: str, whole: dict[str, torch.Tensor]) -> torch.Tensor:
    """The matrix as the parts of the weights gathered from the ranks say."""
    parameter, _, label = name.rstrip("]").partition("[")
    numbers = [int(number) for number in label.split(",") if number]
    if ".experts.experts." in parameter:
        parameter = parameter.replace("experts.experts", f"experts.local_experts.{numbers.pop(0)}")
    tensor = whole[parameter]
    if "linear_fc1" in parameter:
        return tensor.chunk(2)[numbers[0]]
    if "linear_qkv" in parameter:
        part = ((0, 12), (12, 18), (18, 24))[numbers[0]]
        return tensor.view(4, 24, 24)[:, part[0] : part[1]].reshape(-1, 24)
    return tensor


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout("moe", ep=2)], ids=["TP 2", "experts, EP 2"])
def test_megatron_checkpoints_are_read_whole_and_taken_apart(ranks, tmp_path, layout):
    whole = ranks(2, "0.19.2").run(first_half, layout, "fully_reshardable", str(tmp_path))[0]
    checkpoint, config = read(tmp_path)
    for split, arguments in (
        ({"linear_qkv": {"sizes": [12, 6, 6], "groups": 4}}, config),
        ({}, {"num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 6}),  # as Megatron's arguments say
    ):
        routing, tensors = matrices(checkpoint, arguments, split)
        found = dict(cut(tensors, routing))
        assert len(found) == 4 * (7 if layout.model == "dense" else 4 + 1 + 4 * 3 + 3)
        for name, matrix in found.items():
            assert torch.equal(matrix.float(), of_megatron(name, whole)), name
    routing, _ = matrices(checkpoint, config)
    assert any("linear_qkv.weight is fused and stays whole" in note for note in routing.notes)


def test_a_legacy_megatron_checkpoint_of_one_rank(tmp_path):
    folder = tmp_path / "iter_0000007"
    for rank in range(2):
        (folder / f"mp_rank_0{rank}").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    weight = torch.randn(24, 8)
    arguments = argparse.Namespace(num_attention_heads=4, num_query_groups=1, kv_channels=4, lr=1e-3)
    state = {"model": {"decoder.layers.0.self_attention.linear_qkv.weight": weight}, "args": arguments}
    torch.save(state, folder / "mp_rank_00" / "model_optim_rng.pt")
    routing, tensors = matrices(*read(tmp_path))
    assert [m.rows for m in routing.matrices] == [16, 4, 4]
    assert torch.equal(
        dict(cut(tensors, routing))["decoder.layers.0.self_attention.linear_qkv.weight[1]"], weight[16:20]
    )
    torch.save(state, folder / "mp_rank_01" / "model_optim_rng.pt")
    with pytest.raises(ValueError, match="2 model-parallel ranks hold parts"):
        read(tmp_path)


class Unknown:
    """Something a file may hold beside tensors."""


def test_files_that_would_run_code_want_trust(tmp_path):
    torch.save({"w": torch.ones(2, 2), "other": Unknown()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="--trust"):
        read(tmp_path / "model.pt")
    assert set(read(tmp_path / "model.pt", trust=True)[0]) == {"w"}


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.makedirs, (str(self.folder), 0o777, True)


def test_zero_files_that_would_run_code_want_trust(tmp_path):
    saved = shutil.copytree(SAVED / "deepspeed", tmp_path / "saved")
    expected = set(read(saved)[0])
    assert expected
    file = next(saved.glob("tag/*rank_1*optim_states.pt"))
    torch.save(torch.load(file, weights_only=False) | {"other": Harmful(tmp_path / "made")}, file)
    with pytest.raises(ValueError, match=r"--trust, which runs its code"):
        read(saved)
    assert not (tmp_path / "made").exists()
    assert set(read(saved, trust=True)[0]) == expected
    assert (tmp_path / "made").exists()


def test_metadata_that_would_run_code_wants_trust(tmp_path):
    saved = shutil.copytree(SAVED / "megatron", tmp_path / "saved")
    expected = set(read(saved)[0])
    assert expected
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    metadata.state_dict_metadata["other"] = Harmful(tmp_path / "made")
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"makedirs is not of torch.distributed.checkpoint.*--trust"):
        read(saved)
    assert not (tmp_path / "made").exists()
    assert set(read(saved, trust=True)[0]) == expected
    assert (tmp_path / "made").exists()


def test_what_is_no_checkpoint_is_said(tmp_path):
    with pytest.raises(SystemExit, match="not a checkpoint that is known here; allowed: a Hugging Face folder"):
        main([str(tmp_path)])
