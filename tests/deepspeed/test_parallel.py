"""Under DeepSpeed with more than data parallelism: the same bits at every TP degree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import muon_plugin
from tests.support.combinations import FULL, covering, in_turn, some
from tests.support.deepspeed_runs import convert
from tests.support.integers import STEPS, build, config, differing
from tests.support.integers import trained as trained_on_integers
from tests.support.monitored import written
from tests.support.parallel_models import (
    Block,
    Experts,
    Grid,
    Marked,
    Stage,
    described,
    in_a_pipeline,
    norms_in_a_pipeline,
    routed_in_a_pipeline,
    with_experts,
    with_replaced_experts,
)
from tests.support.ranks import RankError

CUT = {
    "layer_specs": [
        {"patterns": [r".*down\.weight$"], "partition_type": "row"},
        {"patterns": [r".*up\.weight$"], "partition_type": "column"},
        {"patterns": [r".*qkv\.weight$"], "partition_type": "column", "shape": (3, -1), "partition_dim": 0},
        {"patterns": [r".*router\.weight$"], "partition_type": "skip"},
    ],
    "use_default_specs": False,
}


def built(rank: int, settings: dict[str, Any], tp: int) -> Any:
    if tp > 1:
        settings = {**settings, "tensor_parallel": {"autotp_size": tp, "partition_config": CUT}}
    engine = build(rank, settings, Block())
    engine.module.cut = tp > 1
    assert (described(engine.module.down.weight) is not None) is (tp > 1)
    return engine


def steps(engine: Any, rank: int, tp: int, first: int, last: int) -> None:
    gas, dp = engine.gradient_accumulation_steps(), engine.dp_world_size
    dp_rank = dist.get_rank(engine.data_parallel_group) if tp > 1 else rank
    for step in range(first, last):
        for micro in range(gas):
            engine.backward(engine(step, micro, dp_rank, dp, gas))
            engine.step()


def trained(rank: int, settings: dict[str, Any], tp: int) -> dict[str, Tensor]:
    """Whole weights after some steps."""
    engine = built(rank, settings, tp)
    steps(engine, rank, tp, 0, STEPS)
    return gathered(engine, tp)


def gathered(engine: Any, tp: int) -> dict[str, Tensor]:
    import deepspeed
    from deepspeed.utils import groups

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        found = {}
        for name, p in engine.module.named_parameters():
            if described(p):
                shards: list[Any] = [None] * tp
                dist.all_gather_object(shards, p.detach().clone(), group=groups.get_tensor_model_parallel_group())
                found[name] = described(p).rebuild(dict(enumerate(shards)))
            else:
                found[name] = p.detach().clone()
    return found


@pytest.mark.parametrize(
    ("stage", "world", "offload", "gas"),
    some(
        covering(
            (0, 1, 2, 3), (2, 4), (False, True), (1, 4), valid=lambda stage, _, offload, gas: stage or not offload
        ),
        5,
    ),
)
def test_autotp_changes_no_bit(ranks, stage, world, offload, gas):
    """DeepSpeed #8437: each shard is orthogonalized alone, and the update depends on the TP degree."""
    alone = ranks.alone(trained, config(0, "bf16"), 1, apart="autotp")
    zero = {"offload_optimizer": {"device": "cpu"}} if offload else {}
    for found in ranks(world, apart="autotp").run(trained, config(stage, "bf16", gas=gas, zero_optimization=zero), 2):
        assert differing(found, alone) == []


def saved(rank: int, settings: dict[str, Any], tp: int, folder: Path) -> None:
    engine = built(rank, settings, tp)
    steps(engine, rank, tp, 0, STEPS - 2)
    engine.save_checkpoint(str(folder), tag="tag")
    if rank == 0:
        convert(folder)
    dist.barrier()


def resumed(rank: int, settings: dict[str, Any], tp: int, folder: Path) -> dict[str, Tensor]:
    engine = built(rank, {**settings, "checkpoint": {"load_universal": True}}, tp)
    engine.load_checkpoint(str(folder))
    steps(engine, rank, tp, STEPS - 2, STEPS)
    return gathered(engine, tp)


