"""The ranks that train with an engine. They may be a part of the world: others evaluate, serve or train another model.

Whatever the plugin compares, gathers, waits for or prints under DeepSpeed concerns these ranks alone.
"""

from __future__ import annotations

from typing import Any

from deepspeed.utils import groups

from ..core.agreement import joined


def of(engine: Any) -> Any:
    """All ranks that train with this engine: None (all of the world), a process group or a `Grid`.

    They are the ranks that the engine's own groups reach: those over which it reduces gradients (data and sequence
    parallel), and of each of them the model parallel group (tensor parallel and a pipeline's stages). Expert parallel
    groups are parts of these. Without an `mpu`, DeepSpeed's data parallel group is the world.

    Collective over them at the first call, which may not be before the engine configures its model.

    Raises:
        ValueError: for groups that do not span a grid.
    """
    known = engine.__dict__  # not getattr: the engine looks in its module too, which may be an engine
    if "_muon_ranks" not in known:
        known["_muon_ranks"] = joined(_dimensions(engine))
    return known["_muon_ranks"]


def same_weights(engine: Any) -> Any:
    """The process group of the ranks that hold the same weights as this one, before ZeRO cuts them."""
    if engine.mpu is not None:
        groups.mpu = engine.mpu  # the engine does so too when it configures its model
    return groups._get_sequence_data_parallel_group()


def _dimensions(engine: Any) -> list[Any]:
    found = [same_weights(engine)]
    if groups._get_model_parallel_world_size() > 1:
        found.append(groups.mpu.get_model_parallel_group())
    if groups._get_sequence_parallel_world_size() > 1:
        found.append(groups._get_sequence_parallel_group())
    return found
