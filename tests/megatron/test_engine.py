"""What breaks in Megatron's own Muon and must not here, with the reports; and what is refused, how it is said."""

from __future__ import annotations

import contextlib
import io
import re
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.support.combinations import covering, in_turn
from tests.support.counted import bytes_sent
from tests.support.integers import build as deepspeed_build
from tests.support.integers import config as deepspeed_config
from tests.support.integers import differing, gradient
from tests.support.megatron_model import (
    Layout,
    build,
    config_for,
    full_weights,
    named,
    optimizer_for,
    set_gradients,
    step,
    trained,
)
from tests.support.ranks import RankError

RELEASES = ("0.16.1", "0.19.2")


def updates(optimizer: Any) -> list[Any]:
    return [part.optimizer.halves.muon.updates[0] for part in optimizer.chained_optimizers]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_stock_distributed_optimizer_stays_in_place(ranks, release, dtype):
    """Megatron refuses Muon with its byte-sharded optimizer (0.16.1) or replaces that (0.19.2), and refuses fp16."""
    kinds, cut = ranks(3, release).run(kinds_of, Layout(dtype=dtype))[0]
    assert kinds == [("MuonDistributedOptimizer", True)]
    assert cut, "no matrix crosses a rank's border: the optimizer is not byte-sharded"


def kinds_of(rank: int, layout: Layout) -> Any:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    optimizer = optimizer_for(build(layout), layout)
    parts = optimizer.chained_optimizers
    kinds = [(type(part).__name__, isinstance(part, DistributedOptimizer)) for part in parts]
    return kinds, any(len(route.holders) > 1 for update in updates(optimizer) for route in update.plan.routes)


def test_the_entry_that_0_16_1_trains_through(ranks, release):
    """Its training loop calls `get_megatron_muon_optimizer`, which refuses the pair."""
    if release != "0.16.1":
        pytest.skip("later releases have one entry")
    assert ranks(2, release).run(through_own_entry, Layout()) == ["MuonDistributedOptimizer"] * 2


def through_own_entry(rank: int, layout: Layout) -> str:
    import muon_plugin

    muon_plugin.register("megatron")
    from megatron.core.optimizer.muon import get_megatron_muon_optimizer

    chunks = build(layout)
    optimizer = get_megatron_muon_optimizer(config_for(layout), chunks)
    step(chunks, optimizer, layout, 0)
    return type(optimizer.chained_optimizers[0]).__name__


@pytest.mark.parametrize("tp", [1, 2])
def test_gate_and_up_are_orthogonalized_apart(ranks, release, tp):
    """Megatron #6688, #7077: SwiGLU's linear_fc1 as one matrix. Here: two, each with singular values near 1."""
    whole = ranks(2, release).run(first_update, Layout(tp=tp, dtype="fp32"))[0]
    fc1 = whole["decoder.layers.1.mlp.linear_fc1.weight"]
    for part in fc1.chunk(2):
        values = torch.linalg.svdvals(part)
        assert 0.6 < values.min() < values.max() < 1.4


def first_update(rank: int, layout: Layout) -> dict[str, Tensor]:
    """The first step's update of every whole parameter, over lr and scale."""
    chunks = build(layout)
    before = full_weights(chunks, layout)
    optimizer = optimizer_for(chunks, layout, weight_decay=0.0)
    step(chunks, optimizer, layout, 0)
    after = full_weights(chunks, layout)
    return {name: (before[name] - after[name]) / 0.01 / max(40, 24) ** 0.5 for name in before}


TWICE = [(2, Layout(tp=2)), (4, Layout(tp=4)), (4, Layout(tp=2)), (4, Layout())]


@pytest.mark.parametrize(("release", "case"), in_turn(RELEASES, TWICE))
def test_nothing_is_computed_twice_under_tp(ranks, release, case):
    """Megatron #6683, #6720: TP ranks repeat the same Newton-Schulz. Here: the FLOPs that ran are one process's."""
    world, layout = case
    alone, *_ = ranks.alone(counted, Layout(), megatron=release)
    found = ranks(world, release).run(counted, layout)
    assert sum(ran for ran, *_ in found) == alone
    assert [ran for ran, *_ in found] == [planned for _, planned, *_ in found]


CUT = [(3, Layout()), (4, Layout(tp=2)), (4, Layout(tp=4)), (3, Layout("moe"))]