def test_resumed_at_another_tp_degree(ranks, tmp_path):
    """By DeepSpeed's own converter, from every layout to every other; FULL=1 for more of them."""
    layouts = {2: [(1, 2), (3, 4)], 1: [(2, 4)]}  # (stage, world) by TP degree
    if FULL:
        layouts = {2: [(1, 2), (2, 4), (3, 4)], 1: [(1, 1), (2, 4), (3, 2)]}
    folders = [tmp_path / f"{stage} {world} {tp}" for tp in layouts for stage, world in layouts[tp]]

    def pool(world: int, tp: int) -> Any:  # DeepSpeed keeps TP groups for good
        return ranks(world, apart="autotp" if tp > 1 else None)

    def save_all(tp: int) -> None:
        for stage, world in layouts[tp]:
            pool(world, tp).run(saved, config(stage, "bf16"), tp, tmp_path / f"{stage} {world} {tp}")

    def resume_all(tp: int) -> None:
        for stage, world in layouts[tp]:
            for folder in folders:
                found = pool(world, tp).run(resumed, config(stage, "bf16"), tp, folder)[0]
                assert differing(found, alone) == [], f"from {folder.name} to {stage} {world} {tp}"

    save_all(2)
    alone = ranks.alone(trained, config(0, "bf16"), 1)
    save_all(1)
    resume_all(1)
    resume_all(2)


def watched(rank: int, settings: dict[str, Any], tp: int, folder: Path) -> None:
    monitor = {"enabled": True, "output_path": str(folder / str(tp)), "job_name": "run"}
    trained(rank, {**settings, "steps_per_print": 5, "csv_monitor": monitor}, tp)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_sizes_that_a_user_watches_are_the_same_at_every_tp_degree(ranks, tmp_path, stage):
    ranks(1, apart="autotp").run(watched, config(stage), 1, tmp_path)
    ranks(4, apart="autotp").run(watched, config(stage), 2, tmp_path)
    alone, cut = written(tmp_path / "1"), written(tmp_path / "2")
    assert alone.keys() == cut.keys()
    for name in alone:
        if not name.endswith("share"):
            assert cut[name] == pytest.approx(alone[name], rel=1e-5), name


def with_mpu(
    rank: int, settings: dict[str, Any], tp: int, marked: bool = True, own: bool = False
) -> tuple[int, dict[str, Tensor]]:
    """Five steps: this rank in TP, its parts of the weights. With `own`, the optimizer is the client's."""
    mpu = Grid(tp) if tp > 1 else None
    model = Marked(dist.get_rank(mpu.tp) if mpu else 0, tp, marked)
    options = {"optimizer": muon_plugin.Muon(model.named_parameters(), model=model)} if own else {}
    engine = build(rank, settings, model, mpu=mpu, **options)
    dp_rank, dp = (dist.get_rank(mpu.dp), dist.get_world_size(mpu.dp)) if mpu else (0, 1)
    for step in range(5):
        engine.backward(engine(step, dp_rank, dp))
        engine.step()
    return model.rank, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_clients_mpu_changes_no_bit(ranks, stage):
    _, alone = ranks.alone(with_mpu, config(0, "bf16"), 1, apart="mpu")
    for rank, found in ranks(4, apart="mpu").run(with_mpu, config(stage, "bf16"), 2):
        cut = Marked(rank, 2)
        parts = {name: cut.part(whole, cut.CUTS[name.split(".")[0]]) for name, whole in alone.items()}
        assert differing(found, parts) == []


@pytest.mark.parametrize("stage", [0, 1])
def test_a_clients_muon_that_was_built_for_parts_of_matrices_is_refused(ranks, stage):
    settings = config(stage, "bf16")
    del settings["optimizer"]
    told = r"built for up\.weight \[16, 24\], which tensor parallelism has cut from \[32, 24\].*in the DeepSpeed JSON"
    with pytest.raises(RankError, match=told) as caught:
        ranks(2, apart="mpu").run(with_mpu, settings, 2, True, True)
    assert {kind for kind, _ in caught.value.errors} == {"ValueError"}


def test_parts_that_nobody_marked_are_told(ranks):
    with pytest.raises(RankError, match=r"disagree about parameters that no tensor parallelism cuts.*Mark what each"):
        ranks(2, apart="mpu").run(with_mpu, config(1, "bf16"), 2, False)


def zeros(rank: int, settings: dict[str, Any], told: bool | None) -> None:
    """A client's model with a matrix that starts from zeros, and perhaps says that each rank holds it whole."""
    mpu = Grid(2)
    model = Marked(dist.get_rank(mpu.tp), 2)
    nn.init.zeros_(model.router.weight)
    if told is not None:
        model.router.weight.tensor_model_parallel = told
    build(rank, settings, model, mpu=mpu).destroy()


