"""The planner counts what a real run does, and plans the largest jobs in seconds, in little memory."""

from __future__ import annotations

import gc
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from muon_plugin import Muon, planner
from muon_plugin.core.coefficients import coefficients_for
from muon_plugin.core.layout import Partition, Shard, pieces
from muon_plugin.core.orthogonalize import NewtonSchulz
from muon_plugin.core.plan import make_plan
from muon_plugin.core.routing import route
from muon_plugin.planner import cost
from muon_plugin.planner.calls import Zero, zero_calls
from muon_plugin.planner.command import run
from muon_plugin.planner.counts import META, busiest, count
from muon_plugin.planner.tables import as_json, step_seconds, text
from tests.support import ROOT
from tests.support.blocks import blocks
from tests.support.combinations import FULL, some
from tests.support.counted import bytes_sent
from tests.support.integers import build, config
from tests.support.jobs import environment
from tests.support.plan_by_lists import plan_by_lists
from tests.support.planned import LLAMA, MODEL
from tests.support.ranks import release

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


@pytest.mark.parametrize(("world", "stage"), some([(4, 1), (2, 0), (2, 2), (2, 1), (4, 3), (2, 3)], 3))
def test_deepspeeds_counts_are_those_of_a_real_run(ranks, tmp_path, world, stage):
    options: dict[str, Any] = {"sub_group_size": 5_000} if stage == 3 else {}
    if (world, stage) == (4, 1):
        options = {"round_robin_gradients": True, "parameter_alignment": True}
    # On CUDA, for which the planner counts, auto is fp16.
    params = {"adjust_lr_fn": "update_norm", "ns_dtype": "bf16", "per_head_muon": stage in (2, 3) and world == 2}
    params |= {"momentum_dtype": "bf16"} if stage == 1 else {}
    # masters of 16 bits, and moments
    narrow = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True} if stage == 2 else {}
    settings = config(stage, "bf16", params=params, zero_optimization=options, bf16=narrow)
    for name, content in (("config", LLAMA), ("ds", settings)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    arguments = ["--hf", str(tmp_path), "--deepspeed", str(tmp_path / "ds.json"), "--nodes", "1"]
    planned = as_json(run([*arguments, "--gpus-per-node", str(world)]))
    found = ranks(world).run(deepspeed_counts, settings)
    assert by_rank(planned) == [counts for counts, *_ in found]
    memory = planned["memory_bytes_a_rank"]
    assert [(memory["weights"], memory["masters"])] * world == [held for _, held in found]
    assert planned["parameters"] == 3 * (42 * 42 * 2 + 2 * 42 * 14 + 3 * 42 * 87 + 2 * 42) + 42 + 2 * 97 * 42
    assert (len(planned["stages"][0]["calls"]) > 2) is (stage == 3)  # a sub-group is a call of its own


def deepspeed_counts(rank: int, settings: dict[str, Any]) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """FLOPs, bytes sent, bytes of state; bytes of weights and of fp32 masters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    engine = build(rank, settings, LlamaForCausalLM(LlamaConfig(**LLAMA)))
    tokens = torch.arange(32)[None] % LLAMA["vocab_size"]
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    with FlopCounterMode(display=False) as counter, bytes_sent() as sent:
        engine.step()
    found = counter.get_total_flops(), sum(sent.values()), state_bytes(engine.basic_optimizer.state.values())
    weights = sum(getattr(p, "ds_tensor", p).nbytes for p in engine.module.parameters())
    kept = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 gives them to a step alone
    kept = kept or [p for group in engine.basic_optimizer.param_groups for p in group["params"]]
    masters = sum(p.nbytes for p in kept)
    engine.destroy()
    return found, (weights, masters)


# Under Megatron.

MOE = shlex.split("""
    --num-experts 4 --moe-ffn-hidden-size 20 --moe-shared-expert-intermediate-size 20 --moe-router-topk 2
    --moe-token-dispatcher-type allgather
""")
SMALL_STATE = shlex.split("--muon-scalar-optimizer lion --use-precision-aware-optimizer --exp-avg-dtype bf16")
LION = {"muon_scalar_optimizer": "lion", "exp_avg_dtype": torch.bfloat16}
BUCKETS, OVERLAP = (
    ["--overlap-grad-reduce", "--ddp-bucket-size", "2000"],
    {"overlap_grad_reduce": True, "bucket_size": 2000},
)


@pytest.fixture
def megatron(tmp_path, monkeypatch):
    """`megatron(own, arguments)`: what the planner is given for Megatron 0.19.2 on two nodes of two GPUs."""
    monkeypatch.setenv("PYTHONPATH", f"{release('0.19.2')}:{ROOT}:{os.environ.get('PYTHONPATH', '')}")

    def given(own: list[str], arguments: list[str]) -> list[str]:
        file = tmp_path / "arguments.txt"
        file.write_text(f"# of a test\n{' '.join(arguments)}\n")
        return ["--megatron", str(file), "--nodes", "2", "--gpus-per-node", "2", *own]

    return given


def planned_by_megatron(rank: int, arguments: list[str]) -> dict[str, Any]:
    return as_json(run(arguments))


COUNTED = {
    "tp2-dp2": (["--tp", "2"], BUCKETS, {"tp": 2, **OVERLAP}),
    "tp2-dp2 by head": (
        ["--tp", "2"],
        ["--muon-split-qkv-per-head"],
        {"tp": 2, "muon": {"muon_split_qkv_per_head": True}},
    ),
    "tp2-dp2 in bf16 with Lion": (
        ["--tp", "2"],
        SMALL_STATE,
        {"tp": 2, "muon": LION | {"use_precision_aware_optimizer": True}},
    ),
    "moe-ep2": (["--ep", "2"], MOE, {"model": "moe", "ep": 2}),
    "moe-pp2-dp2": (["--pp", "2"], [*MOE, *BUCKETS], {"model": "moe", "pp": 2, **OVERLAP}),
}


@pytest.mark.parametrize("case", some(COUNTED, 2))
def test_megatrons_counts_are_those_of_a_real_run(ranks, megatron, case):
    own, extra, layout = COUNTED[case]
    planned = ranks.forked(planned_by_megatron, megatron(own, [*MODEL, *extra]), megatron="0.19.2")
    assert by_rank(planned) == ranks(4, "0.19.2").run(megatron_counts, layout)


def test_what_megatron_keeps_in_fewer_bits_or_on_the_cpu_is_copied_in_a_step(ranks, megatron):
    """16 bits of masters and moments each, or nothing on the GPU: in fp32, as by default, while a step is made."""
    aware = "--use-precision-aware-optimizer"
    kept = ["", f"{aware} --optimizer-cpu-offload", f"{aware} --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"]
    kept += [f"{kept[1]} --fp8-format hybrid --fp8-param-gather"]
    default, offloaded, narrow, in_fp8 = (
        ranks.forked(planned_by_megatron, megatron([], [*MODEL, "--bf16", *shlex.split(flags)]), megatron="0.19.2")[
            "memory_bytes_a_rank"
        ]
        for flags in kept
    )
    whole = default["masters"] + default["state"]
    assert default["copies"] == default["away"] == offloaded["masters"] == offloaded["state"] == narrow["away"] == 0
    assert offloaded["away"] + default["masters"] // 2 == narrow["copies"] == offloaded["copies"] == whole
    assert (in_fp8["masters"], in_fp8["away"]) == (default["masters"], default["state"])  # these stay on the GPU
    assert in_fp8["copies"] == default["state"]
    assert 2 * narrow["masters"] == default["masters"]
    assert 2 * narrow["state"] == default["state"]


def test_a_launch_line_in_fp8_is_planned_as_one_without(ranks, megatron):
    """Flags that Megatron takes with fp8 alone: the model is built without it, in which they would be errors."""
    flags = "--fp8-format e4m3 --fp8-recipe mxfp8 --fp8-output-proj --moe-router-padding-for-quantization"
    plain, in_fp8 = (
        ranks.forked(planned_by_megatron, megatron([], [*MODEL, *MOE, *extra]), megatron="0.19.2")
        for extra in ([], shlex.split(flags))
    )
    assert by_rank(in_fp8) == by_rank(plain)


def megatron_counts(rank: int, layout: dict[str, Any]) -> tuple[int, int, int]:
    from tests.support.megatron_model import Layout, optimizer_for, set_gradients
    from tests.support.megatron_model import build as build_megatron

    if layout.get("pp", 1) == 2 and rank > 1:  # as Megatron's training code: one bucket on later stages
        layout = {**layout, "bucket_size": None}
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


def test_python_gets_megatrons_plan_from_a_process_of_its_own(ranks, megatron):
    arguments = megatron(["--tp", "2"], MODEL)
    expected = ranks.forked(planned_by_megatron, arguments, megatron="0.19.2")
    assert json.loads(planner.report([*arguments, "--json"])) == json.loads(json.dumps(expected))


def test_a_rank_of_a_stage_knows_its_place_in_each_group():
    """Megatron counts TP first, then EP, then DP: ranks 0, 1, 4 and 5 hold the experts of the first EP rank."""
    (call,) = zero_calls("experts", [], [], Zero(1), dp=2, tp=2, copies=2)
    assert [call.position(rank) for rank in range(8)] == [0, 1, 0, 1, 2, 3, 2, 3]
    (call,) = zero_calls("dense layers", [], [], Zero(1), dp=4, tp=2)
    assert [call.position(rank) for rank in range(8)] == list(range(8))


# The largest jobs.


def largest(arguments: list[str], **variables: str) -> tuple[dict[str, Any], int]:
    """What the command prints as JSON, and the most memory that its process had, in bytes."""
    process = subprocess.Popen(
        arguments, env=environment(release("0.19.2"), **variables), stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return json.loads(text), usage.ru_maxrss * 1024


def even_and_thrifty(found: dict[str, Any]) -> None:
    """A step's busiest ranks have at most 1.05 of the bound, traffic grows by at most 2%, no reason is missing."""
    for stage in found["stages"]:
        calls = [call for call in stage["calls"] if call["matrices"]]
        bounds = [max(call["flops"] / call["ranks"], call["costliest_matrix_flops"]) for call in calls]
        assert sum(call["busiest_flops"] for call in calls) <= 1.05 * sum(bounds)
        for call, bound in zip(calls, bounds):
            told = any(f"{call['call']}: the busiest rank has" in reason for reason in found["reasons"])
            assert (call["busiest_flops"] > 1.05 * bound) is told
    assert 1 < found["totals"]["times_paper"] < found["totals"]["times_engine"] <= 1.02


@pytest.mark.skipif(not FULL, reason="FULL=1; what is counted is compared with real runs above")
def test_moonlight_at_dp_64():
    script = str(ROOT / "examples" / "megatron" / "launch" / "moonlight_16b_a3b.sh")
    found, memory = largest(["bash", script], PLAN="1", PLAN_ARGS="--json", NUM_NODES="8", PYTHON=sys.executable)
    assert (found["ranks"], found["layout"]["dp"], found["layout"]["ep"]) == (64, 64, 8)
    assert memory < 2 * 10**9
    even_and_thrifty(found)
    assert len(found["stages"][0]["by_rank"]["flops"]) == 64


@pytest.mark.skipif(not FULL, reason="FULL=1; what is counted is compared with real runs above")
def test_a_mixture_of_1t_parameters_at_8192_ranks():
    module = [sys.executable, "-W", "ignore", "-m", "muon_plugin.planner"]
    arguments = ["--megatron", "configs/planner_kimi_k2.txt", "--nodes", "1024", "--gpus-per-node", "8", "--json"]
    found, memory = largest(module + arguments)
    assert found["layout"] == {"tp": 8, "pp": 16, "ep": 16, "etp": 1, "cp": 1, "dp": 64, "edp": 32}
    assert memory < 2 * 10**9
    even_and_thrifty(found)
    assert sorted(number for stage in found["stages"] for number in stage["numbers"]) == list(range(16))
    # 4 bytes for each of a trillion elements of matrices, over all ranks.
    state = sum(len(stage["numbers"]) * sum(stage["by_rank"]["state_bytes"]) for stage in found["stages"])
    assert 4.0e12 < state < 4.3e12


# What is printed, on the planner's page.

MOONLIGHT = ["bash", str(ROOT / "examples" / "megatron" / "launch" / "moonlight_16b_a3b.sh")]
PLANNER = [sys.executable, "-W", "ignore", "-m", "muon_plugin.planner"]
KIMI = [*PLANNER, "--megatron", str(ROOT / "configs" / "planner_kimi_k2.txt"), "--nodes", "1024"]


def on_the_page(number: int) -> str:
    """The table of that number on the planner's page."""
    return [block.text for block in blocks("text") if block.page == "docs/planner.md"][number]


@pytest.mark.skipif(not FULL, reason="FULL=1: below, a model under DeepSpeed")
@pytest.mark.parametrize(("number", "command"), [(0, MOONLIGHT), (1, [*KIMI, "--gpus-per-node", "8"])])
def test_the_page_shows_what_is_printed(number, command):
    variables = environment(release("0.19.2"), PLAN="1", NUM_NODES="8", PYTHON=sys.executable)
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=variables, cwd=ROOT).stdout
    assert printed.strip("\n") == on_the_page(number)


