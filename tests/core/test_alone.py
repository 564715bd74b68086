"""muon_plugin.Muon without an engine: against torch's, under plain DDP, and what it refuses."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from muon_plugin import Muon
from muon_plugin.core.agreement import CHUNK, checksum
from muon_plugin.core.coefficients import COEFFICIENT_SETS
from tests.support.integers import IntegerModel, differing
from tests.support.ranks import RankError
from tests.support.torch_releases import needs_muon

pytestmark = pytest.mark.fast


def layers() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(50, 32),
            "up": nn.Linear(32, 128),
            "down": nn.Linear(128, 32),
            "wide": nn.Linear(128, 384),
            "lm_head": nn.Linear(32, 50),
        }
    )


def random_gradients(model: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn_like(p)


@needs_muon
def test_ten_steps_end_where_torchs_muon_and_adamw_end():
    ours, theirs = layers(), layers()
    start = copy.deepcopy(ours)
    muon = Muon(ours.named_parameters(), lr=0.01, ns_method="standard")
    matrices = [theirs[name].weight for name in ("up", "down", "wide")]
    rest = [p for p in theirs.parameters() if not any(p is m for m in matrices)]
    reference = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1, betas=(0.9, 0.95))
    for step in range(10):
        for model in (ours, theirs):
            random_gradients(model, step)
        for optimizer in (muon, reference, adamw):
            optimizer.step()
    for (name, a), b, c in zip(ours.named_parameters(), theirs.parameters(), start.parameters()):
        assert (a - b).norm() < 1e-5 * (b - c).norm(), name


@pytest.mark.parametrize(
    ("fn", "scale"),
    [
        ("match_rms_adamw", lambda a, b, o: 0.2 * math.sqrt(max(a, b))),
        ("original", lambda a, b, o: math.sqrt(max(1, a / b))),
        ("update_norm", lambda a, b, o: 0.2 / o.double().square().mean().sqrt().item()),
        ("none", lambda a, b, o: 1.0),
    ],
)
@pytest.mark.parametrize("nesterov", [True, False])
def test_the_update_is_the_papers(fn, scale, nesterov):
    """Eqs. 1 to 4 and 6, written out in float64 but for the orthogonalization, over three steps."""
    model = nn.ModuleDict({"a": nn.Linear(24, 56, bias=False), "b": nn.Linear(56, 24, bias=False)})
    muon = Muon(model.named_parameters(), lr=0.02, weight_decay=0.3, adjust_lr_fn=fn, nesterov=nesterov, momentum=0.9)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    momenta = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in range(3):
        random_gradients(model, step)
        for name, p in model.named_parameters():
            grad = p.grad.double()
            momenta[name] = 0.9 * momenta[name] + 0.1 * grad
            direction = 0.9 * momenta[name] + 0.1 * grad if nesterov else momenta[name]
            o = muon.settings.newton_schulz(direction.bfloat16()[None])[0]
            change = scale(*p.shape, o) * o.double() + 0.3 * weights[name]
            weights[name] = weights[name] - 0.02 * change
        muon.step()
    for name, p in model.named_parameters():
        # bf16 rounds a few directions the other way, where float32 and float64 straddle a boundary
        assert (p.double() - weights[name]).norm() < 2e-3 * weights[name].norm(), name


def test_plain_ddp_computes_each_matrix_once_and_ends_in_the_same_bits(ranks):
    alone = ranks.alone(ddp)
    for world in (2, 3):
        for found in ranks(world).run(ddp):
            assert differing(found, alone) == []


def ddp(rank: int) -> dict[str, Tensor]:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model = IntegerModel()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    muon = Muon(model.named_parameters(), lr=0.01, model=model)
    for step in range(5):
        wrapped(step, 0, rank, dist.get_world_size(), 1).backward()
        muon.step()
        muon.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_ranks_with_models_of_their_own_are_told(ranks):
    with pytest.raises(RankError, match="the ranks disagree about the weights or the gradients"):
        ranks(2).run(no_replicas, False)
    ranks(2).run(no_replicas, True)


def test_a_checksum_tells_what_a_sum_does_not():
    nan = torch.tensor([float("nan"), 1.0, 2.0])
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool):
        assert checksum(nan.to(dtype)) == checksum(nan.to(dtype).clone())
    others = [nan[[0, 2, 1]], nan[:2], torch.tensor([float("nan"), 1.0, -2.0]), torch.zeros(3), -torch.zeros(3)]
    assert len({checksum(t) for t in [nan, *others]}) == 6
    wide = torch.arange(CHUNK + 2, dtype=torch.int32).view(2, -1)  # in several chunks, and not contiguous
    assert checksum(wide.mT) == checksum(wide.mT.contiguous()) != checksum(wide)


def no_replicas(rank: int, own_group: bool) -> None:
    import torch.distributed as dist

    groups = [dist.new_group([r]) for r in range(2)]
    torch.manual_seed(rank)
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    muon = Muon(model.named_parameters(), process_group=groups[rank] if own_group else None)
    random_gradients(model, rank)
    muon.step()


def test_each_half_has_its_own_learning_rate():
    muon = Muon(layers().named_parameters(), lr=0.1, muon_lr=0.02, adam_lr=0.003)
    assert {group["use_muon"]: group["lr"] for group in muon.param_groups} == {True: 0.02, False: 0.003}


def test_a_model_without_matrices_is_trained_by_adamw_and_told():
    """Prompt tuning, a head alone, or parameters that something has flattened."""
    p = nn.Parameter(torch.zeros(8))
    with pytest.warns(UserWarning, match="no parameter is a matrix of a hidden layer: AdamW trains all of them"):
        muon = Muon([("a", p)], lr=0.02, weight_decay=0.0)
    p.grad = torch.ones(8)
    muon.step()
    assert p.detach() == pytest.approx(-0.02, rel=1e-4)
    assert "note: no parameter is a matrix of a hidden layer" in muon.summary()


def test_a_model_with_nothing_to_train_is_left_as_it_is():
    """A reference model that is given the configuration of the trained one, with its patterns."""
    model = layers().requires_grad_(False)
    with pytest.warns(UserWarning, match="no parameter requires gradients: nothing is trained"):
        muon = Muon(model.named_parameters(), exclude=["up"], split={"down": 2})
    muon.step()
    muon.load_state_dict(muon.state_dict())
    assert muon.summary() == "muon_plugin: no parameter requires gradients: nothing is trained"


def test_a_scalar_parameter_loads():
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    model.register_parameter("logit_scale", nn.Parameter(torch.tensor(1.0)))
    muon = Muon(model.named_parameters())
    muon.load_state_dict(copy.deepcopy(muon.state_dict()))


def test_a_parameter_without_gradient_is_left_alone():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    muon = Muon(model.named_parameters(), lr=0.1)
    before = copy.deepcopy(model["b"].state_dict())
    model["a"](torch.randn(2, 8)).sum().backward()
    muon.step()
    assert differing(before, model["b"].state_dict()) == []
    assert not muon.state[model["b"].weight]["momentum_buffer"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip(dtype):
    """Momentum is fp32 and stays so, whatever the parameters are."""
    models = [layers().to(dtype) for _ in range(2)]
    optimizers = [Muon(model.named_parameters(), lr=0.01) for model in models]
    for step in range(2):
        random_gradients(models[0], step)
        optimizers[0].step()
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    assert optimizers[1].state[models[1]["up"].weight]["momentum_buffer"].dtype == torch.float32
    for step in range(2, 4):
        for model, optimizer in zip(models, optimizers):
            random_gradients(model, step)
            optimizer.step()
    assert differing(models[0].state_dict(), models[1].state_dict()) == []


def test_a_state_of_another_routing_is_refused():
    a, b = layers(), layers()
    saved = Muon(a.named_parameters()).state_dict()
    with pytest.raises(ValueError, match="the checkpoint's optimizer has"):
        Muon(b.named_parameters(), exclude=["up"]).load_state_dict(saved)


def test_groups_of_the_client_are_kept_in_their_order():
    """Equal options are no reason to merge them: a schedule may tell them apart by position."""
    named = list(layers().named_parameters())
    muon = Muon([{"params": named[:2]}, {"params": named[2:]}], lr=0.02)
    names = [[muon.names[p] for p in group["params"]] for group in muon.param_groups]
    assert [g["client_group"] for g in muon.param_groups] == sorted(g["client_group"] for g in muon.param_groups)
    for number, given in enumerate((named[:2], named[2:])):
        found = [n for of, g in zip(names, muon.param_groups) if g["client_group"] == number for n in of]
        assert sorted(found) == sorted(name for name, _ in given)


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_a_schedule_for_the_clients_groups_by_position_does_not_reach_the_wrong_half(key):
    """A list of the client's length must not set the rate of one half alone."""
    model = layers()
    muon = Muon([{"params": list(model.named_parameters())}], lr=0.02)
    random_gradients(model, 0)
    for group in muon.param_groups:
        group[key] *= 0.5
    muon.step()
    muon.param_groups[0][key] = 0.001
    with pytest.raises(RuntimeError, match=rf"{key} is 0\.001 in param_groups\[0\] and 0\.\d+ in param_groups\[1\]"):
        muon.step()


