"""The optimizer on NVMe, between which and the CPU DeepSpeed swaps the masters and the state of ZeRO-3's sub-groups.

A sub-group whose shard is too small for that stays in memory. The file of a tensor is named by the parameters of its
sub-group, which DeepSpeed numbers as a process makes them, and by the name of the state.

A checkpoint holds a copy of the files. DeepSpeed copies them back, and reads the masters among them. It restores
neither the state, nor what was in memory, with any optimizer, and without a word; here both are restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import FP32_FLAT_GROUPS, OPTIMIZER_STATE_DICT
from deepspeed.checkpoint.ds_to_universal import dp_index_to_str
from torch import Tensor

from ..core.agreement import together
from . import ranks
from .convert import load
from .host import BEFORE, swaps

#: The folder of a checkpoint that has the files, and what DeepSpeed's ZeRO saves beside the optimizer's state.
FILES = "offloaded_tensors"
SCALE = ("loss_scaler", "dynamic_loss_scale", "overflow")
SETTING = "zero_optimization.offload_optimizer.device='nvme'"


def keep_empty(engine: Any) -> None:
    """From now on tensors that are on NVMe are empty between steps and in checkpoints; they are emptied now.

    The swapper that is not pipelined leaves them so. The pipelined one leaves them with the buffers that it wrote from,
    which it reuses. State of such a tensor would be made at start, and the swapper would look for its file before it
    wrote one; and a checkpoint would hold what is in the buffers as weights.
    """
    empty_swapped(engine)
    zero = engine.optimizer
    save = zero.state_dict

    def saved() -> Any:
        empty_swapped(engine)  # they are not after safe_set_full_fp32_param and its like
        return save()

    zero.state_dict = saved


def empty_swapped(engine: Any) -> None:
    """Empties the tensors that are on NVMe, once what is being written has been."""
    swapper = engine.optimizer.optimizer_swapper
    for kind, operation in getattr(swapper, "swap_ops", {}).items():
        if operation is not None and not operation.read_op:
            swapper._complete_swap_out(kind)
    for info in swapper.swap_params_info.values():
        info.release_memory()


def step_swapped(engine: Any, take: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """The engine's step, after which they are empty again."""
    take(*args, **kwargs)
    empty_swapped(engine)


def check_device(engine: Any, folder: Path | None) -> None:
    """Refuses a checkpoint where one of both runs has the optimizer on NVMe.

    Args:
        folder: of the checkpoint; None where there is none.

    Raises:
        ValueError: with what to do.
    """
    if folder is None or (folder / FILES).is_dir() == swaps(engine):
        return
    if swaps(engine):
        saved, here, advice = "without", "has", f"none, or {BEFORE}"
    else:
        saved, here, advice = "with", "has not", "the same device, or weights that save_16bit_model saved"
    raise ValueError(
        f"{folder} was saved {saved} {SETTING}, which this run {here}: DeepSpeed loads it only where both are the "
        f"same; allowed: {advice}"
    )


def check_files(engine: Any, folder: Path) -> None:
    """Refuses a checkpoint whose files on NVMe are not those of this run. DeepSpeed goes by their names alone.

    Raises:
        ValueError: where it is another optimizer's, or has other parameter groups or sub-groups, or lacks files.
    """
    empty_swapped(engine)
    zero, saved = engine.optimizer, _saved(engine, folder)
    engine.basic_optimizer.check_saved(saved[OPTIMIZER_STATE_DICT]["param_groups"])
    if _parts(saved[FP32_FLAT_GROUPS]) != _parts(_masters(zero)):
        raise ValueError(
            f"{folder} has other sub-groups than this run, or others of them on NVMe; allowed: the same sub_group_size "
            "and aio, in a new process that makes the same models in the same order (DeepSpeed numbers parameters so)"
        )
    of_masters = _states(zero, saved[OPTIMIZER_STATE_DICT])
    for number, info in _swapped(zero):
        names = ("", *(f"{name}-" for name in _moments(engine.basic_optimizer, info) if of_masters[number]))
        least = zero.optimizer_swapper._io_aligned_numel(info.numel()) * info.dtype().itemsize
        for file in (_files(engine, folder) / f"{name}{info.param_id}.tensor.swp" for name in names):
            if not file.is_file() or file.stat().st_size < least:
                raise ValueError(f"{file} is missing, or has less than {least} bytes; allowed: a whole checkpoint")


