"""Makes a universal checkpoint: of this Muon, of AdamW, or of DeepSpeed's built-in Muon.

    python -m muon_plugin.deepspeed.convert --input_folder CKPT/TAG --output_folder CKPT/TAG_universal

DeepSpeed's own converter does the work, with its own options. It wants Adam's names in every state; a checkpoint of the
built-in Muon has its momentum under another, in another layout: it is translated first, into a folder that is removed.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    OPTIMIZER_STATE_DICT,
    PARAM_SHAPES,
    PARAM_SLICE_MAPPINGS,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from torch import Tensor

from .checkpoints import NO_SECOND_MOMENT


def main() -> None:
    sys.argv += [] if "--inject_missing_state" in sys.argv else ["--inject_missing_state"]
    args = ds_to_universal.parse_arguments()
    folder, into = Path(args.input_folder), Path(args.output_folder)
    try:
        files = _optimizer_files(folder)
        _check_experts(folder)
        if not _is_of_built_in(files):
            return ds_to_universal.main(args)
        into.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=into.absolute().parent, prefix="translated_") as translated:
            print(f"muon_plugin: {folder} is of DeepSpeed's built-in Muon: {translate(folder, Path(translated))}")
            args.input_folder = translated
            ds_to_universal.main(args)
    except ValueError as error:
        raise SystemExit(f"muon_plugin: {error}") from error


def translate(folder: Path, into: Path) -> str:
    """Writes a checkpoint of the built-in Muon as one of this Muon's; what becomes of the momentum, in words.

    The built-in's momentum is an exponential average of gradients, as here (before clipping, and in the gradients'
    dtype). Under fp16 its gradients carry a loss scale, which has changed meanwhile.

    Raises:
        ValueError: for a checkpoint whose layout is not known.
    """
    files = _optimizer_files(folder)
    for other in set(folder.iterdir()) - set(files):
        (into / other.name).symlink_to(other.absolute())
    zero = (load(files[0]).get("ds_config") or {}).get("zero_optimization", {})
    if zero.get("round_robin_gradients") and zero.get("stage") != 3:
        raise ValueError(
            f"{folder} was saved with round_robin_gradients, whose table of parameters DeepSpeed saves wrongly; "
            "allowed: a checkpoint saved without it"
        )
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    scaled = False
    seen: dict[tuple[str, str], int] = {}  # (model parallel rank, parameter) -> its elements on the ranks before
    for file in files:
        loaded = load(file)
        saved = loaded[OPTIMIZER_STATE_DICT]
        states, cut = _states(saved), saved.get(PARAM_SLICE_MAPPINGS)
        scaled |= saved["loss_scaler"].dynamic or saved["loss_scaler"].cur_scale != 1
        steps = [state["step"] for state in states.values() if "step" in state]
        for number, state in states.items():
            if "momentum_buffer" not in state:
                continue
            momentum, mp = state.pop("momentum_buffer").float().view(-1), _mp_rank(file)
            if cut is not None and not offloaded:
                shapes = _shapes(folder, mp)
                part = saved[SINGLE_PARTITION_OF_FP32_GROUPS][number].numel()
                momentum = _shard_of_whole(momentum, cut[number], shapes, mp, seen, part)
            second = torch.full((1,), 0.0 if scaled else NO_SECOND_MOMENT).expand_as(momentum)
            state |= {"exp_avg": momentum, "exp_avg_sq": second, "step": max(steps, default=0)}
        torch.save(loaded, into / file.name)
    if scaled:
        return "weights are taken over; its momentum carries fp16's loss scale, so that of matrices starts from zero"
    return "weights and momentum are taken over"


def _shard_of_whole(
    momentum: Tensor,
    cut: Mapping[str, Any],
    shapes: Mapping[str, torch.Size],
    mp: str,
    seen: dict[tuple[str, str], int],
    size: int,
) -> Tensor:
    """Stages 1 and 2 keep the momentum of whole matrices, also of those that this rank holds a part of."""
    shard, offset = torch.zeros(size), 0
    for name, here in sorted(cut.items(), key=lambda item: item[1].start):
        before = seen.get((mp, name), 0)
        shard[here.start : here.start + here.numel] = momentum[offset + before : offset + before + here.numel]
        seen[mp, name] = before + here.numel
        offset += shapes[name].numel()
    if offset != momentum.numel():
        raise ValueError(
            f"the built-in's momentum has {momentum.numel()} elements where its parameters have {offset}: the shard "
            "layout of this release is not supported. Please report the release and the config"
        )
    return shard


def _optimizer_files(folder: Path) -> list[Path]:
    """In the order of the ranks."""
    files = sorted(folder.glob("*_optim_states.pt"), key=lambda f: [int(n) for n in re.findall(r"\d+", f.name)][-2:])
    if not files:
        raise ValueError(
            f"--input_folder {folder} holds no *_optim_states.pt; allowed: the folder of one checkpoint of ZeRO stage "
            "1 to 3, such as checkpoints/global_step1000"
        )
    return files


def _is_of_built_in(files: Sequence[Path]) -> bool:
    saved = load(files[0])[OPTIMIZER_STATE_DICT]
    return any("momentum_buffer" in state for state in _states(saved).values())


def _check_experts(folder: Path) -> None:
    """The converter takes the experts of all EP ranks, which have equal names, for parts of one."""
    auto_ep = getattr(ds_to_universal, "_get_autoep_metadata", lambda state: None)
    if list(folder.glob("layer_*_expert_*")) and not auto_ep(load(model_files(folder)[0])):
        raise ValueError(
            f"--input_folder {folder} has experts of deepspeed.moe, which DeepSpeed's converter does not know; "
            "allowed: checkpoints without. These resume at the world size and ZeRO stage that saved them"
        )


def model_files(folder: Path) -> list[Path]:
    """Of the model parallel ranks (in ZeRO-3: and of each data parallel rank), without those of single experts."""
    files = sorted(folder.glob("*mp_rank_*_model_states.pt"))
    return [file for file in files if file.name.startswith(("mp_rank_", "zero_pp_rank_"))]


def load(file: Path, mapped: bool = True) -> Any:
    # Unpickled: the file holds DeepSpeed's loss scaler and dataclasses, and DeepSpeed's own converter, which `main`
    # calls, unpickles it too (SECURITY.md).
    return torch.load(file, map_location="cpu", weights_only=False, mmap=mapped and zipfile.is_zipfile(file))


def _states(saved: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    base = saved.get(BASE_OPTIMIZER_STATE) or saved.get(OPTIMIZER_STATE_DICT) or {}
    return base.get("state", {}) if isinstance(base, dict) else {}  # a list where elastic checkpoints are on


def _mp_rank(file: Path) -> str:
    return re.findall(r"mp_rank_(\d+)", file.name)[-1]


def _shapes(folder: Path, mp: str) -> dict[str, torch.Size]:
    groups = load(next(folder.glob(f"*mp_rank_{mp}_model_states.pt")))[PARAM_SHAPES]
    return {name: shape for group in groups for name, shape in group.items()}


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