def test_a_matrix_of_zeros_could_be_a_part_or_a_replica(ranks):
    """Their sums are equal: what nobody marked was taken for a replica, and trained by one rank's gradient."""
    told = r"all elements of router\.weight \[32, 24\] are equal.*tensor_model_parallel=False"
    with pytest.raises(RankError, match=told) as caught:
        ranks(2, apart="mpu").run(zeros, config(1, "bf16"), None)
    assert {kind for kind, _ in caught.value.errors} == {"ValueError"}
    ranks(2, apart="mpu").run(zeros, config(1, "bf16"), False)


def compared(rank: int, settings: dict[str, Any], padding: bool) -> str:
    """What is told of replicas that differ in the padding of ZeRO-3's last part, or in elements that are not NaN."""
    from deepspeed.utils import groups

    from muon_plugin.deepspeed.tensor_parallel import compare_replicas

    model = Block()
    model.odd = nn.Linear(5, 7, bias=False)
    settings = {**settings, "tensor_parallel": {"autotp_size": 2, "partition_config": CUT}}
    odd = build(rank, settings, model).module.odd.weight
    part = odd.ds_tensor.view(-1)
    with torch.no_grad():
        if not padding:
            part[0], part[1] = float("nan"), rank
        elif dist.get_rank(odd.ds_process_group) == 1:
            part[-odd.padding_size() :] = rank
    assert odd.padding_size() == 1
    try:
        compare_replicas({odd: "odd"}, groups.get_tensor_model_parallel_group(), {"odd"})
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("padding", [True, False])
def test_replicas_are_compared_bit_by_bit_without_what_pads_them(ranks, padding):
    """That memory is never written; and a sum is NaN whatever the other elements are."""
    found = ranks(4, apart="autotp").run(compared, config(3, "bf16"), padding)
    assert ["disagree about" in told for told in found] == [not padding] * 4


@pytest.mark.parametrize(("stage", "ranks_and_ep"), in_turn([0, 1, 2], [(2, 1), (2, 2), (4, 2), (4, 4)]))
def test_expert_parallelism_changes_no_bit(ranks, stage, ranks_and_ep):
    world, ep = ranks_and_ep
    alone = ranks.alone(with_experts, config(0, "bf16"), 1, apart="experts")
    seen = set()
    for found in ranks(world, apart="experts").run(with_experts, config(stage, "bf16"), ep):
        seen |= set(found)
        assert differing(found, {name: alone[name] for name in found}) == []
    assert seen == set(alone)


def test_a_clients_own_muon_with_deepspeeds_groups_of_experts(ranks):
    alone = ranks.alone(with_experts, config(0, "bf16"), 1, apart="experts")
    for found in ranks(2, apart="experts").run(with_experts, config(1, "bf16"), 2, True):
        assert differing(found, {name: alone[name] for name in found}) == []


@pytest.mark.parametrize(
    ("ranks_and_stages", "zero"),
    in_turn([(2, 2), (4, 2), (4, 4)], [(0, "fp32"), (1, "bf16"), (1, "fp32")]),
)
def test_a_pipeline_changes_no_bit(ranks, ranks_and_stages, zero):
    """The first of four stages holds nothing but an embedding, the third nothing but a matrix."""
    (world, stages), (stage, dtype) = ranks_and_stages, zero
    settings = config(stage, dtype, gas=2)
    alone = ranks.alone(in_a_pipeline, settings, 1, apart="pipeline")
    seen = set()
    for found in ranks(world, apart="pipeline").run(in_a_pipeline, settings, stages):
        seen |= set(found)
        assert differing(found, {name: alone[name] for name in found}) == []
    assert seen == set(alone)


@pytest.mark.parametrize(
    ("dtype", "sections"),
    [("fp32", {}), ("fp16", {}), ("fp32", {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})],
)
def test_the_gradient_norm_of_a_pipeline_is_that_of_all_its_stages(ranks, dtype, sections):
    """DeepSpeed's ZeRO adds it up group by group, and would wait for the groups that a stage does not have."""
    settings = config(1, dtype, gas=2, gradient_clipping=1.0, **sections)
    alone = ranks.alone(norms_in_a_pipeline, settings, 1, apart="pipeline")
    for found in ranks(4, apart="pipeline").run(norms_in_a_pipeline, settings, 4):
        assert found == pytest.approx(alone, rel=1e-5)


def test_the_head_of_a_pipeline_is_a_head_and_its_blocks_are_not(ranks):
    """Names begin with a layer's number, and a stage has only some of the layers."""
    blocks = [{f"{layer}.fc.weight": "", f"{layer}.output.weight": ""} for layer in (2, 3)]
    assert ranks(2, apart="pipeline").run(routed_in_a_pipeline, config(1, gas=2)) == [
        {"0.weight": "embedding"} | blocks[0],
        blocks[1] | {"4.head.weight": "output head"},
    ]


