"""The DeepSpeed hook: registering, refusing, the start-up table, the launchers."""

from __future__ import annotations

import copy
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import ROOT
from tests.support.combinations import FULL, some
from tests.support.integers import IntegerModel, build, config, train
from tests.support.jobs import environment, free_port
from tests.support.ranks import RankError


def test_unregister_gives_deepspeed_its_own_code_back():
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    import muon_plugin

    def hooked():
        names = ("_configure_distributed_model", "_configure_basic_optimizer", "_configure_optimizer")
        return [deepspeed.set_optimizer_flags, *(getattr(DeepSpeedEngine, name) for name in names)]

    own = hooked()
    supported = list(ZERO_SUPPORTED_OPTIMIZERS)
    muon_plugin.register()
    muon_plugin.register()
    assert all(a is not b for a, b in zip(hooked(), own))
    muon_plugin.unregister()
    muon_plugin.unregister()
    assert hooked() == own
    assert supported == ZERO_SUPPORTED_OPTIMIZERS


def test_another_release_of_deepspeed_is_told_apart(monkeypatch):
    from deepspeed.runtime.engine import DeepSpeedEngine

    import muon_plugin

    monkeypatch.setattr(DeepSpeedEngine, "_configure_basic_optimizer", lambda self, params, more: None)
    with pytest.raises(RuntimeError, match=r"DeepSpeedEngine._configure_basic_optimizer has .*'more'"):
        muon_plugin.register()


def test_without_deepspeed_register_says_what_to_install(monkeypatch):
    import muon_plugin

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(RuntimeError, match="pip install deepspeed"):
        muon_plugin.register()


TABLES = {
    "stage 1": (config(1), "round_robin_bit16_groups"),
    "stage 1, fp32 gradients": (config(1, "bf16", data_types={"grad_accum_dtype": "fp32"}), "bf16_groups"),
    "stage 3": (config(3, "bf16"), "fp16_groups"),
}


@pytest.mark.parametrize("value", [float("nan"), 0.0], ids=["NaN", "zeros"])
@pytest.mark.parametrize("case", TABLES)
def test_a_layout_that_is_not_the_engines_is_an_error_at_start_whatever_the_weights_are(ranks, case, value):
    """A release that cuts otherwise does not train; and weights may be anything before a checkpoint is loaded."""
    found = ranks(2).run(told_of_wrong_tables, *TABLES[case], value)
    assert all("is not where DeepSpeed's tables say" in told for told in found), found


def told_of_wrong_tables(rank: int, settings: dict[str, Any], table: str, value: float) -> str:
    from muon_plugin.deepspeed.shards import calls

    model = IntegerModel()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    engine = build(rank, settings, model)
    getattr(engine.optimizer, table)[0].reverse()
    try:
        calls(engine, engine.basic_optimizer.names)
    except ValueError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def test_the_builtin_muon_is_kept_out(ranks):
    """No parameter is tagged, so nothing of DeepSpeed's own Muon runs in the gradient path."""
    assert ranks(2).run(tags) == [([], "Muon")] * 2


def tags(rank: int) -> tuple[list[str], str]:
    engine = build(rank, config(2))
    tagged = [name for name, p in engine.module.named_parameters() if hasattr(p, "use_muon")]
    return tagged, type(engine.basic_optimizer).__name__


def test_an_engine_that_was_built_without_register_does_not_train_silently(ranks):
    with pytest.raises(RankError, match=r"Call muon_plugin\.register"):
        ranks(1).run(not_registered)


def not_registered(rank: int) -> None:
    import deepspeed

    import muon_plugin

    muon_plugin.unregister()
    model = IntegerModel()
    settings = config(1, zero_allow_untested_optimizer=True)
    del settings["optimizer"]
    engine, *_ = deepspeed.initialize(
        model=model, config=settings, optimizer=muon_plugin.Muon(model.named_parameters(), model=model)
    )
    train(engine, rank, 1)


def test_another_optimizer_is_left_alone(ranks):
    """And named: a client may drop its Muon without a word, as Hugging Face's Trainer does with `optimizers=(...)`."""
    (_, told), (_, silent) = found = ranks(2).run(adam)
    assert [name for name, _ in found] == ["AdamW", "AdamW"]
    assert "muon_plugin: this engine trains with AdamW and not with Muon" in told
    assert "muon_plugin" not in silent