def restore(engine: Any, folder: Path) -> None:
    """What DeepSpeed left out, after it has copied the files and read the masters. Collective."""
    zero = engine.optimizer
    together(lambda: _restore_state(engine, folder), ranks.of(engine))
    zero.checkpoint_event_prologue()
    for number in _in_memory(zero):  # of the 16-bit weights as well
        zero._reassign_or_swap_out_partitioned_parameters(number)
    zero.checkpoint_event_epilogue()
    empty_swapped(engine)


def _restore_state(engine: Any, folder: Path) -> None:
    zero, muon, saved = engine.optimizer, engine.basic_optimizer, _saved(engine, folder)
    empty_swapped(engine)
    zero.optimizer_swapper.purge_state()
    zero._set_fp32_optimizer_param_groups()
    try:
        muon.load_state_dict(saved[OPTIMIZER_STATE_DICT])
    finally:
        zero._clear_fp32_optimizer_param_groups()
    for key in SCALE:
        setattr(zero, key, saved[key])
    for number in _in_memory(zero):
        _masters(zero)[number].data.copy_(saved[FP32_FLAT_GROUPS][number])
    of_masters = _states(zero, saved[OPTIMIZER_STATE_DICT])
    for number, info in _swapped(zero):
        master = _masters(zero)[number]
        loaded = muon.state.pop(master, {})
        if not of_masters[number]:  # not stepped yet
            continue
        moments: dict[str, Any] = _moments(muon, info)  # empty, which the swapper fills
        for name, moment in moments.items():
            moment.ds_id = f"{name}-{info.param_id}"
        muon.state[master] = {name: loaded[name] for name in loaded if name == "step"} | moments
        info.add_state_tensors([*moments.values()])


def _moments(muon: Any, info: Any) -> dict[str, Tensor]:
    """New state of a master on NVMe, an empty tensor each, by name."""
    (master, *_) = info.get_compute_tensors()
    new = muon.halves.of(master).new_state(master)
    return {name: value for name, value in new.items() if torch.is_tensor(value) and not value.numel()}


def _states(zero: Any, saved: Any) -> list[dict[str, Any]]:
    """The saved state of each sub-group, which ZeRO lists group by group; empty where it had none."""
    found: list[dict[str, Any]] = [{} for _ in _masters(zero)]
    for number, group in enumerate(saved["param_groups"]):
        mine = (i for i in range(len(found)) if zero.sub_group_to_group_id[i] == number)
        for i, key in zip(mine, group["params"], strict=True):
            found[i] = saved["state"].get(key, {})
    return found


def _saved(engine: Any, folder: Path) -> Any:
    """What ZeRO saved of this rank: tensors that were on NVMe are empty. In memory, as the state will be."""
    file = Path(engine._get_zero_ckpt_name(str(folder.parent), folder.name))
    return load(file, mapped=False)[OPTIMIZER_STATE_DICT]


def _parts(masters: Sequence[Any]) -> list[tuple[str, int]]:
    """Of each sub-group the numbers of its parameters, and its elements in memory: none of one on NVMe."""
    return [(master.ds_id, master.numel()) for master in masters]


def _masters(zero: Any) -> list[Any]:
    return list(zero.fp32_partitioned_groups_flat)


def _swapped(zero: Any) -> Iterator[tuple[int, Any]]:
    infos = zero.optimizer_swapper.swap_params_info
    return ((i, infos[master.ds_id]) for i, master in enumerate(_masters(zero)) if master.ds_id in infos)


def _in_memory(zero: Any) -> Iterator[int]:
    return (i for i in range(len(_masters(zero))) if not zero._swappable_optimizer_subgroup(i))


def _files(engine: Any, folder: Path) -> Path:
    rank = engine.local_rank if engine.use_node_local_storage() else engine.global_rank
    return folder / FILES / f"rank{dp_index_to_str(rank)}"


def notes(engine: Any) -> list[str]:
    """What the start-up table says of checkpoints."""
    told = (
        "offload to NVMe: its checkpoints resume with the same ranks and offload alone, and cannot be converted; for "
        "all else save the weights, too (save_16bit_model)"
    )
    return [told] if swaps(engine) else []
