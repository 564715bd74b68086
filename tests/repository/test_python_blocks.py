"""Every Python block of the documentation runs, in a process of its own, and what it makes trains.

A stand-in is a generator: it yields the names that the page supposes (a tiny model, a dataset, ``ds.json`` in the
working directory), is sent the names as the block leaves them, and checks those. A block without one fails.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import types
from collections.abc import Callable, Generator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.blocks import Block, blocks
from tests.support.ranks import Ranks
from tests.support.torch_releases import needs_muon

Names = dict[str, Any]
StandIn = Callable[[], Generator[Names, Names, None]]
TAG = "global_step1000"


# Without an engine.


def alone() -> Generator[Names, Names, None]:
    import muon_plugin

    model = llama()
    names = yield {"muon_plugin": muon_plugin, "model": model, "lr": 0.01, "wd": 0.1}
    trains(names["optimizer"], model)


def a_new_head() -> Generator[Names, Names, None]:
    import muon_plugin

    model = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in ("up", "head")})
    given = [(name, p) for name, p in model.named_parameters() if "head" not in name]
    names = yield {"optimizer": muon_plugin.Muon(given, model=model), "model": model}
    assert any(p is model["head"].weight for group in names["optimizer"].param_groups for p in group["params"])


def torchs_own() -> Generator[Names, Names, None]:
    names = yield {"torch": torch, "model": llama()}
    assert len(names["hidden"]) == 14
    assert len(names["rest"]) == 7


def later_adapters() -> Generator[Names, Names, None]:
    import muon_plugin

    model = llama()
    names = yield {"model": model, "optimizer": muon_plugin.Muon(model.named_parameters(), model=model)}
    assert len(names["new"]) == 28
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(**batch()).loss.backward()
    names["optimizer"].step()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert moved == [name for name, _ in names["new"]]  # the rest is frozen; lora_A, without a gradient yet, decays


def watched() -> Generator[Names, Names, None]:
    names = yield {"model": llama(), "batch": torch.arange(16)[None]}
    assert sorted(names["logits"]) == [0, 1]
    assert math.isfinite(names["logits"][0].max)


def router_biases() -> Generator[Names, Names, None]:
    gate = types.SimpleNamespace(e_score_correction_bias=torch.zeros(4), tokens=torch.tensor([5.0, 1.0, 1.0, 1.0]))
    yield {"engine": types.SimpleNamespace(step=lambda: None), "gates": [gate], "torch": torch}
    assert gate.e_score_correction_bias.tolist() == pytest.approx([-1.5e-3, 5e-4, 5e-4, 5e-4])
    assert gate.tokens.tolist() == [0.0] * 4


# DeepSpeed.


def registered() -> Generator[Names, Names, None]:
    yield {}
    from deepspeed.runtime.engine import DeepSpeedEngine

    assert DeepSpeedEngine._configure_basic_optimizer.__module__.startswith("deepspeed")
    assert hasattr(DeepSpeedEngine._configure_basic_optimizer, "__wrapped__")


def engine_of_the_json() -> Generator[Names, Names, None]:
    import deepspeed

    write(optimizer=True)
    names = yield {"deepspeed": deepspeed, "model": llama()}
    engine_trains(names["engine"])


def engine_of_the_script() -> Generator[Names, Names, None]:
    import deepspeed

    write(optimizer=False)
    names = yield {"deepspeed": deepspeed, "model": llama()}
    assert sorted({group["weight_decay"] for group in names["optimizer"].param_groups}) == [0.0, 0.1]
    engine_trains(names["engine"])


def two_rates() -> Generator[Names, Names, None]:
    import deepspeed

    import muon_plugin

    muon_plugin.register()
    write(optimizer=True)
    given = {"rate_of_matrices": 0.02, "rate_of_the_rest": 0.005}
    names = yield {"deepspeed": deepspeed, "model": llama(), **given}
    assert [(g["use_muon"], g["lr"]) for g in names["engine"].basic_optimizer.param_groups] == [
        (True, 0.02),
        (False, 0.005),
    ]
    engine_trains(names["engine"])


def experts() -> Generator[Names, Names, None]:
    from deepspeed.moe.utils import is_moe_param

    import muon_plugin
    from tests.support.integers import build, config
    from tests.support.parallel_models import Experts

    model = Experts(1)
    named = list(model.named_parameters())
    given = {"dense": [n for n in named if not is_moe_param(n[1])], "experts": [n for n in named if is_moe_param(n[1])]}
    names = yield {"muon_plugin": muon_plugin, "model": model, **given}
    assert any(group.get("moe") for group in names["muon"].param_groups)
    with pytest.raises(Exception, match="ep_size_8"):  # the group's name is that of 8 ranks, and here is one
        build(0, {k: v for k, v in config(1).items() if k != "optimizer"}, model, optimizer=names["muon"])


def saved(convert: bool = False, **more: Any) -> Any:
    """A new engine, and a checkpoint of another after a step."""
    import deepspeed

    import muon_plugin

    muon_plugin.register()
    write(optimizer=True, **more)
    engine, *_ = deepspeed.initialize(model=llama(), config="ds.json")
    step(engine)
    engine.save_checkpoint("checkpoints", tag=TAG)
    engine.destroy()
    if convert:
        from muon_plugin.deepspeed import convert as command

        workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        folder = f"checkpoints/{TAG}"
        sys.argv = ["convert", "--input_folder", folder, "--output_folder", f"{folder}_universal", *workers]
        command.main()
    return deepspeed


def checkpoint() -> Generator[Names, Names, None]:
    deepspeed = saved()
    engine, *_ = deepspeed.initialize(model=llama(seed=1), config="ds.json")
    yield {"engine": engine}
    holds_what_was_saved(engine)
    engine_trains(engine)


def checkpoint_before_the_engine() -> Generator[Names, Names, None]:
    deepspeed = saved()
    names = yield {"deepspeed": deepspeed, "model": llama(seed=1)}
    holds_what_was_saved(names["engine"])
    engine_trains(names["engine"])


def requeued() -> Generator[Names, Names, None]:
    deepspeed = saved(convert=True)
    config = json.loads(Path("ds.json").read_text())
    names = yield {"deepspeed": deepspeed, "model": llama(seed=1), "config": config, "Path": Path}
    assert not names["resumed"]
    holds_what_was_saved(names["engine"])
    engine_trains(names["engine"])


def adapters_in_an_engine() -> Generator[Names, Names, None]:
    import deepspeed
    import peft

    import muon_plugin

    muon_plugin.register()
    write(optimizer=True)
    given = {"get_peft_model": peft.get_peft_model, "LoraConfig": peft.LoraConfig}
    names = yield {"deepspeed": deepspeed, "model": llama(), **given}
    assert "28 parameters, 28 matrices" in names["engine"].basic_optimizer.summary()
    step(names["engine"])


# Hugging Face's libraries, and Lightning.


def trainer_of_the_json() -> Generator[Names, Names, None]:
    on_the_cpu()
    names = yield {"model": llama(), "dataset": texts()}
    of_client(names["trainer"], 14)


def trainer_of_the_script() -> Generator[Names, Names, None]:
    from transformers import Trainer, TrainingArguments

    import muon_plugin

    given = {"model": llama(), "dataset": texts(), "Trainer": Trainer, "muon_plugin": muon_plugin}
    names = yield {**given, "arguments": TrainingArguments("out", use_cpu=True)}
    names["trainer"].train()
    assert type(names["trainer"].optimizer.optimizer).__name__ == "Muon"


def adapters_in_a_trainer() -> Generator[Names, Names, None]:
    from transformers import Trainer, TrainingArguments

    import muon_plugin

    on_the_cpu()
    given = {"model": llama(), "dataset": texts(), "Trainer": Trainer, "muon_plugin": muon_plugin}
    names = yield {**given, "arguments": TrainingArguments("out", use_cpu=True, deepspeed="ds.json")}
    names["trainer"].train()
    of_client(names["trainer"], 28)


def accelerate(optimizer: bool) -> Generator[Names, Names, None]:
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DeepSpeedPlugin
    from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

    import muon_plugin

    on_the_cpu(optimizer)
    PartialState(cpu=True)
    model = llama()
    given: Names = {"model": model, "muon_plugin": muon_plugin}
    given["data"] = torch.utils.data.DataLoader(texts(), batch_size=4)
    if optimizer:
        norms = [p for name, p in model.named_parameters() if "norm" in name]
        rest = [p for name, p in model.named_parameters() if "norm" not in name]
        given |= {"rest": rest, "norms": norms, "cosine": lambda of: CosineAnnealingLR(of, 8)}
    else:
        given |= {"Accelerator": Accelerator, "DeepSpeedPlugin": DeepSpeedPlugin, "LambdaLR": LambdaLR, "steps": 8}
    names = yield given
    for batch in names["data"]:
        names["accelerator"].backward(names["model"](**batch).loss)
        names["optimizer"].step()
        names["schedule"].step()
        names["optimizer"].zero_grad()
    groups = names["model"].basic_optimizer.param_groups
    assert {(group["use_muon"], group["weight_decay"]) for group in groups} >= {(True, 0.1), (False, 0.0)}


def accelerate_with_the_json() -> Generator[Names, Names, None]:
    return accelerate(optimizer=True)


def accelerate_with_the_script() -> Generator[Names, Names, None]:
    return accelerate(optimizer=False)


def trl(kind: str, rows: list[dict[str, Any]]) -> Generator[Names, Names, None]:
    import trl as library
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    import muon_plugin
    from tests.support import hugging_face as hf

    on_the_cpu()
    llama().save_pretrained("model")  # GRPO's reference model is read from where the model is
    model, reference = (AutoModelForCausalLM.from_pretrained("model") for _ in range(2))
    given = {"model": model, "reference": reference, "reward": words, "rate": 0.01, "muon_plugin": muon_plugin}
    given |= {f"{kind}{name}": getattr(library, f"{kind}{name}") for name in ("Config", "Trainer")}
    names = yield {**given, "data": Dataset.from_list(rows), "tokenizer": hf.tokenizer()}
    names["trainer"].args.num_train_epochs = 1
    names["trainer"].train()
    of_client(names["trainer"], 14)


def sft() -> Generator[Names, Names, None]:
    return trl("SFT", [{"input_ids": row} for row in token_ids()])


def dpo() -> Generator[Names, Names, None]:
    from tests.support.hugging_face import words as text

    row = [{"prompt": text(r[:4]), "chosen": f" {text(r[4:8])}", "rejected": f" {text(r[8:])}"} for r in token_ids()]
    return trl("DPO", row)


def grpo() -> Generator[Names, Names, None]:
    from tests.support.hugging_face import words as text

    return trl("GRPO", [{"prompt": text(row[:4])} for row in token_ids()[:2]])


def words(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def lightning_module() -> Generator[Names, Names, None]:
    import lightning

    import muon_plugin

    names = yield {"lightning": lightning, "muon_plugin": muon_plugin, "torch": torch, "steps": 8}

    class Whole(names["Module"]):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def training_step(self, batch: Any, number: int) -> Any:
            return self.model(**batch).loss

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(accelerator="cpu", max_steps=2, **quiet)
    trainer.fit(Whole(), torch.utils.data.DataLoader(texts(), batch_size=4))
    assert type(trainer.optimizers[0]).__name__ == "Muon"
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(4.2e-4 * 6 / 8)


def lightning_ddp() -> Generator[Names, Names, None]:
    """The Trainer is built; that it trains, clients/test_lightning.py shows, on two ranks."""
    import lightning

    names = yield {"lightning": lightning}
    assert names["trainer"].accumulate_grad_batches == 2


def lightning_deepspeed() -> Generator[Names, Names, None]:
    """The same: Lightning allows a fit with this strategy on CUDA devices only."""
    import lightning
    from lightning.pytorch.strategies import DeepSpeedStrategy

    import muon_plugin

    given = {"lightning": lightning, "muon_plugin": muon_plugin, "DeepSpeedStrategy": DeepSpeedStrategy}
    names = yield given
    assert names["trainer"].strategy is names["strategy"]
    assert names["strategy"].config["zero_optimization"] == {"stage": 2}


# Megatron-Core.


def megatron() -> Generator[Names, Names, None]:
    from tests.support import megatron_model

    chunks, layout = megatron_chunks("dense")
    with redirect_stdout(io.StringIO()) as printed:
        names = yield {"model_chunks": chunks}
    assert "as in the paper" in printed.getvalue()
    megatron_model.step(chunks, names["optimizer"], layout, 0)


def megatron_overrides() -> Generator[Names, Names, None]:
    from megatron.core.optimizer import OptimizerConfig

    import muon_plugin
    from tests.support import megatron_model

    muon_plugin.register("megatron")
    chunks, layout = megatron_chunks("moe")
    config = OptimizerConfig(optimizer="muon", use_distributed_optimizer=True, bf16=True, lr=0.01, weight_decay=0.1)
    config.muon_paper = True
    with redirect_stdout(io.StringIO()) as printed:
        names = yield {"model_chunks": chunks, "config": config}
    matrices, _, rest = printed.getvalue().partition("\n  AdamW")
    assert "router.weight" in rest
    assert "router.weight" not in matrices
    megatron_model.step(chunks, names["optimizer"], layout, 0)


# What they share.


def llama(seed: int = 0) -> Any:
    from tests.support.hugging_face import llama

    return llama(seed)


def token_ids() -> list[list[int]]:
    from tests.support.hugging_face import texts

    return texts(rows=8, length=12)


def texts() -> Any:
    from tests.support.hugging_face import Text

    return torch.utils.data.Subset(Text(), range(8))


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(12)[None] % 50 + 4
    return {"input_ids": ids, "labels": ids}


def trains(optimizer: Any, model: Any) -> None:
    """It is Muon, with the matrices of the model, and a step moves every parameter."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert "14 parameters, 14 matrices" in optimizer.summary()
    model(**batch()).loss.backward()
    optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def write(optimizer: bool, **more: Any) -> None:
    """ds.json: ZeRO-2 in fp32."""
    from tests.support.integers import config

    settings = config(2, **more)
    if not optimizer:
        del settings["optimizer"]
    Path("ds.json").write_text(json.dumps(settings))


