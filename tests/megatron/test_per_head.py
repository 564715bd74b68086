"""--muon-split-qkv-per-head: the same bits on every layout of Megatron, and as with a parameter for each head."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor, nn

from tests.support.combinations import in_turn, some
from tests.support.integers import differing, gradient
from tests.support.megatron_model import Layout, build, full_weights, optimizer_for, trained
from tests.support.ranks import RankError

RELEASES = ("0.16.1", "0.19.2")
PER_HEAD = {"muon_split_qkv_per_head": True}


def layout(model: str = "dense", muon: dict[str, Any] | None = None, **cut: Any) -> Layout:
    return Layout(model, muon={**PER_HEAD, **(muon or {})}, **cut)


LAYOUTS = {
    "DP": (3, layout()),
    "TP 2": (4, layout(tp=2)),
    "TP 4": (4, layout(tp=4)),
    "TP above the query groups, inside a head": (4, layout("few_groups", tp=4)),
    "gated attention": (4, layout("gated_attention", tp=2)),
    "PP": (4, layout(tp=2, pp=2)),
    "EP": (4, layout("moe", tp=2, ep=2)),
    "offload": (2, layout(muon={"muon_offload": True})),
}
#: 0.16.1 builds latent attention with Transformer Engine alone.
LATENT = {"low rank of the query": (4, layout("latent", tp=2)), "without": (3, layout("latent_q"))}


@pytest.mark.parametrize(("release", "case"), in_turn(RELEASES, some(LAYOUTS, 3)))
def test_the_same_bits_on_every_layout(ranks, release, case):
    check(ranks, release, *LAYOUTS[case])


@pytest.mark.parametrize("case", some(LATENT, 1))
def test_latent_attention(ranks, case):
    check(ranks, "0.19.2", *LATENT[case])


def check(ranks, release: str, world: int, cut: Layout) -> None:
    expected = ranks.alone(trained, layout(cut.model), megatron=release)
    for found in ranks(world, release).run(trained, cut):
        assert differing(found, expected) == []


@pytest.mark.fast
@pytest.mark.parametrize(
    ("release", "model"), [("0.16.1", "dense"), ("0.19.2", "gated_attention"), ("0.19.2", "latent")]
)
def test_the_same_bits_as_a_parameter_for_each_head(ranks, release, model):
    cut = layout(model, {"muon_extra_scale_factor": 0.2}, tp=2, dtype="fp32")
    ours = ranks(2, release).run(trained, cut, 4)[0]
    theirs = ranks(1, release).run(each_head_apart, layout(model, dtype="fp32"), 4)[0]
    assert len(theirs) >= 16
    for name, weight in theirs.items():
        assert torch.equal(weight, ours[name]), name
    whole = ranks(2, release).run(trained, Layout(model, tp=2, dtype="fp32", muon={"muon_extra_scale_factor": 0.2}), 4)[
        0
    ]
    assert {n.partition("self_attention.")[2] for n in theirs if not torch.equal(ours[n], whole[n])} == HEADS[
        model
    ].keys()


#: The sizes of the heads along the outputs, by Megatron's own attention.
HEADS: dict[str, dict[str, list[int]]] = {
    "dense": {"linear_qkv.weight": [6] * 16},
    "gated_attention": {"linear_qkv.weight": [6] * 24},
    "latent": {"linear_q_up_proj.weight": [10] * 8, "linear_kv_up_proj.weight": [6, 5] * 8},
}


def each_head_apart(rank: int, of: Layout, steps: int) -> dict[str, Tensor]:
    """Muon in one process, on the matrices of the Megatron model, with a parameter for each head."""
    import muon_plugin

    weights = {
        name: w
        for name, w in full_weights(build(of), of).items()
        if w.dim() == 2 and "embedding" not in name and "output_layer" not in name
    }
    model, parts = nn.Module(), {}
    for name, weight in weights.items():
        sizes = HEADS[of.model].get(name.partition("self_attention.")[2], [len(weight)])
        sizes = [len(weight) // 2] * 2 if "linear_fc1" in name else sizes
        sizes = [10, 4] if "linear_kv_down_proj" in name else sizes
        parts[name] = [nn.Parameter(part.clone()) for part in weight.split(sizes)]
        for number, part in enumerate(parts[name]):
            model.register_parameter(f"{name.replace('.', '/')}/{number}", part)
    settings = {"momentum": 0.95, "nesterov": False, "ns_coefficients": "quintic", "lr": 0.01, "weight_decay": 0.1}
    optimizer = muon_plugin.Muon(model.named_parameters(), model=model, split={"*": "whole"}, **settings)
    for step in range(steps):
        for name, weight in weights.items():
            whole = gradient(weight.shape, crc32(name.encode()), step, 0, 0, 1, 1)
            for part, grad in zip(parts[name], whole.split([len(part) for part in parts[name]])):
                part.grad = grad.clone()
        optimizer.step()
    return {name: torch.cat(of_name).detach() for name, of_name in parts.items()}


def test_what_excludes_it_and_what_is_no_switch(ranks, release):
    for options, words in (
        ({"muon_split_qkv": False}, "--muon-split-qkv-per-head and --muon-no-split-qkv exclude each other"),
        ({"muon_split_qkv_per_head": "yes"}, "--muon-split-qkv-per-head 'yes'"),
        ({"muon_split_qkv_per_heads": True}, "did you mean muon_split_qkv_per_head?"),
    ):
        with pytest.raises(RankError) as error:
            ranks(2, release).run(optimizer_of, Layout(muon={**PER_HEAD, **options}))
        assert all(kind == "ValueError" and words in message for kind, message in error.value.errors)


def optimizer_of(rank: int, of: Layout, freeze: str | None = None) -> None:
    optimizer_for(build(of, freeze), of)


def test_a_model_whose_attention_is_frozen_is_refused(ranks, release):
    with pytest.raises(RankError) as error:
        ranks(2, release).run(optimizer_of, layout(), "self_attention")
    assert all(kind == "ValueError" and "of no trainable parameter" in message for kind, message in error.value.errors)


@pytest.mark.fast
def test_the_table_says_how_many_heads_of_what_shape(ranks, release):
    table = ranks(2, release).run(table_of, layout("gated_attention", tp=2))[0]
    assert "linear_qkv.weight  144x24, 8 query, 8 gate, 4 key and 4 value heads of 6x24  (4)" in table
    assert "attention head by head" in table


def table_of(rank: int, of: Layout) -> str:
    import contextlib
    import io

    with contextlib.redirect_stdout(printed := io.StringIO()):
        optimizer_for(build(of), of)
    return printed.getvalue()


@pytest.mark.fast
def test_what_has_other_heads_is_named():
    from muon_plugin.core.layout import Partition
    from muon_plugin.megatron.routing import Parameter, route

    model = nn.Module()
    model.config = SimpleNamespace(gated_linear_unit=False, kv_channels=4, num_query_groups=1, num_attention_heads=2)
    found = []
    for name, rows in (("linear_qkv", 16), ("in_proj", 12), ("linear_wq_b", 12)):
        model.add_module(name, nn.Linear(6, rows, bias=False))
        weight = model.get_submodule(name).weight
        found.append(Parameter(weight, Partition.of(f"{name}.weight", weight.shape)))
    routing = route(found, [model], per_head=True)
    assert [m.rows for m in routing.matrices] == [4] * 4 + [12, 12]
    assert set(routing.not_by_head) == {"in_proj.weight", "linear_wq_b.weight"}
    assert sum("is not cut by head" in note for note in routing.notes) == 2