def test_the_page_shows_what_is_printed_of_a_model_under_deepspeed(tmp_path, monkeypatch):
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, **heads}))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    commands = [block.text for block in blocks("bash") if block.page == "docs/planner.md"]
    (command,) = (command for command in commands if "--tokens-per-s 8000" in command)
    assert text(run(shlex.split(command)[3:])).strip("\n") == on_the_page(2)


@pytest.mark.parametrize("stage", some([3, 0], 1))
def test_tens_of_thousands_of_ranks_that_all_hold_a_part_of_everything(tmp_path, stage):
    large = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | large))
    arguments = ["--hf", str(tmp_path), "--nodes", "5000", "--gpus-per-node", "8", "--zero-stage", str(stage)]
    found = as_json(run(arguments))
    numel = found["stages"][0]["calls"][0]["state_bytes_a_rank"] / 4 * (1 if stage == 0 else 40_000)
    sent = found["totals"]["exchange_bytes"]
    if stage == 0:  # 2 bytes an element to all others
        assert sent == 2 * 39_999 * numel
    else:  # to the owner and back, but what it holds
        assert 0.99 * 4 * numel < sent < 4 * numel


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("scalars", [0, 2])
def test_many_ranks_are_counted_as_lists_of_all_parts_are(stage, scalars):
    """Where every rank holds a part of everything, none is written down; owners and counts are those of lists."""
    newton_schulz = NewtonSchulz(coefficients_for(5, "simple"))
    shapes = {f"layers.{i}.w": (7 + 5 * i, 64 - 3 * i) for i in range(9)}
    shapes |= {f"layers.{i}.experts.gate_up_proj": (3, 24 + 2 * i, 11) for i in range(4)}
    shapes |= {f"layers.{i}.fused": (48, 16) for i in range(3)}
    matrices = route(shapes, split={"fused": {"sizes": [1, 2], "groups": 16}}).matrices
    for world in (1, 2, 3, 7, 16, 100):
        found, plan = counts_and_lists(shapes, matrices, stage, world, newton_schulz, scalars)
        assert (list(found.flops), list(found.sent)) == (plan.flops, plan.bytes_sent)


