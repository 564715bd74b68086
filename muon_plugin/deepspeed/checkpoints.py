"""Checkpoints: what DeepSpeed's converter to universal checkpoints needs, and loading them under any layout.

The converter (``python -m deepspeed.checkpoint.ds_to_universal``) supports only Adam's two moments. So momentum is
saved as ``exp_avg``, with an ``exp_avg_sq`` of `NO_SECOND_MOMENT`: one element, expanded, which takes no space on disk.
A universal checkpoint holds each parameter whole, by name, so this Muon reads its own shards from it, whatever the
layout and the optimizer that saved it. From AdamW's it restores the weights and the state of AdamW's parameters.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint.constants import BASE_OPTIMIZER_STATE, DS_VERSION, OPTIMIZER_STATE_DICT, PARAM
from deepspeed.ops.adam import fused_adam
from deepspeed.utils import logger
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from ..core.agreement import gather, together
from ..core.call import Call
from ..core.layout import Shard
from ..core.muon import Muon

#: Saved as the second moment of tensors that have none; Adam's is never negative.
NO_SECOND_MOMENT = -1.0
#: Where AutoEP says on a parameter which experts it holds (`DS_AUTOEP_UC_META`, from 0.19).
EXPERTS = "ds_autoep_uc_meta"


def saved_like_adam(muon: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A hook after ``Muon.state_dict`` that adds the keys which DeepSpeed's converter reads to every state."""
    states = state_dict["state"]
    step = next((state["step"] for state in states.values() if "step" in state), 0)
    for number, state in states.items():
        if "exp_avg_sq" not in state:
            none = torch.full((1,), NO_SECOND_MOMENT).expand_as(state["exp_avg"])
            states[number] = {**state, "exp_avg_sq": none, "step": step}
    return state_dict


def right_slices(wrapper: Any, calls: Sequence[Call]) -> None:
    """Corrects the table in which the converter looks up parameters: DeepSpeed's is wrong under round-robin."""
    if hasattr(wrapper, "_param_slice_mappings"):
        wrapper._param_slice_mappings = [
            {s.parameter: fragment_address(start=s.local.start, numel=s.local.numel) for s in call.shards}
            for call in calls
        ]


def check_before_loading(wrapper: Any, muon: Muon) -> None:
    """Rejects another optimizer's checkpoint, for which stages 1 and 2 would blame parameter_alignment."""
    original = getattr(wrapper, "_load_legacy_checkpoint", None)
    if original is None:
        return

    def checked(state_dicts: Any, load_optimizer_states: bool = True, *args: Any, **kwargs: Any) -> Any:
        base = next((s[BASE_OPTIMIZER_STATE] for s in state_dicts if s), None) if load_optimizer_states else None
        if isinstance(base, dict):
            muon.check_saved(base["param_groups"])
        return original(state_dicts, load_optimizer_states, *args, **kwargs)

    wrapper._load_legacy_checkpoint = checked


def load_universal_checkpoint(
    original: Callable[..., Any], wrapper: Any, folder: str, load_optimizer_states: bool, load_from_fp32_weights: bool
) -> None:
    if not load_universal(wrapper, folder, load_optimizer_states):
        original(wrapper, folder, load_optimizer_states, load_from_fp32_weights)


def load_universal(wrapper: Any, folder: str, load_optimizer_states: bool) -> bool:
    """Loads a universal checkpoint into one of ZeRO's optimizers; returns False if that does not wrap this Muon.

    Raises:
        ValueError: for a checkpoint that lacks a parameter, or has it in another size.
    """
    muon = wrapper.optimizer
    if not isinstance(muon, Muon):
        return False
    zero = Path(folder) / "zero"
    ranks = muon.process_group
    saved = together(lambda: _read(zero / "optimizer_state.pt", unpickled=True), ranks)
    saved.setdefault(DS_VERSION, deepspeed.__version__)  # ZeRO-3 does not save it, the others require it
    stage_3 = hasattr(wrapper, "_load_global_state_stage3")
    (wrapper._load_global_state_stage3 if stage_3 else wrapper._load_global_state)(saved)
    fresh = set().union(*gather(together(lambda: _take(muon, zero, load_optimizer_states), ranks), ranks))
    kept = together(lambda: _take_groups(muon, saved, zero), ranks) if load_optimizer_states else []
    for number in range(len(wrapper.fp16_groups)) if stage_3 else ():  # elsewhere the engine does it
        wrapper.fp16_partitioned_groups_flat[number].data.copy_(wrapper.fp32_partitioned_groups_flat[number].data)
        wrapper._unflatten_partitioned_parameters(number)
    if fresh:
        logger.warning(  # DeepSpeed 0.19 shows nothing below
            f"muon_plugin: {folder} was saved by another optimizer, or with other parameters on Muon: weights "
            f"restored; the state starts from zero for {len(fresh)} parameters ({', '.join(sorted(fresh)[:3])}, ...)"
        )
    if kept and any("layout" in group for group in saved["param_groups"]):
        logger.warning(
            f"muon_plugin: {folder} has other parameter groups: the learning rate, decay and other options of "
            f"param_groups {kept} are those that this run was given"
        )
    return True