def test_halves_with_rates_of_their_own_are_scheduled_apart():
    model = layers()
    muon = Muon(model.named_parameters(), muon_lr=0.02, adam_lr=0.003)
    random_gradients(model, 0)
    muon.param_groups[0]["lr"] = 0.5
    muon.step()
    with pytest.raises(ValueError, match="Expected 2 lr_lambdas, but got 1"):
        torch.optim.lr_scheduler.LambdaLR(muon, [lambda step: 1.0])


BAD = [
    ({"lr": -1}, "lr=-1 is not valid; allowed: a number >= 0"),
    ({"lr": "1e-3"}, "lr='1e-3' is not valid .a string where a number is wanted."),
    ({"lr": True}, "lr=True"),
    ({"weight_decay": float("nan")}, "weight_decay=nan"),
    ({"momentum": 1.0}, "momentum=1.0 is not valid; allowed: a number from 0 to below 1"),
    ({"nesterov": 1}, "nesterov=1 is not valid; allowed: true or false"),
    ({"ns_steps": 0}, "ns_steps=0"),
    ({"ns_steps": 2.5}, "ns_steps=2.5"),
    ({"ns_method": "fast"}, "ns_method='fast' is not valid; allowed: auto, standard, gram"),
    ({"ns_dtype": "fp32"}, "ns_dtype='fp32' is not valid; allowed: auto, bf16, fp16"),
    (
        {"ns_dtype": "fp16", "ns_method": "standard"},
        "ns_dtype='fp16' with ns_method='standard' is not valid.* allowed: bf16 or auto, or one of the methods",
    ),
    (
        {"ns_dtype": "fp16", "ns_coefficients": [8.0, -20.0, 14.0]},
        "ns_dtype='fp16' with ns_method='auto' is not valid with these .* allowed: bf16 or auto, or the method gram",
    ),
    ({"ns_coefficients": "best"}, "ns_coefficients='best' is not a known set"),
    ({"adjust_lr_fn": "rms"}, "adjust_lr_fn='rms' is not valid; allowed: match_rms_adamw"),
    ({"betas": [0.9]}, "betas=.0.9. is not valid; allowed: two numbers"),
    ({"eps": 0}, "eps=0"),
    ({"muon_lr": "x"}, "muon_lr='x'"),
    ({"exclude": "embed"}, "exclude='embed' is not valid; allowed: a list of name patterns"),
    ({"split": ["qkv"]}, "split=.'qkv'. is not valid; allowed: an object"),
    ({"adamw": "fused"}, "adamw='fused' is not valid; allowed: auto, deepspeed, apex, torch_fused, torch"),
    ({"learning_rate": 1}, "learning_rate=1 is not a setting of Muon"),
    ({"momentun": 0.9}, "did you mean 'momentum'"),
]