def adam(rank: int) -> tuple[str, str]:
    settings = config(1)
    settings["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True}}
    return told_of(lambda: build(rank, settings))


def told_of(start: Callable[[], Any]) -> tuple[str, str]:
    """The class of an engine's optimizer, and what is printed at its start."""
    with redirect_stdout(StringIO()) as printed:
        engine = start()
    return type(engine.basic_optimizer).__name__, printed.getvalue()


def test_an_optimizer_that_replaces_the_jsons_muon_is_named(ranks):
    """DeepSpeed takes a client's optimizer before the JSON's, without a word."""
    (name, told), (_, silent) = ranks(2).run(client_adam)
    assert name == "AdamW"
    assert "trains with AdamW and not with Muon, which its DeepSpeed JSON names: the optimizer that" in told
    assert "muon_plugin" not in silent


def client_adam(rank: int) -> tuple[str, str]:
    import deepspeed

    import muon_plugin

    muon_plugin.register("deepspeed")
    model, settings = IntegerModel(), config(1, zero_allow_untested_optimizer=True)
    adamw = torch.optim.AdamW(model.parameters())
    return told_of(lambda: deepspeed.initialize(model=model, config=settings, optimizer=adamw)[0])


def test_the_table_says_what_will_happen(ranks):
    table = ranks(2).run(summary)[0]
    for line in (
        "Muon   7 parameters, 12 matrices, 8,025 elements",
        "qkv.weight  72x24, 3 matrices",
        "embed.weight  37x24, embedding",
        "match_rms_adamw, momentum 0.95, 5 steps (auto); muon lr 0.01 decay 0.1; adamw lr 0.01 decay 0.1",
    ):
        assert line in table
    assert re.search(r"FLOP over 2 ranks, the busiest .* \(1\.\d\d of the mean\)", table)
    assert re.search(r"exchange a step: [\d.]+ k?B sent over all ranks", table)


def summary(rank: int) -> str:
    return build(rank, config(1)).basic_optimizer.summary()


UNSUPPORTED = [
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "device with stage 2='nvme' is not"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}}, "super_off"),
    ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "grads without offload=True is not"),
    ({"zero_optimization": {"elastic_checkpoint": True}}, "elastic_checkpoint=True is not supported"),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}, "params": {"adam_lr": 0.1}},
        "adam_lr=0.1 is not supported",
    ),
    ({"zero_optimization": {"stage": 0}, "checkpoint": {"load_universal": True}}, "load_universal with zero_optimi"),
    ({"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1}}}, "cycle_momentum"),
    ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast.dtype with ZeRO='float16' is not"),
]


@pytest.mark.parametrize(("sections", "match"), UNSUPPORTED)
def test_what_is_not_supported_is_refused_before_the_first_step(ranks, sections, match):
    sections = copy.deepcopy(sections)
    stage = sections.get("zero_optimization", {}).get("stage", 1)
    apart = "autocast" if "torch_autocast" in sections else None  # which DeepSpeed keeps on for good
    with pytest.raises(RankError) as caught:
        ranks(2, apart=apart).run(build, config(stage, **sections))
    for kind, message in caught.value.errors:
        assert (kind, match in message) == ("ValueError", True), message


ZERO = SimpleNamespace(stage=3, offload_optimizer=None, offload_param=None, elastic_checkpoint=False, zenflow=None)
REFUSED = {
    "deepspeed.moe": {"has_moe_layers": True},
    "AutoEP": {
        "_config": SimpleNamespace(zero_config=ZERO, expert_parallel_config=SimpleNamespace(enabled=True)),
        "autotp_size": lambda: 2,
    },
}


@pytest.mark.parametrize("setting", REFUSED)
def test_every_mode_that_is_not_supported_is_named(setting):
    from muon_plugin.deepspeed.refusals import check_supported

    off = ("torch_autocast_enabled", "bf16_optimizer_states", "scheduler_name")
    off += ("bf16_master_weights_and_gradients", "fp16_master_weights_and_gradients")
    engine = SimpleNamespace(
        _config=SimpleNamespace(zero_config=ZERO),
        has_moe_layers=False,
        **{name: lambda: False for name in off},
        **{name: lambda: None for name in ("optimizer_params", "scheduler_params", "load_universal_checkpoint")},
    )
    check_supported(engine)
    for name, value in REFUSED[setting].items():
        setattr(engine, name, value)
    with pytest.raises(ValueError, match=setting):
        check_supported(engine)


def test_bad_configs_end_in_one_error_on_every_rank(ranks):
    """Bad settings, some on one rank only, and impossible combinations: a ValueError on both ranks each."""
    draw = random.Random(0)
    values = ["x", -1, None, [], {}, float("nan"), float("inf"), True, 2**70, [1], "auto"]
    keys = ["lr", "weight_decay", "momentum", "ns_steps", "ns_coefficients", "ns_method", "adjust_lr_fn", "betas"]
    keys += ["eps", "ns_dtype", "exclude", "split", "adamw", "per_head_muon", "torch_adam", "Lr", "muon_momentum"]
    allowed = {
        *((setting, "auto") for setting in ("ns_method", "ns_dtype", "adamw")),
        ("exclude", "[]"),
        ("split", "{}"),
        ("weight_decay", str(2**70)),
        ("lr", str(2**70)),
        ("eps", str(2**70)),
    }
    for _ in range(240 if FULL else 60):
        if draw.random() < 0.2:
            sections, match = draw.choice(UNSUPPORTED)
            test_what_is_not_supported_is_refused_before_the_first_step(ranks, sections, match)
            continue
        key, value, who = draw.choice(keys), draw.choice(values), draw.choice([(0, 1), (0,), (1,)])
        if (key, str(value)) in allowed:
            continue
        with pytest.raises(RankError) as caught:
            ranks(2).run(bad_config, key, value, who)
        for error in caught.value.errors:
            assert error is not None, (key, value, who)
            assert error[0] == "ValueError", (key, value, who, error)
            assert key in error[1], (key, value, who, error)


def bad_config(rank: int, key: str, value: Any, who: tuple[int, ...]) -> None:
    build(rank, config(1, params={key: value} if rank in who else {}), nn.Sequential(nn.Linear(8, 8)))


def test_ranks_with_different_models_are_told_so_at_start(ranks):
    """DeepSpeed would broadcast one model over another of other shapes."""
    with pytest.raises(RankError) as caught:
        ranks(2).run(different_models)
    for kind, message in caught.value.errors:
        assert kind == "ValueError"
        assert "rank 0 has 0.weight [8, 8] torch.float32, rank 1 has 0.weight [9, 8] torch.float32" in message


def different_models(rank: int) -> None:
    build(rank, config(1), nn.Sequential(nn.Linear(8, 8 + rank)))


def test_named_parameters_are_taken_too(ranks):
    assert ranks(1).run(named) == [12]


def named(rank: int) -> int:
    model = IntegerModel()
    engine = build(rank, config(1), model, model_parameters=list(model.named_parameters()))
    train(engine, rank, 1)
    return len(engine.basic_optimizer.routing.matrices)


def test_a_parameter_that_is_not_the_models_is_refused(ranks):
    with pytest.raises(RankError, match="does not have; allowed: parameters of that model"):
        ranks(1).run(stranger)


def stranger(rank: int) -> None:
    build(rank, config(1), model_parameters=[*IntegerModel().parameters(), nn.Parameter(torch.zeros(3, 3))])


SCRIPT = """
import sys, time
import deepspeed, torch
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at start otherwise, for inference alone
model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
engine, *_ = deepspeed.initialize(model=model, config=sys.argv[1])
for _ in range(2):
    engine.backward(engine(torch.randn(4, 16)).square().mean())
    engine.step()
# One write: the ranks share a pipe.
sys.stdout.write(f"ended {type(engine.basic_optimizer).__module__} {sys.argv[-1]}\\n")
# torch's gloo threads abort a Python that ends within milliseconds of a collective, with any optimizer: they free the
# collective's tensors, for which they need the interpreter.
time.sleep(1)
"""


@pytest.mark.parametrize(
    "launch",
    some(
        [
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "PORT",
             "-m", "muon_plugin"],
            [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", "PORT",
             "--module", "muon_plugin"],
        ],
        1,
    ),
    ids=lambda words: "torchrun" if "torch.distributed.run" in words else "deepspeed",
)  # fmt: skip
def test_a_launcher_needs_no_change_of_code(tmp_path, launch):
    script, settings = tmp_path / "train.py", tmp_path / "ds.json"
    script.write_text(SCRIPT)
    settings.write_text(json.dumps(config(1)))
    port = str(free_port())
    command = [port if word == "PORT" else word for word in launch]
    command += [str(script), str(settings), "last"]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    output = found.stdout + found.stderr
    assert found.returncode == 0, output
    assert output.count("ended muon_plugin.core.muon") == 2
    assert output.count("muon_plugin ---") == 1


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "usage: python -m muon_plugin SCRIPT"),
        (["nothing.py"], "script 'nothing.py' does not exist"),
        (["--fast", "x.py"], "'--fast' is not a script or a module"),
        (["-m"], "usage:"),
    ],
)
def test_the_command_says_what_it_wants(arguments, match):
    command = [sys.executable, "-m", "muon_plugin", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert found.returncode == 1
    assert match in found.stderr
