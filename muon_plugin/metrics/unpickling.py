"""Reading what engines pickle without running the code that a pickle can hold.

``torch.load(weights_only=True)`` accepts tensors and plain values. Two readers that are called here unpickle more:
DeepSpeed's, of the files of ZeRO, and torch's, of a distributed checkpoint's ``.metadata``. Both kinds of files hold a
few classes of the engine beside plain values. These classes are listed, and no other is accepted.
"""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_METADATA = "torch.distributed.checkpoint."
#: What the `.metadata` of torch.distributed.checkpoint consists of, by module; data types are added by `find_class`.
_OF_METADATA = {
    f"{_METADATA}metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    f"{_METADATA}planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    f"{_METADATA}filesystem": {"_StorageInfo"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},  # saved by 0.15 and before
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}


def load(file: Path, trust: bool) -> Any:
    """The content of a file of `torch.save` in CPU memory: tensors, plain values and Megatron's arguments.

    Args:
        trust: unpickle whatever the file holds.

    Raises:
        ValueError: if it holds more and is not trusted.
    """
    if trust:
        return torch.load(file, map_location="cpu", weights_only=False, mmap=True)
    with torch.serialization.safe_globals([argparse.Namespace]), refused(file):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


@contextmanager
def refused(path: Path) -> Iterator[None]:
    """Turns the error about what is not accepted in `path` into one that names the path and ``--trust``."""
    try:
        yield
    except pickle.UnpicklingError as error:
        message = (
            f"{path} holds more than tensors ({str(error).splitlines()[0]}); allowed with --trust, which runs its code"
        )
        raise ValueError(message) from error


@contextmanager
def zero_files() -> Iterator[None]:
    """Every `torch.load` inside accepts what DeepSpeed saves with ZeRO's shards, also where its caller unpickles."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch's own switch, which comes before the argument weights_only
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def check_metadata(file: Path) -> None:
    """Whether a distributed checkpoint's ``.metadata`` holds the classes of torch.distributed.checkpoint alone.

    Raises:
        ValueError: if it holds more: torch would unpickle it.
    """
    with refused(file), file.open("rb") as opened:
        _Metadata(opened).load()


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _OF_METADATA.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not of torch.distributed.checkpoint")
        return super().find_class(module, name)