@pytest.mark.parametrize("stage", [0, 3])
def test_the_planner_at_many_ranks_searches_for_balance_as_a_run_does(stage):
    """0.1.0 chose owners anew above 200,000 ranges, without the best-fit search of `make_plan`."""
    newton_schulz = NewtonSchulz(coefficients_for(5, "simple"))
    shapes = {f"layers.{i}.{j}.w": (16 + 8 * (j % 3), 32 + 16 * (j % 5)) for i in range(10) for j in range(32)}
    matrices = route(shapes).matrices
    found, plan = counts_and_lists(shapes, matrices, stage, 128, newton_schulz, 0)
    assert (list(found.flops), list(found.sent)) == (plan.flops, plan.bytes_sent)
    costs = sorted((newton_schulz.flops(m.rows, m.cols) for m in matrices), reverse=True)
    longest_first = [0] * 128  # what there was without the search
    for each in costs:
        longest_first[longest_first.index(min(longest_first))] += each
    assert max(found.flops) < max(longest_first)


def counts_and_lists(shapes, matrices, stage, world, newton_schulz, scalars):
    """What the planner counts, and the plan from lists of what every rank holds."""
    parameters, tensor = [Partition.of(name, shape) for name, shape in shapes.items()], torch.empty(0)
    (call,) = zero_calls("all", parameters, matrices, Zero(stage), world)
    lists = []
    for rank in range(world):
        spans = [(call.parameters[span.number].name, span) for span in call.held(rank)]
        shards = [Shard.of_range(name, span.start, span.length, tensor) for name, span in spans]
        lists.append([(piece.matrix, piece.inside) for piece in pieces(matrices, shards, {id(tensor): 0})])
    return cost.plan_call(call, newton_schulz, scalars), plan_by_lists(matrices, lists, newton_schulz.flops, scalars)