def get_all_ckpt_names(original: Callable[..., Any], engine: Any, checkpoints_path: str, tag: str) -> list[str]:
    return any_ckpt_names(engine, checkpoints_path, tag, original(engine, checkpoints_path, tag))


def any_ckpt_names(engine: Any, checkpoints_path: str, tag: str, names: list[str]) -> list[str]:
    """ZeRO-3 names model files differently from the other stages; for a universal checkpoint either will do."""
    if names or not engine.load_universal_checkpoint() or not isinstance(engine.basic_optimizer, Muon):
        return names
    files = sorted(Path(checkpoints_path, tag).glob("*mp_rank_*_model_states.pt"))
    return [str(file) for file in files if not file.name.startswith("zero_pp_rank_") or "zero_pp_rank_0_" in file.name]


def offload_states(original: Callable[..., Any], zero: Any, *args: Any, **kwargs: Any) -> Any:
    """ZeRO-3 asserts that the optimizer is FusedAdam, then moves state by Adam's names, which this Muon's state has."""
    if not isinstance(zero.optimizer, Muon):
        return original(zero, *args, **kwargs)
    own, fused_adam.FusedAdam = fused_adam.FusedAdam, Muon
    try:
        return original(zero, *args, **kwargs)
    finally:
        fused_adam.FusedAdam = own


def _take(muon: Muon, zero: Path, with_states: bool) -> set[str]:
    """Fills in this rank's shards; returns the parameters whose saved state does not fit and was reset to zero."""
    fresh = set()
    for call in muon.calls:
        for shard in call.shards:
            folder = zero / shard.parameter
            _fill(shard, shard.tensor, _whole(folder, "fp32", muon))
            if not with_states:
                continue
            state = muon.state[shard.tensor]
            second = _whole(folder, "exp_avg_sq", muon) if (folder / "exp_avg_sq.pt").exists() else None
            from_muon = second is None or bool(second[0] < 0)
            as_saved = from_muon is ("exp_avg_sq" not in state)
            if not as_saved:
                fresh.add(shard.parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    _fill(shard, state[key], _whole(folder, key, muon) if as_saved else None)
    return fresh


def _take_groups(muon: Muon, saved: dict[str, Any], zero: Path) -> list[int]:
    """Restores the options of groups that match saved ones, and the count of steps; the numbers of the other groups."""
    kept = muon.take_groups(saved["param_groups"])
    states = saved.get(OPTIMIZER_STATE_DICT, {}).get("state", {})  # from ZeRO-3; from 1 and 2, a file for a parameter
    steps = [state["step"] for state in states.values() if "step" in state]
    for call in muon.calls:
        files = [zero / shard.parameter / "step.pt" for shard in call.shards]
        found = steps + [torch.load(file, weights_only=True) for file in files if file.exists()]
        counted = max(map(float, found), default=0.0)
        if muon.param_groups[call.group]["use_muon"]:
            for p in call.tensors:  # the rounding of a momentum in bf16 depends on it
                if "step" in muon.state[p]:
                    muon.state[p]["step"].fill_(counted)
        else:
            for p in call.tensors:
                muon.state[p]["step"] = counted
            muon.halves.adamw.adopt(muon.param_groups[call.group], call.tensors, muon.state)
    return kept


def _read(path: Path, unpickled: bool = False) -> Any:
    if not path.exists():
        raise ValueError(f"the universal checkpoint has no {path}: was it converted from this model's checkpoint?")
    if unpickled:
        # optimizer_state.pt holds a loss scaler, which is an object. DeepSpeed unpickles it too, and has unpickled the
        # checkpoint's model states before (SECURITY.md).
        return torch.load(path, map_location="cpu", weights_only=False)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values, and loading it could run code; allowed: a universal "
            "checkpoint as python -m muon_plugin.deepspeed.convert writes it"
        ) from error


def _whole(folder: Path, key: str, muon: Muon) -> Tensor:
    """A parameter's weights or state, whole and flat."""
    found = _read(folder / f"{key}.pt")
    flat = (found[PARAM] if isinstance(found, dict) else found).reshape(-1)
    flat = _own_experts(flat, next((p for p, name in muon.names.items() if name == folder.name), None))
    shape = muon.routing.shapes[folder.name]
    expected = torch.Size(shape).numel()
    if flat.numel() != expected:
        raise ValueError(
            f"{folder / key}.pt holds {flat.numel()} elements; {folder.name} {list(shape)} has {expected} here: load "
            "a checkpoint of the same model"
        )
    return flat


def _own_experts(flat: Tensor, p: Tensor | None) -> Tensor:
    """Those that AutoEP has put on this rank, of the experts of all ranks, which are saved as one parameter."""
    meta = getattr(p, EXPERTS, None)
    if meta is None or flat.numel() != math.prod(meta["logical_shape"]):
        return flat
    return flat.view(*meta["logical_shape"])[meta["local_experts"]].reshape(-1)


def _fill(shard: Shard, tensor: Tensor, whole: Tensor | None) -> None:
    into = shard.local.view(tensor.detach().view(-1))
    into.copy_(shard.where.view(whole).view_as(into)) if whole is not None else into.zero_()