@pytest.mark.parametrize(("settings", "match"), BAD)
def test_bad_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        Muon(layers().named_parameters(), **settings)


@pytest.mark.parametrize(
    ("params", "match"),
    [
        (lambda: list(layers().parameters()), "without a name"),
        (list, "params is empty"),
        (lambda: [{"params": list(layers().named_parameters()), "ns_steps": 3}], "a parameter group sets ns_steps=3"),
        (lambda: [{"params": list(layers().named_parameters()), "lr": -3}], "param group lr=-3"),
        (lambda: [("a", p) for p in [nn.Parameter(torch.randn(3, 3))] * 2], "twice"),
        (lambda: [("a", nn.Parameter(torch.randn(3, 5).T))], "not contiguous"),
        (lambda: [("a", nn.Parameter(torch.randn(3, 3, dtype=torch.complex64)))], "complex"),
    ],
)
def test_bad_parameters_are_refused(params, match):
    with pytest.raises(ValueError, match=match):
        Muon(params())


def test_what_fsdp_has_cut_is_no_vector(ranks):
    with pytest.raises(RankError, match=r"parameter .*embed.weight is cut by FSDP; allowed: whole tensors"):
        ranks(2).run(cut_by_fsdp)


def cut_by_fsdp(rank: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(layers(), use_orig_params=True, device_id=torch.device("cpu"))
    Muon(model.named_parameters(), model=model)


def test_ranks_that_disagree_are_told(ranks):
    """Every rank raises, and the message names the rank and the first difference."""
    for job, match in ((another_shape, "rank 0 has a.weight [8, 8]"), (another_setting, "momentum=0.5")):
        with pytest.raises(RankError) as caught:
            ranks(2).run(job)
        for kind, message in caught.value.errors:
            assert kind == "ValueError"
            assert match in message
    with pytest.raises(RankError) as caught:
        ranks(2).run(one_bad_setting)
    assert [kind for kind, _ in caught.value.errors] == ["ValueError", "ValueError"]
    assert "rank 1 of 2 failed: lr=-1" in caught.value.errors[0][1]


def another_shape(rank: int) -> None:
    Muon(nn.ModuleDict({"a": nn.Linear(8, 8 + rank)}).named_parameters())


def another_setting(rank: int) -> None:
    Muon(nn.ModuleDict({"a": nn.Linear(8, 8)}).named_parameters(), momentum=0.9 if rank == 0 else 0.5)


def one_bad_setting(rank: int) -> None:
    Muon(nn.ModuleDict({"a": nn.Linear(8, 8)}).named_parameters(), lr=0.1 if rank == 0 else -1)


def test_a_checkpoint_that_cannot_be_restored_changes_nothing():
    model = layers()
    muon = Muon(model.named_parameters(), lr=0.02)
    random_gradients(model, 0)
    muon.step()
    saved = muon.state_dict()
    matrix = next(i for i, state in saved["state"].items() if "momentum_buffer" in state)
    groups = [{**group, "lr": 0.5} for group in saved["param_groups"]]
    lacking = {"state": {**saved["state"], matrix: {}}, "param_groups": groups}
    before = {p: {key: torch.clone(value) for key, value in state.items()} for p, state in muon.state.items()}
    with pytest.raises(ValueError, match="the checkpoint has no momentum_buffer for a tensor of shape"):
        muon.load_state_dict(lacking)
    assert {group["lr"] for group in muon.param_groups} == {0.02}
    assert muon.state.keys() == before.keys()
    assert all(torch.equal(value, before[p][key]) for p, state in muon.state.items() for key, value in state.items())


@pytest.mark.parametrize("nesterov", [True, False])
def test_offload_keeps_the_bits_and_puts_the_direction_in_the_gradients_place(nesterov):
    """The CPU has no other memory to move momentum to; where there is a GPU, tests/gpu looks where it is."""
    found = {}
    for offload in (False, True):
        model = layers()
        muon = Muon(model.named_parameters(), lr=0.02, nesterov=nesterov, offload=offload)
        for step in range(3):
            random_gradients(model, step)
            given = {name: p.grad.clone() for name, p in model.named_parameters()}
            muon.step()
        matrices = {matrix.parameter for matrix in muon.routing.matrices}
        changed = {name for name, p in model.named_parameters() if not torch.equal(p.grad, given[name])}
        assert changed == (matrices if offload else set())
        assert ("momentum 0.95 in CPU memory" in muon.summary()) is offload
        found[offload] = dict(model.named_parameters())
    assert differing(found[True], found[False]) == []


@pytest.mark.parametrize("how", ["stepped", "loaded"])
def test_momentum_is_not_lost_when_an_engine_takes_the_optimizer_over(how):
    model = layers()
    muon = Muon(model.named_parameters(), lr=0.02)
    Muon(model.named_parameters(), lr=0.02).hand_over(muon.host, muon.names)  # a new one may go
    random_gradients(model, 0)
    muon.step()
    if how == "loaded":
        saved, muon = muon.state_dict(), Muon(model.named_parameters(), lr=0.02)
        muon.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="the engine would discard its momentum"):
        muon.hand_over(muon.host, muon.names)


