"""How tensor parallelism cuts DeepSpeed's parameters: AutoTP's, or a client's whose `mpu` comes with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import product
from typing import Any

import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor

from ..core.agreement import agree, checksum
from ..core.layout import Block, Partition, Strided
from .host import whole_shape

#: What a client is told whose parameters are cut in a way that nobody describes.
MARK = "Mark what each rank holds a part of: tensor_model_parallel=True and partition_dim (Megatron's attributes)"


def group_of(engine: Any) -> Any:
    """The TP group of this rank, or None."""
    if engine.autotp_size() > 1:
        return groups.get_tensor_model_parallel_group()
    mpu = engine.mpu
    if mpu is None or engine.mp_world_size == 1:
        return None
    # DeepSpeed's own grid, of a pipeline: its model parallel ranks are more.
    if hasattr(mpu, "get_slice_parallel_group"):
        return mpu.get_slice_parallel_group() if mpu.get_slice_parallel_world_size() > 1 else None
    get = getattr(mpu, "get_tensor_model_parallel_group", None) or mpu.get_model_parallel_group
    return get()


def cuts(engine: Any, names: Mapping[Tensor, str]) -> dict[str, Partition]:
    """Name -> how tensor parallelism partitions it, for each of these parameters.

    Raises:
        ValueError: for one that is partitioned in a way that nobody describes.
    """
    group = group_of(engine)
    size = 1 if group is None else dist.get_world_size(group)
    return {name: _partition(name, p, size) for p, name in names.items()}


def _partition(name: str, p: Tensor, size: int) -> Partition:
    shape = whole_shape(p)
    if size == 1 or not _is_cut(p):
        return Partition.of(name, shape)
    if _is_cut_by_deepspeed(p):
        return _affine(name, p, shape, size)
    dim, parts = getattr(p, "partition_dim", 0), getattr(p, "partition_stride", 1)
    if dim not in range(len(shape)) or shape[dim] % parts:
        raise ValueError(
            f"{name} {list(shape)} is marked tensor_model_parallel=True with partition_dim={dim!r} and "
            f"partition_stride={parts!r}; allowed: a dimension, and a divisor of its size"
        )
    return Partition.of(name, [n * size if d == dim else n for d, n in enumerate(shape)], dim, size, parts)


def _is_cut(p: Any) -> bool:
    """AutoTP describes every parameter of the layers it replaced; Megatron's marks are what an mpu's client has."""
    return _is_cut_by_deepspeed(p) or bool(getattr(p, "tensor_model_parallel", False))


def _is_cut_by_deepspeed(p: Any) -> bool:
    return bool(getattr(p, "ds_autotp_universal_checkpoint_meta", None))


def _affine(name: str, p: Any, shape: Sequence[int], size: int) -> Partition:
    """DeepSpeed's own description of which elements each TP rank holds: its affine map."""
    from deepspeed.checkpoint.affine import ParamAffineMap

    meta = p.ds_autotp_universal_checkpoint_meta
    described = (meta.get("conversion") or {}).get("affine_map") or meta.get("affine_map")
    if described is None:
        raise ValueError(
            f"AutoTP cut {name} {list(shape)} in a way that DeepSpeed does not describe; allowed with Muon: layers "
            "that universal checkpoints support. Use a partition_config that cuts it along one dimension"
        )
    if not isinstance(described, ParamAffineMap):
        described = ParamAffineMap.from_dict(described)
    ranks = (described.pieces_by_rank[rank] for rank in range(size))
    blocks = tuple(tuple(block for piece in of_rank for block in _blocks(piece)) for of_rank in ranks)
    return Partition(name, tuple(described.logical_shape), blocks)


def _blocks(piece: Any) -> list[Block]:
    """An `AffinePiece` as runs in a rank's part ("dest") and in the whole parameter ("source")."""
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
            found.append(Block(Strided(starts[0], rows * run), Strided(starts[1], rows * run)))
        else:
            found.append(Block(Strided(starts[0], run, dest[-2], rows), Strided(starts[1], run, source[-2], rows)))
    return found


def compare_replicas(names: Mapping[Tensor, str], group: Any, matrices: Collection[str]) -> None:
    """What nobody marked as cut must be the same on every rank of the TP group. Collective over it.

    Args:
        names: parameter -> its name.
        group: the TP group of this rank, or None.
        matrices: names of the parameters that hold matrices.

    Raises:
        ValueError: on every rank, for the first parameter that differs; and for a matrix whose elements are all equal,
            so that parts of it could not be told from replicas.
    """
    if group is None:
        return
    unmarked = {p: name for p, name in names.items() if p.requires_grad and not _is_cut(p)}
    agree(
        "parameters that no tensor parallelism cuts",
        [f"{name} {list(whole_shape(p))} with the checksum {checksum(_held(p))}" for p, name in unmarked.items()],
        MARK,
        group,
    )
    if any(map(_is_cut_by_deepspeed, names)):  # which describes whatever it cuts
        return
    for p, name in unmarked.items():
        if name in matrices and not hasattr(p, "tensor_model_parallel") and _is_constant(_held(p)):
            raise ValueError(
                f"all elements of {name} {list(whole_shape(p))} are equal, and nothing says whether tensor parallelism "
                f"cuts it. {MARK}, and tensor_model_parallel=False on what each rank holds whole"
            )


def _held(p: Any) -> Tensor:
    """What this rank holds of a parameter.

    Without what pads the last of ZeRO-3's parts: that memory is never written.
    """
    part: Tensor | None = getattr(p, "ds_tensor", None)
    if part is None:
        return p.detach()  # type: ignore[no-any-return]
    begin = dist.get_rank(p.ds_process_group) * int(p.partition_numel())
    return part.detach().view(-1)[: max(p.ds_numel - begin, 0)]


def _is_constant(tensor: Tensor) -> bool:
    """Whether all elements have the same value, as those of a matrix of zeros; NaN has none."""
    return bool(tensor.numel() == 0 or (tensor == tensor.view(-1)[0]).all())
