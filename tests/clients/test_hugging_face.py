"""Hugging Face's Trainer and accelerate, as their users configure them. `deepspeed/test_clients.py` launches them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.combinations import FULL
from tests.support.integers import differing, weights
from tests.support.moves import Moves, check

MATRICES, REST = 14, 7

#: name -> stage, the optimizer in the JSON or the script, TrainingArguments
TRAINERS: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "many settings": (
        2,
        True,
        {
            "optim": "adafactor",  # the JSON decides
            "bf16": True,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
            "lr_scheduler_type": "cosine",
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "torch_compile": True,
            "torch_compile_backend": "eager",
        },
    ),
}
if FULL:
    TRAINERS |= {
        "optimizer of the script": (1, False, {}),
        "many settings, stage 3": (3, *TRAINERS["many settings"][1:]),
        "optimizer of the script, stage 3": (3, False, {"lr_scheduler_type": "cosine", "bf16": True}),
        "stage 0": (0, True, {}),
        "clipping off": (1, True, {"max_grad_norm": 0.0, "optim": "adamw_torch_fused"}),
    }


@pytest.mark.parametrize("case", TRAINERS)
def test_trainer(ranks, tmp_path, case):
    whole, resumed = (ranks.clients(2, trainer, tmp_path, case, resume)[0] for resume in (False, True))
    names = check(whole["moves"])
    frozen = ["model.embed_tokens.weight"] if "settings" in case else []
    assert names["frozen"] == frozen
    assert [len(names["muon"]), len(names["adamw"])] == [MATRICES, REST - len(frozen)]
    assert whole["printed"].count("muon_plugin ---") == 1
    assert whole["losses"][-1] < whole["losses"][0] - 0.3
    assert differing(whole["weights"], resumed["weights"]) == []
    assert whole["losses"] == resumed["losses"]
    assert whole["groups"] == resumed["groups"]


def factory() -> Any:
    """The Trainer calls a class with groups without names, anything else with the model."""
    import muon_plugin

    return lambda model, **settings: muon_plugin.Muon(model.named_parameters(), model=model, **settings)


def trainer(rank: int, out: Path, case: str, resume: bool) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

    from tests.support import hugging_face as hf

    hf.start()
    stage, in_json, more = TRAINERS[case]
    arguments = TrainingArguments(**hf.arguments(out, hf.settings(stage, optimizer=in_json), **more))
    model = hf.llama()
    if "settings" in case:
        model.get_input_embeddings().requires_grad_(False)
    own = {} if in_json else {"optimizer_cls_and_kwargs": (factory, {"lr": 0.01, "weight_decay": 0.1})}
    return hf.train(Trainer(model, arguments, train_dataset=hf.Text(), eval_dataset=hf.Text(), **own), resume)


def test_trainer_without_an_engine(ranks, tmp_path):
    whole, resumed = (ranks.clients(2, plain, tmp_path, resume)[0] for resume in (False, True))
    names = check(whole["moves"])
    assert [len(names["muon"]), len(names["adamw"])] == [MATRICES, REST]
    assert whole["losses"][-1] < whole["losses"][0] - 0.3
    assert differing(whole["weights"], resumed["weights"]) == []


def plain(rank: int, out: Path, resume: bool) -> dict[str, Any]:
    from torch.nn.parallel import DistributedDataParallel
    from transformers import Trainer, TrainingArguments

    from tests.support import hugging_face as hf

    class Watch(hf.Watch):
        def on_step_begin(self, *_: Any, **kwargs: Any) -> None:
            self.moves = self.moves or Moves.of_module(client.optimizer.optimizer, client.model)
            self.moves.before()

    arguments = TrainingArguments(**hf.arguments(out, None, ddp_backend="gloo"))
    own = (factory, {"lr": 0.01, "weight_decay": 0.1})
    client = Trainer(hf.llama(), arguments, train_dataset=hf.Text(), optimizer_cls_and_kwargs=own)
    watch = Watch()
    if not resume:
        client.add_callback(watch)
    client.train(resume_from_checkpoint=f"{out}/checkpoint-{hf.SAVED}" if resume else None)
    assert isinstance(client.model_wrapped, DistributedDataParallel)
    return {
        "losses": [entry["loss"] for entry in client.state.log_history if "loss" in entry],
        "moves": watch.moves.found if watch.moves else {},
        "weights": {name: p.detach().clone() for name, p in client.model.named_parameters()},
    }


@pytest.mark.parametrize(("stages", "worlds"), [((1, 3), (2, 1)), ((3, 2), (1, 2))][: 2 if FULL else 1])
def test_trainer_resumes_at_another_world_size(ranks, tmp_path, stages, worlds):
    """From a universal checkpoint, with the same batch: gradients are summed in another order, so not to the bit."""
    whole = ranks.clients(worlds[0], elsewhere, tmp_path, stages[0], None)[0]
    resumed = ranks.clients(worlds[1], elsewhere, tmp_path, stages[1], tmp_path / "checkpoint-2" / "global_step2")[0]
    assert whole["losses"] == pytest.approx(resumed["losses"], rel=1e-4)
    for name in whole["weights"].keys() & resumed["weights"].keys():
        a, b = whole["weights"][name].float(), resumed["weights"][name].float()
        assert (a - b).norm() < 2**-9 * a.norm(), name  # a bit of the bf16 in which Newton-Schulz multiplies


def elsewhere(rank: int, out: Path, stage: int, checkpoint: Path | None) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

    from tests.support import hugging_face as hf

    hf.start()
    settings = hf.settings(stage)
    if checkpoint is not None:
        settings["checkpoint"] = {"load_universal": True}
        if rank == 0:
            convert(checkpoint)
        torch.distributed.barrier()
    batch = 8 // torch.distributed.get_world_size()
    arguments = TrainingArguments(**hf.arguments(out, settings, per_device_train_batch_size=batch))
    model = hf.llama(seed=0 if checkpoint is None else 1)
    return hf.train(Trainer(model, arguments, train_dataset=hf.Text()), resume=checkpoint is not None)


def convert(checkpoint: Path) -> None:
    from muon_plugin.deepspeed import convert

    with pytest.MonkeyPatch.context() as patch:
        folders = ["--input_folder", str(checkpoint), "--output_folder", f"{checkpoint}_universal"]
        patch.setattr("sys.argv", ["convert", *folders, "--num_extract_workers", "1", "--num_merge_workers", "1"])
        convert.main()


def test_a_muon_that_the_trainer_drops_is_named(ranks, tmp_path):
    """Under DeepSpeed it ignores `optimizers`, and trains with AdamW."""
    printed = ranks.clients(1, dropped, tmp_path)[0]
    assert "muon_plugin: this engine trains with AdamW and not with Muon" in printed


def dropped(rank: int, out: Path) -> str:
    from contextlib import redirect_stdout
    from io import StringIO

    from transformers import Trainer, TrainingArguments

    from tests.support import hugging_face as hf

    hf.start()
    arguments = TrainingArguments(**hf.arguments(out, hf.settings(1, optimizer=False), max_steps=1, save_strategy="no"))
    model = hf.llama()
    client = Trainer(model, arguments, train_dataset=hf.Text(), optimizers=(factory()(model), None))
    with redirect_stdout(StringIO()) as printed:
        client.train()
    return printed.getvalue()


ACCELERATE = [(2, "bf16")] + ([(0, "no"), (1, "no"), (3, "bf16")] if FULL else [])


@pytest.mark.parametrize(("stage", "dtype"), ACCELERATE)
def test_accelerate_takes_an_optimizer_of_the_script(ranks, tmp_path, stage, dtype):
    whole, resumed = (ranks.clients(2, accelerate, tmp_path, stage, dtype, resume)[0] for resume in (False, True))
    names = check(whole["moves"])
    assert [len(names["muon"]), len(names["adamw"])] == [MATRICES, REST]
    assert whole["decays"] == [(True, 0, 0.1), (False, 0, 0.1), (False, 1, 0.0)]
    assert whole["losses"][-1] < whole["losses"][0] - 0.3
    assert differing(whole["weights"], resumed["weights"]) == []
    assert whole["losses"][-len(resumed["losses"]) :] == resumed["losses"]


def accelerate(rank: int, out: Path, stage: int, dtype: str, resume: bool) -> dict[str, Any]:
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DeepSpeedPlugin
    from torch.optim.lr_scheduler import LambdaLR
    from torch.utils.data import DataLoader

    import muon_plugin
    from tests.support import hugging_face as hf

    hf.start()
    PartialState(cpu=True)
    plugin = DeepSpeedPlugin(hf_ds_config=hf.settings(stage, optimizer=False))
    client = Accelerator(deepspeed_plugin=plugin, mixed_precision=dtype, gradient_accumulation_steps=2)
    model: Any = hf.llama()
    norms = [(name, p) for name, p in model.named_parameters() if "norm" in name]
    rest = [(name, p) for name, p in model.named_parameters() if "norm" not in name]
    groups = [{"params": rest}, {"params": norms, "weight_decay": 0.0}]
    optimizer: Any = muon_plugin.Muon(groups, model=model, lr=0.01, weight_decay=0.1)
    schedule: Any = LambdaLR(optimizer, lambda step: 1 - step / 40)
    data: Any = DataLoader(hf.Text(), batch_size=4)
    model, optimizer, schedule, data = client.prepare(model, optimizer, schedule, data)
    if resume:
        client.load_state(f"{out}/state")
    losses, moves = [], Moves.of(model)
    for epoch in range(int(resume), 2):  # of two steps each
        for number, batch in enumerate(data):
            moves.before()
            with client.accumulate(model):
                loss = model(**batch).loss
                client.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if number % 2:
                moves.after()
        if epoch == 0:
            client.save_state(f"{out}/state")
    groups = [(g["use_muon"], g["client_group"], g["weight_decay"]) for g in model.basic_optimizer.param_groups]
    return {"losses": losses, "moves": moves.found, "weights": weights(model), "decays": groups}
