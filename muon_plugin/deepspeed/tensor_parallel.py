"""How tensor parallelism cuts DeepSpeed's parameters: AutoTP's, or a client's whose `mpu` comes with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor

from ..core.agreement import agree
from ..core.layout import Strided


@dataclass(frozen=True)
class Cut:
    """A parameter of this TP rank.

    Attributes:
        shape: of the whole parameter.
        places: (where in this rank's flattened part, where in the flattened whole), the same elements in order.
    """

    shape: tuple[int, ...]
    places: tuple[tuple[Strided, Strided], ...]


def group_of(engine: Any) -> Any:
    """The TP group of this rank, or None."""
    if engine.autotp_size() > 1:
        return groups.get_tensor_model_parallel_group()
    mpu = engine.mpu
    if mpu is None or engine.mp_world_size == 1:
        return None
    if hasattr(
        mpu, "get_slice_parallel_group"
    ):  # DeepSpeed's own grid, of a pipeline: its model parallel ranks are more
        return mpu.get_slice_parallel_group() if mpu.get_slice_parallel_world_size() > 1 else None
    get = getattr(mpu, "get_tensor_model_parallel_group", None) or mpu.get_model_parallel_group
    return get()


def cuts(engine: Any, names: Mapping[Tensor, str]) -> dict[str, Cut]:
    """Every trainable parameter, cut or not.

    Raises:
        ValueError: for one that is cut in a way that nobody describes.
    """
    group = group_of(engine)
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    return {name: _cut(name, p, rank, size) for p, name in names.items() if p.requires_grad}


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape before ZeRO-3 cut the parameter: afterwards, and under ``zero.Init`` from the start, it looks empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _cut(name: str, p: Tensor, rank: int, size: int) -> Cut:
    shape = full_shape(p)
    whole = Strided(0, torch.Size(shape).numel())
    if size == 1 or not _is_cut(p):
        return Cut(shape, ((whole, whole),))
    described = _described(name, p, shape, size)
    places = tuple(pair for piece in described.pieces_by_rank[rank] for pair in _places(piece))
    return Cut(tuple(described.logical_shape), places)


def _is_cut(p: Any) -> bool:
    """AutoTP describes every parameter of the layers it replaced; Megatron's marks are what an mpu's client has."""
    meta = getattr(p, "ds_autotp_universal_checkpoint_meta", None)
    return bool(meta) or bool(getattr(p, "tensor_model_parallel", False))


def _described(name: str, p: Any, shape: Sequence[int], size: int) -> Any:
    """DeepSpeed's own description of which elements each TP rank holds."""
    from deepspeed.checkpoint.affine import ParamAffineMap, contiguous_split_map, sub_param_map

    meta = getattr(p, "ds_autotp_universal_checkpoint_meta", None)
    if meta:
        described = (meta.get("conversion") or {}).get("affine_map") or meta.get("affine_map")
        if described is None:
            raise ValueError(
                f"AutoTP cut {name} {list(shape)} in a way that DeepSpeed does not describe; allowed with Muon: layers "
                "that universal checkpoints support. Use a partition_config that cuts it along one dimension"
            )
        return described if isinstance(described, ParamAffineMap) else ParamAffineMap.from_dict(described)
    dim, stride = getattr(p, "partition_dim", 0), getattr(p, "partition_stride", 1)
    whole = [n * size if d == dim else n for d, n in enumerate(shape)]
    if stride == 1:
        return contiguous_split_map(whole, [shape[dim]] * size, dim)
    part = shape[dim] // stride
    return sub_param_map(
        shape=whole,
        sub_dim_sizes=[part * size] * stride,
        shard_widths=[[part] * size] * stride,
        partition_dim=dim,
    )


def _places(piece: Any) -> list[tuple[Strided, Strided]]:
    """A block of the description as runs in this rank's part and in the whole."""
    if piece.numel == 0:
        return []
    shape = (1,) * (2 - len(piece.shape)) + piece.shape
    dest, source = ((0,) * (2 - len(piece.shape)) + s for s in (piece.dest_strides, piece.source_strides))
    *outer, rows, run = shape
    if dest[-1] != 1 or source[-1] != 1:
        raise ValueError(f"{piece} is not made of runs of elements: muon_plugin does not know this layout")
    found = []
    for index in product(*map(range, outer)):
        starts = [
            base + sum(i * stride for i, stride in zip(index, strides))
            for base, strides in ((piece.dest_offset, dest), (piece.source_offset, source))
        ]
        if rows == 1 or (dest[-2] == run and source[-2] == run):
            found.append((Strided(starts[0], rows * run), Strided(starts[1], rows * run)))
        else:
            found.append((Strided(starts[0], run, dest[-2], rows), Strided(starts[1], run, source[-2], rows)))
    return found


def compare_replicas(names: Mapping[Tensor, str], group: Any) -> None:
    """What nobody marked as cut must be the same on every rank of the TP group. Collective over it.

    Raises:
        ValueError: on every rank, for the first parameter that differs.
    """
    if group is None:
        return
    lines = []
    for p, name in names.items():
        if p.requires_grad and not _is_cut(p):
            tensor = getattr(p, "ds_tensor", p).detach()
            lines.append(f"{name} {list(full_shape(p))} with the sum {tensor.double().sum().item()}")
    agree(
        "parameters that no tensor parallelism cuts",
        lines,
        "Mark what each rank holds a part of: tensor_model_parallel=True and partition_dim (Megatron's attributes)",
        group,
    )