def watched_in_a_pipeline(rank: int, settings: dict[str, Any], stages: int, folder: Path) -> None:
    """Two steps; the first and the last layer are one."""
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    deepspeed.init_distributed("gloo")
    tied = TiedLayerSpec("embed", Stage, 0, 10, 16, tied_weight_attr="embed.weight")
    layers = [tied, LayerSpec(Stage, 1, 16, 24), LayerSpec(Stage, 2, 24, 20), tied]
    model = PipelineModule(layers, num_stages=stages, loss_fn=lambda x, _: x[0, 0], partition_method="uniform")
    monitor = {"enabled": True, "output_path": str(folder / str(stages)), "job_name": "run"}
    settings = {**settings, "steps_per_print": 1, "csv_monitor": monitor}
    engine = build(rank, settings, model, model_parameters=list(model.parameters()))
    for step in range(2):
        rows = [(torch.tensor([[0.0, step, micro]]).requires_grad_(), torch.zeros(1)) for micro in range(2)]
        engine.train_batch(iter(rows))


def test_sizes_that_a_user_watches_count_what_a_pipeline_ties_once(ranks, tmp_path):
    for stages in (1, 2):
        settings = config(0, "fp32", gas=2)
        ranks(stages, apart="pipeline").run(watched_in_a_pipeline, settings, stages, tmp_path)
    alone, cut = written(tmp_path / "1"), written(tmp_path / "2")
    for name in ("weight_rms_adamw", "momentum_norm_adamw", "update_rms_muon", "gradient_norm"):
        assert cut[name] == pytest.approx(alone[name], rel=1e-5), name


@pytest.mark.parametrize(
    ("stage", "dtype", "world", "ep"), [(0, "fp32", 2, 1), (1, "bf16", 2, 2), (2, "fp32", 4, 2), (3, "bf16", 4, 2)]
)
def test_experts_that_autoep_has_replaced_end_in_the_same_bits_and_resume(ranks, tmp_path, stage, dtype, world, ep):
    alone = ranks.alone(with_replaced_experts, config(0, dtype), 1, None, apart="autoep")
    seen = set()
    for found in ranks(world, apart="autoep").run(with_replaced_experts, config(stage, dtype), ep, tmp_path):
        seen |= set(found)
        assert differing(found, {name: alone[name] for name in found}) == []
    assert seen == set(alone)


@pytest.mark.parametrize(("stage", "ep", "other", "other_ep"), [(1, 2, 3, 1), (3, 2, 1, 2), (2, 1, 2, 2)])
def test_experts_that_autoep_has_replaced_resume_at_another_stage_and_ep_size(
    ranks, tmp_path, stage, ep, other, other_ep
):
    """A universal checkpoint has the experts of all ranks in one parameter, of which a rank takes its own."""
    alone = ranks.alone(with_replaced_experts, config(0, "bf16"), 1, None, apart="autoep")
    ranks(2, apart=f"autoep {ep}").run(with_replaced_experts, config(stage, "bf16"), ep, tmp_path)
    convert(tmp_path)
    settings = config(other, "bf16", checkpoint={"load_universal": True})
    again = ranks(2, apart=f"autoep {other_ep}").run(
        with_replaced_experts, settings, other_ep, tmp_path, "universal", 2
    )
    seen = set()
    for found in again:
        seen |= set(found)
        assert differing(found, {name: alone[name] for name in found}) == []
    assert seen == set(alone)


def test_experts_are_not_converted(ranks, tmp_path):
    ranks(2, apart="experts").run(saved_with_experts, config(1, "bf16"), tmp_path)
    with pytest.raises(SystemExit, match=r"experts of deepspeed\.moe.*resume at the world size"):
        convert(tmp_path)


def saved_with_experts(rank: int, settings: dict[str, Any], folder: Path) -> None:
    engine = build(rank, settings, Experts(2))
    engine.backward(engine(0))
    engine.step()
    engine.save_checkpoint(str(folder), tag="tag")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ulysses_changes_no_bit(ranks, stage):
    """ZeRO cuts over sequence and data parallel ranks together."""
    alone = ranks.alone(trained_on_integers, config(0, "bf16"))
    for found in ranks(2, apart="sequence").run(trained_on_integers, config(stage, "bf16", sequence_parallel_size=2)):
        assert differing(found, alone) == []