# Names and shapes.

SHAPES = {
    "embed_tokens.weight": {"shape": [96, 40], "tp": 0},
    "layers.*.q_proj.weight": {"shape": [40, 40], "count": 4, "tp": 0},
    "layers.*.o_proj.weight": {"shape": [40, 40], "count": 4, "tp": 1},
    "layers.*.experts.*.up.weight": {"shape": [24, 40], "count": [2, 8], "first": 2, "tp": 0},
    "layers.*.experts.*.down.weight": {"shape": [40, 24], "count": [2, 8], "first": 2, "tp": 1},
    "layers.*.norm.weight": {"shape": [40], "count": 4},
    "lm_head.weight": [96, 40],
}


@pytest.fixture
def shapes(tmp_path):
    def planned(content: Any, *arguments: str) -> dict[str, Any]:
        (tmp_path / "shapes.json").write_text(json.dumps(content))
        return as_json(run(["--shapes", str(tmp_path / "shapes.json"), "--nodes", "2", *arguments]))

    return planned


def test_shapes_are_planned_as_the_model_that_has_them(shapes, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    model = run(["--hf", str(tmp_path), "--nodes", "2", "--gpus-per-node", "4"])
    whole = {p.name: list(p.shape) for load in model.stages[0].loads for p in load.call.parameters}
    order = ["model.embed_tokens.weight", *(n for n in whole if "layers" in n), "model.norm.weight", "lm_head.weight"]
    assert by_rank(shapes({n: whole[n] for n in order}, "--gpus-per-node", "4")) == by_rank(as_json(model))


def test_shapes_are_cut_by_tp_pp_and_ep(shapes):
    alone = shapes(SHAPES, "--gpus-per-node", "1")
    assert alone["stages"][0]["calls"][0]["matrices"] == 8 + 32
    found = shapes(SHAPES, "--gpus-per-node", "8", "--tp", "2", "--pp", "2", "--ep", "2")
    assert found["layout"] == {"tp": 2, "pp": 2, "ep": 2, "cp": 1, "dp": 4, "edp": 2}
    assert [stage["numbers"] for stage in found["stages"]] == [[0], [1]]
    experts = [c for stage in found["stages"] for c in stage["calls"] if c["call"] == "experts"]
    # Only the layers of the second stage have experts; an EP rank has half of them.
    assert [(c["matrices"], c["groups"], c["ranks"]) for c in experts] == [(16, 2, 4)]
    assert found["totals"]["newton_schulz_flops"] == alone["totals"]["newton_schulz_flops"]
    alike = shapes({k: v for k, v in SHAPES.items() if "layers.*.q" in k}, "--gpus-per-node", "4", "--pp", "2")
    assert [stage["numbers"] for stage in alike["stages"]] == [[0, 1]]


# What is printed, and what is refused.


def test_the_table_tells_why_and_the_picture_is_drawn(shapes, tmp_path):
    (tmp_path / "shapes.json").write_text(json.dumps(SHAPES))
    arguments = ["--shapes", str(tmp_path / "shapes.json"), "--nodes", "1", "--gpus-per-node", "4"]
    text = " ".join(planner.report([*arguments, "--zero-stage", "0", "--plot", str(tmp_path / "plan.png")]).split())
    assert "every rank holds all weights and receives each update that it does not compute" in text
    assert "the paper's count" in text
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    planned = run([*arguments, "--tflops", "1e-3"])
    slow, fast = (
        replace(planned, rates=replace(planned.rates, tflops=t)).stages[0].seconds(cost.Rates(t), planned.model.traffic)
        for t in (1e-3, 2e-3)
    )
    assert slow["newton_schulz"] == 2 * fast["newton_schulz"] == max(planned.stages[0].loads[0].flops) / 1e9


def test_times_are_what_a_counted_step_moves_over_the_rates(tmp_path):
    (tmp_path / "shapes.json").write_text(json.dumps(SHAPES))
    arguments = ["--shapes", str(tmp_path / "shapes.json"), "--nodes", "1", "--gpus-per-node", "4"]
    planned = run([*arguments, "--launch-us", "1e-3", "--batch-us", "7"])
    (load, rest) = planned.stages[0].loads
    call, newton_schulz = load.call, planned.model.newton_schulz.on(META)
    plan = make_plan(call.matrices, cost.index_of(call), newton_schulz.flops)
    counted = count(call, plan, busiest(plan), newton_schulz)
    assert load.counts == counted
    assert min(counted.kernels, counted.elementwise, counted.collectives, counted.peak) > 0
    of = step_seconds(planned, planned.stages)
    assert of["elementwise"] == pytest.approx((counted.elementwise + 28 * rest.held[1]) / 2.5e12)
    assert of["exchange"] == pytest.approx(max(load.sent) / 4e10 + 7e-6 * counted.collectives)
    assert of["launches"] == pytest.approx(1e-9 * counted.kernels)
    assert of["muon_step"] == of["engine"] + of["elementwise"] + of["newton_schulz"] + of["exchange"]
    assert f": {counted.kernels} kernels, {counted.bytes_each:.0f} bytes" in " ".join(text(planned).split())
    slow = run([*arguments, "--launch-us", "1e6"])
    of = step_seconds(slow, slow.stages)
    assert of["muon_step"] == of["engine"] + of["launches"]
    assert "the host's launches" in " ".join(text(slow).split())
    assert as_json(planned)["stages"][0]["calls"][0]["counted_on_a_rank"]["kernels"] == counted.kernels


def test_settings_are_told_as_a_run_tells_them(tmp_path):
    params = {"offload": True, "ns_coefficients": "aol"}
    (tmp_path / "shapes.json").write_text(json.dumps(SHAPES))
    (tmp_path / "ds.json").write_text(json.dumps({"optimizer": {"type": "Muon", "params": params}}))
    files = ["--shapes", str(tmp_path / "shapes.json"), "--deepspeed", str(tmp_path / "ds.json")]
    text = planner.report([*files, "--nodes", "1", "--gpus-per-node", "4"])
    model = torch.nn.Linear(4, 4)
    told = Muon(model.named_parameters(), **params).settings.describe()
    assert told == "match_rms_adamw, momentum 0.95 in CPU memory, 5 steps (auto, aol)"
    assert told in text
    assert "note: these 5 Newton-Schulz steps take singular values of 0.1 to 1" in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--nodes, --gpus-per-node"),
        (["--nodes", "0"], "argument --nodes: '0' is not valid; allowed: a whole number from 1 on"),
        (["--tflops", "fast"], "'fast' is not valid; allowed: a number above 0"),
        (["--gb-per-s", "-1"], "'-1' is not valid"),
        (["--speed", "3"], "--speed 3"),
        (["--nodes", "2", "--gpus-per-node", "8"], "no model is given; allowed: one of --megatron, --hf, --shapes"),
        (["--hf", "a", "--shapes", "b"], "given by --hf and --shapes"),
        (["--hf", "nowhere"], "--hf nowhere: there is no nowhere; allowed: a config.json or its folder"),
        (["--megatron", "nowhere"], "--megatron nowhere: No such file"),
        (["--megatron", "x", "--zero-stage", "1"], "--zero-stage 1 with Megatron's arguments"),
        (["--shapes", "SHAPES", "--tp", "3"], "--tp 3 does not divide dimension 0 of layers.0.q_proj.weight [40, 40]"),
        (["--shapes", "SHAPES", "--ep", "3"], "--ep 3 does not divide the 8 experts"),
        (["--shapes", "SHAPES", "--pp", "5"], "--pp 5: the names have 4 layers"),
        (["--shapes", "SHAPES", "--tp", "5", "--pp", "2"], "--tp 5 does not divide"),
        (["--shapes", "SHAPES", "--cp", "3"], "2 ranks; allowed: a multiple of 3 (TP 1, PP 1, EP 1, CP 3)"),
        (["--shapes", "SHAPES", "--zero-stage", "4"], "zero_optimization.stage=4; allowed: 0, 1, 2, 3"),
        (["--shapes", "SHAPES", "--plot", "nowhere/plan.png"], "--plot nowhere/plan.png: allowed"),
        (["--shapes", "SHAPES", "--deepspeed", "HEADS"], "per_head_muon=True, but of no trainable parameter"),
        (["--hf", "SHAPES"], "has no model_type; allowed: the config.json of a language model"),
        (["--hf", "PICTURES"], "allowed: the config.json of a language model, or --shapes"),
        (["--shapes", "COMMENTED.jsonc"], "allowed: a JSON object without comments, such as "),
        (["--hf", "SHAPES", "--tp", "2"], "--tp 2 --pp 1 --ep 1 with --hf; allowed: 1"),
        (["--shapes", "LIST"], "holds a list; allowed: a JSON object"),
        (["--shapes", "TEXT"], "is not JSON"),
        (["--shapes", "STARS"], "the count None for its 1 stars"),
        (["--shapes", "KEY"], "w has shard=1; allowed: shape, count, tp, first"),
        (["--shapes", "SHAPE"], "w has the shape [4, 0]; allowed: a list of whole numbers from 1 on"),
        (["--shapes", "SHAPES", "--deepspeed", "ADAM"], "optimizer.type='Adam' in the DeepSpeed JSON"),
        (["--shapes", "SHAPES", "--deepspeed", "TYPO"], "momentun=0.9 is not a setting of Muon"),
        (
            ["--shapes", "SHAPES", "--deepspeed", "FLAT"],
            "zero_optimization=2 in the DeepSpeed JSON",
        ),
        (["--shapes", "SHAPES", "--deepspeed", "SUB"], "zero_optimization.sub_group_size=0; allowed: a number from 1"),
        (["--shapes", "SHAPES", "--deepspeed", "PARAMS"], "params=[1] in the DeepSpeed JSON; allowed: an object"),
        (["--shapes", "SHAPES", "--deepspeed", "AUTOTP"], "tensor_parallel.autotp_size='x'; allowed: 1"),
        (
            ["--shapes", "SHAPES", "--deepspeed", "AUTOEP"],
            "expert_parallel.autoep_size=4 with --ep 1; allowed: --shapes",
        ),
    ],
)
def test_a_bad_argument_is_one_clear_line(tmp_path, arguments, told):
    files = {
        "SHAPES": SHAPES,
        "PICTURES": {"model_type": "vit"},
        "COMMENTED.json": {},
        "LIST": [1],
        "STARS": {"l.*.w": [4, 4]},
        "KEY": {"w": {"shape": [4], "shard": 1}},
        "SHAPE": {"w": [4, 0]},
        "HEADS": {"optimizer": {"type": "Muon", "params": {"per_head_muon": True}}},
        "ADAM": {"optimizer": {"type": "Adam"}},
        "TYPO": {"optimizer": {"type": "Muon", "params": {"momentun": 0.9}}},
        "FLAT": {"zero_optimization": 2},
        "PARAMS": {"optimizer": {"type": "Muon", "params": [1]}},
        "AUTOTP": {"tensor_parallel": {"autotp_size": "x"}},
        "AUTOEP": {"expert_parallel": {"enabled": True, "autoep_size": 4}},
        "SUB": {"zero_optimization": {"stage": 3, "sub_group_size": 0}},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    broken = ("TEXT", "COMMENTED.jsonc")
    for name in broken:
        (tmp_path / name).write_text("{")
    given = [str(tmp_path / a) if a in {*files, *broken} else a for a in arguments]
    if arguments and "--nodes" not in arguments:
        given = ["--nodes", "1", "--gpus-per-node", "2", *given]
    with pytest.raises(ValueError, match=r".") as error:
        run(given)
    assert told in str(error.value)


def test_the_commands_exit_code_is_2_and_python_gets_a_value_error():
    command = [sys.executable, "-m", "muon_plugin.planner", "--nodes", "many", "--gpus-per-node", "8"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "'many' is not valid; allowed: a whole number from 1 on" in done.stderr
    with pytest.raises(ValueError, match="allowed: a whole number from 1 on"):  # from a process, as --megatron is there
        planner.report(["--megatron", "arguments.txt", "--nodes", "many", "--gpus-per-node", "8"])


@pytest.mark.skipif(not FULL, reason="FULL=1: Megatron's parser is imported for it, which takes 12 seconds of a core")
def test_python_gets_what_megatrons_parser_says_as_a_value_error(megatron):
    with pytest.raises(ValueError, match="--tensor-model-parallel-sise"):
        planner.report(megatron(["--strict"], [*MODEL, "--tensor-model-parallel-sise", "2"]))
