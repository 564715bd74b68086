"""The planner counts what a real run does, and plans the largest jobs in seconds, in little memory."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from counted import bytes_sent
from integers import build, config
from ranks import ROOT, release
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from muon_plugin import planner
from muon_plugin.megatron.routing import Parameter
from muon_plugin.orthogonalize import NewtonSchulz, coefficients_for
from muon_plugin.plan import make_plan
from muon_plugin.planner import cost, spread
from muon_plugin.planner.command import run
from muon_plugin.planner.layouts import Zero, zero_calls
from muon_plugin.planner.tables import as_json
from muon_plugin.routing import route

LLAMA = {
    "model_type": "llama",
    "hidden_size": 40,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 32,
}
#: FLOPs, bytes sent and bytes of state that each rank really computed, sent and holds.
Counts = list[tuple[int, int, int]]


def by_rank(found: dict[str, Any]) -> Counts:
    """The planner's counts of all ranks of the job, pipeline stage by pipeline stage."""
    stages: dict[int, Counts] = {}
    for stage in found["stages"]:
        of = stage["by_rank"]
        for number in stage["numbers"]:
            stages[number] = list(zip(of["flops"], of["bytes_sent"], of["state_bytes"]))
    return [counts for number in sorted(stages) for counts in stages[number]]


def state_bytes(states: Any) -> int:
    return sum(v.nbytes for state in states for k, v in state.items() if isinstance(v, Tensor) and k != "step")


# Under DeepSpeed.


@pytest.mark.parametrize(("world", "stage"), [(2, 0), (2, 1), (2, 2), (2, 3), (4, 1), (4, 3)])
def test_deepspeeds_counts_are_those_of_a_real_run(ranks, tmp_path, world, stage):
    options: dict[str, Any] = {"sub_group_size": 5_000} if stage == 3 else {}
    if (world, stage) == (4, 1):
        options = {"round_robin_gradients": True, "parameter_alignment": True}
    settings = config(stage, "bf16", params={"adjust_lr_fn": "update_norm"}, zero_optimization=options)
    for name, content in (("config", LLAMA), ("ds", settings)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    arguments = ["--hf", str(tmp_path), "--deepspeed", str(tmp_path / "ds.json"), "--nodes", "1"]
    planned = as_json(run([*arguments, "--gpus-per-node", str(world)]))
    assert by_rank(planned) == ranks(world).run(deepspeed_counts, settings)
    assert (len(planned["stages"][0]["calls"]) > 2) is (stage == 3)  # a sub-group is a call of its own


def deepspeed_counts(rank: int, settings: dict[str, Any]) -> tuple[int, int, int]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    engine = build(rank, settings, LlamaForCausalLM(LlamaConfig(**LLAMA)))
    tokens = torch.arange(32)[None] % LLAMA["vocab_size"]
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    with FlopCounterMode(display=False) as counter, bytes_sent() as sent:
        engine.step()
    found = counter.get_total_flops(), sum(sent.values()), state_bytes(engine.basic_optimizer.state.values())
    engine.destroy()
    return found


# Under Megatron.

#: The arguments of megatron_model.py's models.
MODEL = """--num-layers 4 --hidden-size 24 --ffn-hidden-size 40 --num-attention-heads 8 --group-query-attention
    --num-query-groups 4 --kv-channels 6 --swiglu --normalization RMSNorm --disable-bias-linear --seq-length 16
    --position-embedding-type rope --max-position-embeddings 16 --untie-embeddings-and-output-weights --mock-data
    --vocab-size 64 --make-vocab-size-divisible-by 32 --tokenizer-type NullTokenizer --bf16 --micro-batch-size 1
    --global-batch-size 4 --train-iters 10 --lr 0.01 --optimizer muon --use-distributed-optimizer""".split()
MOE = """--num-experts 4 --moe-ffn-hidden-size 20 --moe-shared-expert-intermediate-size 20 --moe-router-topk 2
    --moe-token-dispatcher-type allgather""".split()
TP2 = ["--tp", "2"]


@pytest.fixture(scope="module")
def megatron(tmp_path_factory):
    """`megatron(own, arguments)`: the planner's JSON, planned in a process of its own, under Megatron 0.19.2."""
    folder = tmp_path_factory.mktemp("megatron")
    old = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{release('0.19.2')}:{ROOT}:{old or ''}"

    def plan(own: list[str], arguments: list[str]) -> Any:
        file = folder / "arguments.txt"
        file.write_text(f"# of a test\n{' '.join(arguments)}\n")
        return json.loads(planner.report(["--megatron", str(file), "--nodes", "2", "--gpus-per-node", "2", "--json", *own]))

    yield plan
    os.environ.pop("PYTHONPATH")
    if old is not None:
        os.environ["PYTHONPATH"] = old


@pytest.mark.parametrize(
    ("own", "extra", "layout"),
    [
        (TP2, [], {"tp": 2}),
        (["--ep", "2"], MOE, {"model": "moe", "ep": 2}),
        (
            [*TP2, "--pp", "2"],
            [*MOE, "--overlap-grad-reduce", "--ddp-bucket-size", "2000", "--no-gradient-accumulation-fusion"],
            {"model": "moe", "tp": 2, "pp": 2, "overlap_grad_reduce": True, "bucket_size": 2000},
        ),
    ],
    ids=["tp2-dp2", "moe-ep2", "moe-tp2-pp2-buckets"],
)
def test_megatrons_counts_are_those_of_a_real_run(ranks, megatron, own, extra, layout):
    planned = megatron(own, [*MODEL, *extra])
    assert by_rank(planned) == ranks(4, "0.19.2").run(megatron_counts, layout)


def megatron_counts(rank: int, layout: dict[str, Any]) -> tuple[int, int, int]:
    from megatron_model import Layout, optimizer_for, set_gradients
    from megatron_model import build as build_megatron

    of = Layout(**layout)
    chunks = build_megatron(of)
    optimizer = optimizer_for(chunks, of)
    set_gradients(chunks, of, 0)
    with FlopCounterMode(display=False) as counter, bytes_sent() as sent:
        optimizer.step()
    inner = [part.optimizer for part in optimizer.chained_optimizers if not part.is_stub_optimizer]
    states = [state for optimizer in inner for state in optimizer.state.values()]
    found = counter.get_total_flops(), sum(sent.values()), state_bytes(states)
    gc.collect()
    return found