def on_the_cpu(optimizer: bool = True) -> None:
    """ds.json full of "auto", and a process in which transformers takes this CPU for a device with bf16."""
    import deepspeed
    import transformers.training_args

    from tests.support.hugging_face import settings

    Path("ds.json").write_text(json.dumps(settings(2, optimizer)))
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    deepspeed.init_distributed("gloo")  # which accelerate asks DeepSpeed for on GPUs alone


def step(engine: Any) -> None:
    engine.backward(engine(**batch()).loss)
    engine.step()


def engine_trains(engine: Any) -> None:
    from tests.support.integers import weights

    before = weights(engine)
    assert "14 parameters, 14 matrices" in engine.basic_optimizer.summary()
    step(engine)
    assert [name for name, value in weights(engine).items() if torch.equal(value, before[name])] == []


def holds_what_was_saved(engine: Any) -> None:
    found = torch.load(f"checkpoints/{TAG}/mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert all(torch.equal(p, found[name]) for name, p in engine.module.named_parameters())


def of_client(trainer: Any, matrices: int) -> None:
    """The client's engine trains with Muon, and has stepped."""
    engine = trainer.model_wrapped
    assert f"{matrices} parameters, {matrices} matrices" in engine.basic_optimizer.summary()
    assert engine.global_steps > 0


def megatron_chunks(model: str) -> tuple[Any, Any]:
    from tests.support import megatron_model

    layout = megatron_model.Layout(model)
    return megatron_model.build(layout), layout


#: For each page, the stand-ins of its blocks in their order.
PYTHON: dict[str, list[StandIn]] = {
    "README.md": [alone],
    "docs/alone.md": [alone, a_new_head],
    "docs/checkpoints.md": [checkpoint, requeued, checkpoint, checkpoint_before_the_engine],
    "docs/clients.md": [
        registered,
        trainer_of_the_json,
        trainer_of_the_script,
        accelerate_with_the_json,
        accelerate_with_the_script,
        sft,
        dpo,
        grpo,
        adapters_in_a_trainer,
        lightning_module,
        lightning_ddp,
        lightning_deepspeed,
    ],
    "docs/deepspeed.md": [engine_of_the_json, engine_of_the_script],
    "docs/fine-tuning.md": [adapters_in_an_engine, later_adapters],
    "docs/getting-started.md": [alone],
    "docs/megatron.md": [megatron, megatron_overrides],
    "docs/migration.md": [torchs_own, alone, alone, alone],
    "docs/moe.md": [experts, router_biases],
    "docs/troubleshooting.md": [two_rates],
    "docs/watching.md": [watched],
}


def test_every_block_has_a_stand_in():
    found: dict[str, list[str]] = {}
    for block in blocks("python"):
        found.setdefault(block.page, []).append(str(block))
    wrong = {page: at for page, at in found.items() if len(at) != len(PYTHON.get(page, ()))}
    assert not wrong, f"their blocks and the stand-ins of PYTHON do not match: {wrong}"
    assert set(found) == set(PYTHON)


def cases() -> list[Any]:
    counts = dict.fromkeys(PYTHON, 0)
    found = []
    for block in blocks("python"):
        number = counts.setdefault(block.page, 0)
        counts[block.page] += 1
        if number < len(PYTHON.get(block.page, ())):
            stand_in = PYTHON[block.page][number]
            marks = [needs_muon] if stand_in is torchs_own else []
            name = f"{block.page}-{number + 1}-{stand_in.__name__}"
            found.append(pytest.param(block, number, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("block", "number"), cases())
def test_it_runs(tmp_path, block, number):
    # One server of processes for all that is not Megatron's: what takes time is what it imports.
    of_megatron = block.page == "docs/megatron.md"
    processes = Ranks(1, megatron="0.19.2" if of_megatron else None, clients=not of_megatron)
    try:
        processes.run(execute, block, number, tmp_path)
    finally:
        processes.close()


def execute(rank: int, block: Block, number: int, folder: Path) -> None:
    """Runs the block as a module of its own, in `folder`."""
    os.chdir(folder)
    stand_in = PYTHON[block.page][number]()
    script = types.ModuleType("script")
    sys.modules["script"] = script  # hooks replace functions of engines in the modules that have imported them
    script.__dict__.update(next(stand_in))
    code = compile(block.text, str(block), "exec")
    try:
        exec(code, script.__dict__)
    except Exception as error:
        with suppress(StopIteration):
            stand_in.throw(error)
        return
    with suppress(StopIteration):
        stand_in.send(script.__dict__)
        raise AssertionError("a stand-in yields once")