def test_a_checkpoint_is_not_lost_in_an_optimizer_that_waits_for_its_engine():
    muon = Muon(layers().named_parameters(), lr=0.02)
    saved = muon.state_dict()
    muon.detach()
    with pytest.raises(RuntimeError, match="load the checkpoint through the engine"):
        muon.load_state_dict(saved)


@pytest.mark.parametrize("name", COEFFICIENT_SETS)
def test_named_coefficients(name):
    model = layers()
    muon = Muon(model.named_parameters(), lr=0.01, ns_coefficients=name)
    random_gradients(model, 0)
    muon.step()
    assert name in muon.summary() or name == "simple"


def test_pypis_apex_gets_a_warning_and_the_next_choice(monkeypatch):
    import types

    from muon_plugin.core import adamw

    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    groups = [{"params": [nn.Parameter(torch.zeros(3))], "lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}]
    with pytest.warns(UserWarning, match="PyPI's apex is another project"), pytest.raises(ValueError, match="apex"):
        adamw.build(groups, "apex")
    few = {name: adamw._IMPLEMENTATIONS[name] for name in ("apex", "torch")}
    monkeypatch.setattr(adamw, "_IMPLEMENTATIONS", few)
    monkeypatch.setattr(adamw, "_is_cuda", lambda groups: True)
    with pytest.warns(UserWarning, match="PyPI's apex is another project"):
        assert adamw.build(groups, "auto")[1] == "torch"


def test_deepspeeds_adamw_is_for_flat_groups():
    """It counts steps on one tensor of a group."""
    with pytest.raises(ValueError, match="one flat tensor a group"):
        Muon(layers().named_parameters(), adamw="deepspeed")


@pytest.mark.parametrize("which", ["torch_fused", pytest.param("deepspeed", marks=pytest.mark.compiles)])
def test_another_adamw_is_a_choice_that_the_table_calls_inexact(which):
    def layers() -> nn.ModuleDict:  # one tensor in the AdamW group, as under ZeRO
        torch.manual_seed(0)
        return nn.ModuleDict({"embed": nn.Embedding(50, 32), "up": nn.Linear(32, 128, bias=False)})

    model = layers()
    muon = Muon(model.named_parameters(), adamw=which)
    assert f"({which} (not bit-exact over layouts on CPU))" in muon.summary()
    plain = layers()
    reference = Muon(plain.named_parameters())
    for step in range(3):
        for m, optimizer in ((model, muon), (plain, reference)):
            random_gradients(m, step)
            optimizer.step()
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b)
    reference.load_state_dict(copy.deepcopy(muon.state_dict()))  # and a state can go from one to the other
    plain.load_state_dict(model.state_dict())
    for m, optimizer in ((model, muon), (plain, reference)):
        random_gradients(m, 3)
        optimizer.step()
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b)


def test_the_package_imports_in_under_a_second_and_without_an_engine():
    code = (
        "import sys, time; start = time.process_time(); import muon_plugin; "
        "print(time.process_time() - start, 'deepspeed' in sys.modules, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(found[0]) < 1
    assert found[1:] == ["False", "False"]