@pytest.mark.parametrize(("release", "case"), in_turn(RELEASES, CUT))
def test_pieces_go_to_one_owner_and_back(ranks, release, case):
    """Megatron-LM PR 1428: an all-gather of everything. Here: at most 4 bytes per element of what is cut, in all."""
    found = ranks(case[0], release).run(counted, case[1])
    assert [sent for *_, sent, _, _ in found] == [planned for *_, planned, _ in found]
    assert 0 < sum(sent for *_, sent, _, _ in found) <= sum(most for *_, most in found)


def counted(rank: int, layout: Layout) -> tuple[int, int, int, int, int]:
    """FLOPs that ran and those planned, bytes sent and those planned, 4 bytes per element of owned cut matrices."""
    chunks = build(layout)
    optimizer = optimizer_for(chunks, layout)
    set_gradients(chunks, layout, 0)
    optimizer.prepare_grads()
    with FlopCounterMode(display=False) as counter, bytes_sent() as sent:
        for part in optimizer.chained_optimizers:
            part.optimizer.step()
    flops = planned = most = 0
    for update in updates(optimizer):
        mine = update._exchange.wire.rank
        flops += update.plan.flops[mine]
        planned += update.plan.bytes_sent[mine]
        for matrix, route in zip(update.matrices, update.plan.routes):
            if route.owner == mine and any(r != mine for r, _ in route.holders):
                replicas = max(1, sum(s.numel for _, inside in route.holders for s in inside) // matrix.numel)
                most += 2 * matrix.numel * (1 + replicas)
    return counter.get_total_flops(), flops, sum(sent.values()), planned, most


@pytest.mark.fast
def test_the_same_bits_as_under_deepspeed(ranks, release):
    """The same matrices, the same gradients, the other engine."""
    ours = ranks(2, release).run(trained, Layout(tp=2, dtype="fp32", muon={"muon_extra_scale_factor": 0.2}), 4)[0]
    theirs = ranks(2, release).run(under_deepspeed, Layout(dtype="fp32"), 4)[0]
    assert len(theirs) == 16
    for name, weight in theirs.items():
        assert torch.equal(weight, ours[name]), name


def under_deepspeed(rank: int, layout: Layout, steps: int) -> dict[str, Tensor]:
    """DeepSpeed's ZeRO-1 on the matrices of the Megatron model."""
    weights = {
        name: w
        for name, w in full_weights(build(layout), layout).items()
        if w.dim() == 2 and "embedding" not in name and "output_layer" not in name
    }

    class Matrices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, weight in weights.items():
                self.register_parameter(name.replace(".", "/"), nn.Parameter(weight))

        def forward(self, number: int) -> Tensor:
            gradients = {
                name: gradient(w.shape, crc32(name.encode()), number, 0, rank, dist.get_world_size(), 1)
                for name, w in weights.items()
            }
            return sum((p * gradients[name.replace("/", ".")]).sum() for name, p in self.named_parameters())

    params = {
        "momentum": 0.95,
        "nesterov": False,
        "ns_coefficients": "quintic",
        "split": {"*linear_qkv*": {"sizes": [12, 6, 6], "groups": 4}, "*linear_fc1*": 2},
    }
    engine = deepspeed_build(rank, deepspeed_config(1, params=params), Matrices())
    for number in range(steps):
        engine.backward(engine(number))
        engine.step()
    return {name.replace("/", "."): p.detach().clone() for name, p in engine.module.named_parameters()}


REFUSED = {
    **{
        field: (
            {"use_precision_aware_optimizer": True, field: dtype},
            f"--{field.replace('_', '-')}='{name}'",
            allowed,
        )
        for field, dtype, name, allowed in (
            ("exp_avg_dtype", torch.float16, "fp16", "fp32, bf16"),
            ("exp_avg_sq_dtype", torch.uint8, "fp8", "fp32, bf16"),
            ("main_params_dtype", torch.float16, "fp16", "fp32"),
        )
    },
    "offload": (
        {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.5},
        "--optimizer-offload-fraction 1.5",
        "0 to 1",
    ),
    "scalar optimizer": ({"muon_scalar_optimizer": "sgd"}, "--muon-scalar-optimizer 'sgd'", "adam, lion"),
    "Lion's beta": ({"lion_beta2": 1.0}, "--lion-beta2 1.0", "below 1"),
    "L2": ({"decoupled_weight_decay": False}, "decoupled_weight_decay", "true"),
    "layer-wise": ({"use_layer_wise_distributed_optimizer": True}, "use_layer_wise_distributed_optimizer", "false"),
    "momentum": ({"muon_momentum": 1.5}, "--muon-momentum 1.5", "below 1"),
    "a string": ({"muon_momentum": "0.95"}, "--muon-momentum '0.95'", "a number"),
    "a word for a switch": ({"muon_nesterov": "false"}, "--muon-nesterov 'false'", "true or false"),
    "half a step": ({"muon_num_ns_steps": 5.5}, "--muon-num-ns-steps 5.5", "a whole number"),
    "a list": ({"muon_coefficient_type": [3.0]}, "--muon-coefficient-type [3.0]", "quintic"),
    "a typo": ({"muon_momentun": 0.9}, "OptimizerConfig.muon_momentun", "did you mean muon_momentum?"),
    "paper and not": ({"muon_paper": True, "muon_momentum": 0.5}, "muon_momentum=0.5 and muon_paper", "drop one"),
    "precision": ({"muon_fp32_matmul_prec": "foo"}, "--muon-fp32-matmul-prec foo", "medium"),
    "steps": ({"muon_num_ns_steps": 0}, "--muon-num-ns-steps 0", "1 to 99"),
    "coefficients": ({"muon_coefficient_type": "cubic"}, "--muon-coefficient-type 'cubic'", "quintic"),
    "scale mode": ({"muon_scale_mode": "frobenius"}, "--muon-scale-mode 'frobenius'", "spectral"),
    "scale factor": ({"muon_extra_scale_factor": -1.0}, "--muon-extra-scale-factor -1.0", "above 0"),
    "TP mode": ({"muon_tp_mode": "sliced"}, "--muon-tp-mode sliced", "duplicated"),
    "method": ({"muon_ns_method": "fast"}, "--muon-ns-method 'fast'", "gram"),
    "dtype": ({"muon_ns_dtype": "fp32"}, "--muon-ns-dtype 'fp32'", "fp16"),
    "fp16 in the standard form": (
        {"muon_ns_dtype": "fp16", "muon_ns_method": "standard"},
        "--muon-ns-dtype fp16 with --muon-ns-method standard",
        "bf16 or auto, or one of the methods",
    ),
}


@pytest.mark.parametrize(("release", "case"), in_turn(RELEASES, REFUSED))
def test_what_cannot_work_is_refused_before_the_first_step_on_every_rank(ranks, release, case):
    options, setting, allowed = REFUSED[case]
    with pytest.raises(RankError) as error:
        ranks(2, release).run(refused, Layout(), options)
    for kind, message in error.value.errors:
        assert kind == "ValueError"
        assert setting in message
        assert allowed in message


def refused(rank: int, layout: Layout, options: dict[str, Any], only: int | None = None) -> None:
    import muon_plugin

    muon_plugin.register("megatron")
    from megatron.core.optimizer import get_megatron_optimizer

    chunks = build(layout)
    config = config_for(layout)
    if only in (None, rank):
        for key, value in options.items():
            setattr(config, key, value)  # past the config's own checks
    get_megatron_optimizer(config, chunks)


REFUSED_OF_DATA_PARALLELISM = {
    "fp4_param_gather": (True, "--fp4-param-gather"),
    "use_megatron_fsdp": (True, "--use-megatron-fsdp"),
    "use_distributed_optimizer": (False, "DistributedDataParallelConfig.use_distributed_optimizer=False"),
}


@pytest.mark.parametrize("key", REFUSED_OF_DATA_PARALLELISM)
def test_data_parallelism_that_cannot_work_is_refused(key):
    from muon_plugin.megatron.refusals import check_supported

    config = SimpleNamespace(use_precision_aware_optimizer=False, optimizer_cpu_offload=False)
    supported = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
    check_supported(config, SimpleNamespace(**supported))
    value, told = REFUSED_OF_DATA_PARALLELISM[key]
    with pytest.raises(ValueError, match=f"^{re.escape(told)} is not supported"):
        check_supported(config, SimpleNamespace(**{**supported, key: value}))
    config.optimizer_cuda_graph = True
    with pytest.raises(ValueError, match="--optimizer-cuda-graph is not supported"):
        check_supported(config, SimpleNamespace(**supported))


@pytest.mark.parametrize(("optimizer", "distributed"), [("muon", False), ("dist_muon", True)])
def test_the_papers_settings_are_not_those_of_megatrons_own_muon(optimizer, distributed):
    """megatron/test_pretrain.py has it with Megatron's own parser."""
    import argparse

    from muon_plugin.megatron.arguments import add_arguments, validate_args

    def parsed(*flags: str, optimizer: str = optimizer) -> argparse.Namespace:
        parser = add_arguments(argparse.ArgumentParser())
        parser.set_defaults(optimizer=optimizer, use_distributed_optimizer=distributed)
        return parser.parse_args(flags)

    with pytest.raises(ValueError, match=f"--muon-paper with --optimizer {optimizer} with(out)? --use-distributed"):
        validate_args(pytest.fail, parsed("--muon-paper"))
    for others in (parsed(), parsed("--muon-paper", optimizer="adam")):
        assert validate_args(vars, others) == vars(others)


def test_one_ranks_bad_setting_is_every_ranks_error(ranks, release):
    with pytest.raises(RankError) as error:
        ranks(2, release).run(refused, Layout(), {"muon_momentum": 2.0}, only=1)
    assert all(kind == "ValueError" and "muon-momentum" in message for kind, message in error.value.errors)


@pytest.mark.parametrize(
    ("key", "value"), [("muon_momentum", 0.5), ("lr", 0.5), ("weight_decay", 0.5), ("clip_grad", 9.0)]
)
def test_ranks_with_other_settings_are_told(ranks, release, key, value):
    with pytest.raises(RankError) as error:
        ranks(2, release).run(refused, Layout(), {key: value}, only=1)
    for _, message in error.value.errors:
        assert "disagree about the optimizer's settings: rank 0 has" in message
        assert f"rank 1 has {key.removeprefix('muon_')}={value}" in message


@pytest.mark.parametrize("wrong", ["frozen", "bare", "no list"])
def test_a_model_that_is_not_as_it_should_be_is_told(ranks, release, wrong):
    expected = {"frozen": "disagree about the model", "bare": "allowed: a list", "no list": "allowed: a list"}
    with pytest.raises(RankError) as error:
        ranks(2, release).run(wrong_model, Layout(), wrong)
    for kind, message in error.value.errors:
        assert (kind, expected[wrong] in message) == ("ValueError", True), message


def wrong_model(rank: int, layout: Layout, wrong: str) -> None:
    import muon_plugin

    muon_plugin.register("megatron")
    from megatron.core.optimizer import get_megatron_optimizer

    chunks = build(layout)
    if wrong == "frozen" and rank == 1:
        next(p for name, p in chunks[0].named_parameters() if "linear_fc2" in name).requires_grad = False
    models = {"frozen": chunks, "bare": [chunks[0].module], "no list": chunks[0]}
    get_megatron_optimizer(config_for(layout), models[wrong])


@pytest.mark.parametrize(("release", "dtype", "value"), covering(RELEASES, ["bf16", "fp32"], [float("nan"), 0.0]))
def test_where_shards_lie_is_not_told_from_weights(ranks, release, dtype, value):
    """They may be anything before a checkpoint is loaded (--no-initialization); another layout is told all the same."""
    for told in ranks(3, release).run(told_of_wrong_tables, Layout(dtype=dtype), value):
        assert "not where Megatron's tables say" in told


def told_of_wrong_tables(rank: int, layout: Layout, value: float) -> str:
    from muon_plugin.megatron.routing import parameters
    from muon_plugin.megatron.shards import names, shards

    chunks = build(layout)
    with torch.no_grad():
        for p in chunks[0].parameters():
            p.fill_(value)
    stock = optimizer_for(chunks, layout).chained_optimizers[0]
    ranges = [(model, stock._get_model_param_range_map(model)["param"]) for model in stock.model_param_gbuf_map]
    held = next(held for model, held in ranges if held.end - held.start < model.numel())
    shift = -1 if held.start else 1
    held.start, held.end = held.start + shift, held.end + shift
    try:
        shards(stock, names(parameters(chunks, 1, 1)), 0, 0)
    except ValueError as error:
        return str(error)
    return ""


def test_a_stage_whose_every_parameter_is_frozen_trains(ranks, release):
    """Rank 0 then holds nothing, prints a table without a plan, and takes part in every collective."""
    printed = ranks(2, release).run(half_frozen, Layout(pp=2))
    assert "this is pipeline stage 0 of 2" in printed[0]
    assert "Newton-Schulz" not in printed[0]


def half_frozen(rank: int, layout: Layout) -> str:
    import contextlib
    import io

    chunks = build(layout, freeze="" if rank == 0 else None)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        optimizer = optimizer_for(chunks, layout)
    step(chunks, optimizer, layout, 0)
    return out.getvalue()


def test_a_matrix_can_be_sent_to_adam(ranks, release):
    """0.19.2's way: an override of the optimizer."""
    if release != "0.19.2":
        pytest.skip("0.16.1 has no such override")
    assert ranks(2, release).run(sent_to_adam, Layout()) == [{"decoder.layers.0.mlp.linear_fc2.weight"}] * 2


def sent_to_adam(rank: int, layout: Layout) -> set[str]:
    """Names of the matrices that are no longer Muon's."""
    import muon_plugin

    muon_plugin.register("megatron")
    from megatron.core.optimizer import ParamKey, get_megatron_optimizer

    def of_muon(overrides: Any) -> set[str]:
        optimizer = get_megatron_optimizer(config_for(layout), build(layout), overrides)
        for part in optimizer.chained_optimizers:
            assert all(("exp_avg" in s) != ("momentum_buffer" in s) for s in part.optimizer.state.values())
        return {matrix.parameter for update in updates(optimizer) for matrix in update.matrices}

    # Where one rank holds all of the matrix, the other has to learn of it.
    return of_muon(None) - of_muon({ParamKey(name="*layers.0.mlp.linear_fc2.weight"): {"optimizer": "adam"}})


def test_the_papers_flag_is_a_start_that_later_flags_change():
    import argparse

    from muon_plugin.megatron.arguments import add_arguments
    from muon_plugin.megatron.settings import Settings

    parser = add_arguments(argparse.ArgumentParser())
    parser.add_argument("--muon-momentum", type=float, default=0.9)
    assert parser.parse_args(["--muon-paper"]).muon_momentum == 0.95
    assert parser.parse_args(["--muon-paper", "--muon-momentum", "0.8"]).muon_momentum == 0.8
    assert parser.parse_args(["--muon-momentum", "0.8"]).muon_momentum == 0.8
    assert not hasattr(parser.parse_args([]), "muon_nesterov")
    add_arguments(parser)  # a patched source, and the hook on it
    from_python = SimpleNamespace(muon_paper=True, muon_momentum=0.9, muon_split_qkv=True)
    assert "as in the paper" in Settings.from_config(from_python).describe()


def test_flags_that_do_nothing_say_so_once(ranks, release):
    printed = ranks(2, release).run(printed_by, Layout(tp=2, muon={"muon_tp_mode": "duplicated"}))
    assert printed[0].count("--muon-tp-mode duplicated does nothing") == 1
    assert "muon-tp-mode" not in printed[1]


def printed_by(rank: int, layout: Layout) -> str:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        optimizer_for(build(layout), layout)
    return out.getvalue()


def test_the_table_says_how_the_run_differs_from_the_paper(ranks, release):
    from muon_plugin.megatron.settings import PAPER

    plain = ranks(1, release).run(printed_by, Layout())[0]
    assert "the paper has nesterov True, coefficient_type simple, extra_scale_factor 0.2 (--muon-paper)" in plain
    paper = ranks(1, release).run(printed_by, Layout(muon=PAPER))[0]
    assert "as in the paper" in paper


def test_unregister_gives_megatron_its_own_code_back(ranks, release):
    assert ranks(1, release).run(registered)[0] == (True, True)


def registered(rank: int) -> tuple[bool, bool]:
    import megatron.core.optimizer as module

    import muon_plugin

    muon_plugin.unregister()
    own = module.get_megatron_optimizer
    muon_plugin.register("megatron")
    muon_plugin.register("megatron")
    wrapped = module.get_megatron_optimizer is not own
    muon_plugin.unregister()
    return wrapped, module.get_megatron_optimizer is own


def test_overrides_and_multipliers_reach_each_parameter(ranks, release):
    """`config_overrides`: a learning rate of its own for one matrix."""
    found = ranks(2, release).run(overridden, Layout(dtype="fp32"))[0]
    assert found["decoder.layers.0.mlp.linear_fc2.weight"] == pytest.approx(0.5, rel=1e-4)
    assert found["decoder.layers.1.mlp.linear_fc2.weight"] == pytest.approx(1.0, rel=1e-4)


def overridden(rank: int, layout: Layout) -> dict[str, float]:
    """RMS of the first update of each parameter over that without the override."""
    import muon_plugin

    muon_plugin.register("megatron")
    from megatron.core.optimizer import ParamKey, get_megatron_optimizer

    sizes = []
    for factor in (1.0, 0.5):
        chunks = build(layout)
        before = full_weights(chunks, layout)
        key = ParamKey(name="*layers.0.mlp.linear_fc2.weight")
        override = {key: {"max_lr": 0.01 * factor, "min_lr": 0.01 * factor, "wd_mult": 0.0}}
        optimizer = get_megatron_optimizer(config_for(layout, weight_decay=0.0), chunks, override)
        for group in optimizer.param_groups:  # as Megatron's scheduler does
            group["lr"] = group["max_lr"]
        step(chunks, optimizer, layout, 0)
        after = full_weights(chunks, layout)
        sizes.append({name: float((before[name] - after[name]).norm()) for name in before})
    return {name: sizes[1][name] / sizes[0][name] for name in sizes[0]}


def test_an_overflow_under_fp16_leaves_all_state_as_it_was(ranks, release):
    assert ranks(2, release).run(overflowed, Layout(dtype="fp16")) == [True, True]


def overflowed(rank: int, layout: Layout) -> bool:
    chunks = build(layout)
    optimizer = optimizer_for(chunks, layout)
    step(chunks, optimizer, layout, 0)
    state = [part.optimizer.state_dict()["state"] for part in optimizer.chained_optimizers]
    before = [{k: v.clone() for k, v in s.items()} for part in state for s in part.values()]
    set_gradients(chunks, layout, 1, float(optimizer.get_loss_scale()))
    next(chunks[0].parameters()).main_grad.view(-1)[0] = float("inf")
    for bucket in chunks[0].buffers:
        bucket.grad_data[:5] = float("inf")
    done, *_ = optimizer.step()
    after = [s for part in optimizer.chained_optimizers for s in part.optimizer.state_dict()["state"].values()]
    same = all(torch.equal(a[key], b[key]) for a, b in zip(before, after, strict=True) for key in a)
    return same and not done


def test_a_model_on_some_of_the_ranks_asks_no_other(ranks, release):
    """With process groups of its own (`pg_collection`): here each of a pipeline's stages, as if it were a model."""
    whole = ranks(4, release).run(trained, Layout(pp=2), 3)[0]
    *others, first, second = ranks(4, release).run(two_models, Layout(pp=2))
    assert [TITLE in printed for _, printed in (*others, first, second)] == [False, False, True, False]
    for found, _ in (first, second):
        assert len(found) > 10
        assert differing(found, {name: whole[name] for name in found}) == []


TITLE = "muon_plugin ---"  # of the start-up table


def two_models(rank: int, layout: Layout) -> tuple[dict[str, Tensor], str]:
    """AdamW trains the first, Muon the second. (To build an optimizer, Megatron itself asks the world.)"""
    from megatron.core import parallel_state
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.process_groups_config import ProcessGroupCollection

    import muon_plugin

    muon_plugin.register("megatron")
    chunks = build(layout)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.pp = [dist.new_group([single]) for single in range(dist.get_world_size())][rank]
    groups.mp = groups.tp_ep_pp = groups.tp_ep_pp_with_egtp_remat = groups.pp
    own = {"optimizer": "adam", "lr": 0.001} if parallel_state.is_pipeline_first_stage() else {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        config = config_for(layout, **own)
        optimizer = get_megatron_optimizer(config, chunks, use_gloo_process_groups=False, pg_collection=groups)
    for number in range(3):
        step(chunks, optimizer, layout, number)
    return {name: p.detach().float() for name, p, _ in named(chunks)}, printed.getvalue()
