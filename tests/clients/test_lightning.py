"""Lightning: `muon_plugin.Muon` from `configure_optimizers`, without an engine and under its DeepSpeed strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.combinations import FULL
from tests.support.integers import differing
from tests.support.moves import Moves, check

MATRICES, REST = 14, 7

#: What a Trainer is asked for.
CASES: list[dict[str, Any]] = [
    {"manual": True, "precision": "bf16-true"},
    {"stage": 2, "precision": "bf16-true", "in_json": False},
]
if FULL:
    CASES += [
        {"accumulate": 2, "precision": "bf16-mixed"},
        {"accumulate": 2, "precision": "32-true"},
        {"stage": 1, "precision": "32-true", "in_json": True},
        {"stage": 3, "precision": "bf16-true", "in_json": True},
        {"stage": 3, "precision": "32-true", "in_json": False},
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(f"{key} {value}" for key, value in case.items()))
def test_lightning(ranks, tmp_path, case):
    whole, resumed = (ranks.clients(2, fit, tmp_path, resume, **case)[0] for resume in (False, True))
    coarse = case["precision"] == "bf16-true" and "stage" not in case  # weights near 1 have no finer steps
    names = check(whole["moves"], rounding=0.2 if coarse else 0.0)
    assert [len(names["muon"]), len(names["adamw"])] == [MATRICES, REST]
    assert all(name.startswith("model.") for name in whole["weights"])
    assert whole["losses"][-1] < whole["losses"][0] - 0.3
    assert differing(whole["weights"], resumed["weights"]) == []
    assert whole["losses"][len(whole["losses"]) // 2 :] == resumed["losses"]


def fit(
    rank: int,
    out: Path,
    resume: bool,
    manual: bool = False,
    accumulate: int = 1,
    precision: Any = "32-true",
    stage: int | None = None,
    in_json: bool = False,
) -> dict[str, Any]:
    """Two epochs of three steps, or the second one from the checkpoint of the first."""
    import lightning
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader

    import muon_plugin
    from tests.support import hugging_face as hf

    hf.start()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = hf.llama()
            self.automatic_optimization = not manual
            self.losses: list[float] = []

        def training_step(self, batch: Any, number: int) -> Any:
            loss = self.model(**batch).loss
            self.losses.append(float(loss.detach()))
            if manual:
                optimizer: Any = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, 0.5, "norm")
                optimizer.step()
                self.lr_schedulers().step()
            return loss

        def configure_optimizers(self) -> Any:
            self.muon = muon_plugin.Muon(self.named_parameters(), model=self, lr=0.01, weight_decay=0.1)
            schedule = torch.optim.lr_scheduler.LambdaLR(self.muon, lambda step: 1 - step / 8)
            return {"optimizer": self.muon, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Watch(lightning.Callback):
        moves: Moves | None = None
        stepping = False

        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            if self.moves is None:
                engine = None if stage is None else trainer.strategy.model
                self.moves = Moves.of_module(module.muon, module) if engine is None else Moves.of(engine)
            if not self.stepping:
                self.moves.before()

        def on_train_batch_end(self, trainer: Any, module: Any, output: Any, batch: Any, number: int) -> None:
            self.stepping = (number + 1) % accumulate != 0
            if self.moves is not None and not self.stepping:
                self.moves.after()

    watch, module = Watch(), Module()
    saved = ModelCheckpoint(out, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    trainer = lightning.Trainer(
        accelerator="cpu" if stage is None else on_cpu(),
        strategy="ddp" if stage is None else deepspeed(stage, in_json),
        devices=2,
        plugins=[TorchElasticEnvironment()],
        max_epochs=2,
        limit_train_batches=3 * accumulate,
        gradient_clip_val=None if manual else 0.5,
        accumulate_grad_batches=accumulate,
        precision=precision,
        callbacks=[saved] if resume else [saved, watch],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(hf.Text(), batch_size=4)
    trainer.fit(module, data, ckpt_path=f"{out}/epoch=0.ckpt" if resume else None)
    from tests.support.integers import gathered

    with gathered(module):
        found = {name: p.detach().clone() for name, p in module.named_parameters()}
    return {"losses": module.losses, "moves": watch.moves.found if watch.moves else {}, "weights": found}


def deepspeed(stage: int, in_json: bool) -> Any:
    from lightning.pytorch.strategies import DeepSpeedStrategy

    config: dict[str, Any] = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 4}
    if in_json:
        config["optimizer"] = {"type": "Muon", "params": {"lr": 0.01, "weight_decay": 0.1}}
    return DeepSpeedStrategy(config=config, process_group_backend="gloo")


def on_cpu() -> Any:
    """Lightning allows DeepSpeed on CUDA devices alone: an accelerator that says it has them, and gives CPUs."""
    from lightning.pytorch.accelerators import CUDAAccelerator

    class OnCpu(CUDAAccelerator):
        def setup_device(self, device: Any) -> None:
            pass

        def teardown(self) -> None:
            pass

        @staticmethod
        def parse_devices(devices: Any) -> Any:
            return list(range(int(devices)))

        @staticmethod
        def get_parallel_devices(devices: Any) -> list[torch.device]:
            return [torch.device("cpu", number) for number in devices]

        @staticmethod
        def is_available() -> bool:
            return True

    return OnCpu()
