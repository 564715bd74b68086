"""Checkpoints that another stage, dtype or number of ranks has saved: an error that says how to load them.

DeepSpeed's files are read by the layout that saved them. Any other looks for files that are not there, or for keys that
they do not have, with any optimizer, and says so in its own terms: FileNotFoundError, KeyError, AssertionError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import FP32_GROUPS

from .convert import load, model_files
from .host import BEFORE, WEIGHTS_ONLY, is_converted, swaps

#: The folder of a universal checkpoint that has the parameters by name.
BY_NAME = "zero"


@dataclass(frozen=True)
class Layout:
    """What decides which files a run reads, and which keys it looks for in them.

    Attributes:
        stage: of ZeRO.
        dtype: of the parameters, as far as the files tell it.
        ranks: over how many of them ZeRO cuts (data and sequence parallel).
    """

    stage: int
    dtype: str
    ranks: int

    @staticmethod
    def of(engine: Any) -> Layout:
        stage = int(engine.zero_optimization_stage())
        with_masters = engine.get_data_types()[0] != torch.float32
        return Layout(stage, _dtype(stage, bool(engine.bfloat16_enabled()), with_masters), engine.seq_dp_world_size)

    @staticmethod
    def saved(folder: Path) -> Layout | None:
        """Of the run that saved a checkpoint; None where there is none that is known."""
        models = model_files(folder)
        cut = sorted(folder.glob("*zero_pp_rank_*_optim_states.pt"))
        saved = load(models[0]) if models else None
        if not isinstance(saved, Mapping) or "dp_world_size" not in saved:
            return None
        if models[0].name.startswith("zero_pp_rank_"):
            stage = 3
        elif cut:
            config = saved.get("ds_config")
            zero = config.get("zero_optimization", {}) if isinstance(config, Mapping) else {}
            stage = 2 if zero.get("stage") == 2 else 1
        else:
            stage = 0
        in_bf16 = bool(cut) and cut[0].name.startswith("bf16_")
        with_masters = FP32_GROUPS in (saved.get("optimizer") or {})
        return Layout(stage, _dtype(stage, in_bf16, with_masters), int(saved["dp_world_size"]))

    def reads(self, saved: Layout) -> bool:
        """Whether a run of this layout reads the files of another. Stages 1 and 2 read each other's."""
        if (self._kind, self.dtype) != (saved._kind, saved.dtype):
            return False
        return self.stage == 0 or self.ranks == saved.ranks

    def reads_weights(self, saved: Layout) -> bool:
        """Whether it reads the weights alone: ZeRO-3 saves the model in parts, and hangs with more ranks."""
        return (self.stage == 3) == (saved.stage == 3) and (self.stage < 3 or self.ranks == saved.ranks)

    @property
    def _kind(self) -> int:
        return 1 if self.stage == 2 else self.stage

    def __str__(self) -> str:
        return f"ZeRO stage {self.stage} in {self.dtype}" + (f" over {self.ranks} ranks" if self.stage else "")


def _dtype(stage: int, in_bf16: bool, with_masters: bool) -> str:
    if stage:
        return "bf16" if in_bf16 else "fp32 or fp16"  # by the names of ZeRO's files
    return "bf16 or fp16" if with_masters else "fp32"


def check_layout(engine: Any, load_dir: str, tag: str | None, weights_only: bool) -> None:
    """Refuses to load what this run's layout cannot read.

    Raises:
        ValueError: with both layouts and what to do.
    """
    folder = folder_of(engine, load_dir, tag)
    if folder is None:
        return
    universal = bool(engine.load_universal_checkpoint())
    if (folder / BY_NAME).is_dir():
        if not universal:
            raise ValueError(
                f"{folder} is a universal checkpoint, and this run reads DeepSpeed's own; allowed: "
                '"checkpoint": {"load_universal": true} in the DeepSpeed JSON'
            )
        return
    mine, saved = Layout.of(engine), Layout.saved(folder)
    if universal or saved is None or (mine.reads_weights if weights_only else mine.reads)(saved):
        return
    advice = []
    if saved.stage and is_converted(engine):
        advice.append(
            "make a universal checkpoint of it (python -m muon_plugin.deepspeed.convert --input_folder "
            f'{folder} --output_folder {folder}_universal) and load that with "checkpoint": {{"load_universal": true}}'
        )
    if mine.reads_weights(saved) and not swaps(engine):
        advice.append(WEIGHTS_ONLY)
    what = "its weights" if weights_only else "it"
    raise ValueError(
        f"{folder} was saved with {saved}, and this run has {mine}: DeepSpeed loads {what} only where both are the "
        f"same; allowed: {'; or '.join(advice) or BEFORE}"
    )


def folder_of(engine: Any, load_dir: str, tag: str | None) -> Path | None:
    """The one from which the engine is going to load; None where it says itself that there is none."""
    if tag is None:
        latest = Path(load_dir, "latest_universal" if engine.load_universal_checkpoint() else "latest")
        if not latest.is_file():
            return None
        tag = latest.read_text().strip()
    folder = Path(load_dir, str(tag))
    return folder if folder.is_dir() else None
