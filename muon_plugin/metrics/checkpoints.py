"""The weights of a saved model, by name, read with the engines' own readers; which matrices they are.

Nothing is unpickled beyond tensors, plain values and a few classes of the engines (`unpickling`) unless the caller
trusts the files (`trust`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.cutting import Rule, Stored, cut
from ..core.layout import Matrix
from ..core.routing import Routing, route
from .unpickling import check_metadata, load, refused, zero_files

KNOWN = (
    "a Hugging Face folder; a DeepSpeed checkpoint of any ZeRO stage (the folder with `latest`, or a tag's) or a "
    "universal one; a Megatron torch_dist checkpoint (the folder with `latest_checkpointed_iteration.txt`, or an "
    "iteration's), or a legacy one of one model-parallel rank; a file of tensors (.safetensors, .pt, .bin)"
)
#: What a Megatron checkpoint holds beside weights, by the beginning of the key.
_NOT_WEIGHTS = ("optimizer", "chained_", "rng_state", "rerun_state_machine", "opt_param_scheduler")
_ARGUMENTS = ("num_attention_heads", "num_query_groups", "kv_channels")


def read(path: Path, trust: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every floating-point tensor of a model, whole and by name, and the configuration saved beside it.

    Args:
        path: one of `KNOWN`.
        trust: unpickle the files with everything in them. It runs code that they hold.

    Raises:
        ValueError: for anything else, with what is known.
    """
    for reader in (_file, _hugging_face, _universal, _zero, _torch_dist, _legacy):
        found = reader(path, trust)
        if found is not None:
            tensors, config = found
            break
    else:
        raise ValueError(f"{path}: not a checkpoint that is known here; allowed: {KNOWN}")
    tensors = {re.sub(r"^(module\.)+", "", name): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in tensors.items() if torch.is_floating_point(tensor)}, config


Found = tuple[dict[str, Tensor], dict[str, Any]] | None


def _file(path: Path, trust: bool) -> Found:
    if not path.is_file():
        return None
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path), {}
    state = load(path, trust)
    for key in ("module", "model", "state_dict"):
        state = state[key] if isinstance(state.get(key), Mapping) else state
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}, {}


def _hugging_face(path: Path, trust: bool) -> Found:
    index = path / "model.safetensors.index.json"  # beside the same weights in another form, perhaps
    named = {path / name for name in json.loads(index.read_text())["weight_map"].values()} if index.exists() else ()
    one = path / "model.safetensors"
    files = sorted(named) or [one] * one.exists() or sorted(path.glob("*.safetensors"))
    files = files or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        return None
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= (_file(file, trust) or ({},))[0]
    config = path / "config.json"
    return tensors, json.loads(config.read_text()) if config.exists() else {}


def _universal(path: Path, trust: bool) -> Found:
    latest = path / "latest_universal"
    folder = path / latest.read_text().strip() if latest.exists() else path
    files = sorted((folder / "zero").glob("*/fp32.pt"))
    if not files:
        return None
    saved = {file.parent.name: load(file, trust) for file in files}
    if not any(isinstance(value, Tensor) for value in saved.values()):
        return {name: value["param"] for name, value in saved.items()}, {}
    # Of stage 3 they are flat; the shapes are in a file beside them.
    states = load(min(folder.glob("*model_states.pt")), trust)
    shapes = {name: shape for group in states["param_shapes"] for name, shape in group.items()}
    return {name: value.view(shapes[name]) for name, value in saved.items()}, {}


def _zero(path: Path, trust: bool) -> Found:
    tag = (path / "latest").read_text().strip() if (path / "latest").exists() else path.name
    root = path if (path / "latest").exists() else path.parent
    if not list((root / tag).glob("*model_states.pt")):
        return None
    if not list((root / tag).glob("*zero_pp_rank*_optim_states.pt")):  # stage 0: one file has all, but for
        for pattern, what in (("*_expert_*_model_states.pt", "experts"), ("mp_rank_01_*", "halves of matrices")):
            if found := sorted((root / tag).glob(pattern)):
                raise ValueError(
                    f"{found[0]} and others hold {what} by themselves; allowed: a checkpoint without expert or tensor "
                    "parallelism, or one of ZeRO 1 to 3 made universal"
                )
        return _file(root / tag / "mp_rank_00_model_states.pt", trust)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with ExitStack() as checked:
        if not trust:
            checked.enter_context(refused(root / tag))
            checked.enter_context(zero_files())
        return get_fp32_state_dict_from_zero_checkpoint(str(root), tag), {}


def _iteration(path: Path) -> Path:
    """The newest iteration's folder of a Megatron checkpoint."""
    latest = path / "latest_checkpointed_iteration.txt"
    if not latest.exists():
        return path
    text = latest.read_text().strip()
    return path / (text if text == "release" else f"iter_{int(text):07d}")


def _torch_dist(path: Path, trust: bool) -> Found:
    folder = _iteration(path)
    if not (folder / ".metadata").exists():
        return None
    from torch.distributed import checkpoint

    if not trust:
        check_metadata(folder / ".metadata")
    saved = checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
    wanted = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in saved.items()
        if isinstance(entry, checkpoint.metadata.TensorStorageMetadata)
        and entry.properties.dtype.is_floating_point
        and not name.startswith(_NOT_WEIGHTS)
        and "_extra_state" not in name
    }
    checkpoint.load(wanted, storage_reader=checkpoint.FileSystemReader(folder), no_dist=True)
    common = folder / "common.pt"
    return wanted, _arguments(load(common, trust)) if common.exists() else {}


def _legacy(path: Path, trust: bool) -> Found:
    folder = _iteration(path)
    files = sorted(folder.glob("mp_rank_*/model_optim_rng.pt"))
    if not files:
        return None
    if len(files) > 1:
        raise ValueError(
            f"{folder}: {len(files)} model-parallel ranks hold parts of the matrices; allowed: one. Save as "
            "torch_dist, or join them with Megatron's tools/checkpoint/convert.py"
        )
    state = load(files[0], trust)
    return {k: v for k, v in state["model"].items() if isinstance(v, Tensor)}, _arguments(state)


def _arguments(state: Any) -> dict[str, Any]:
    """What Megatron's arguments say of fused projections, where it has saved them."""
    arguments = vars(state["args"]) if isinstance(state, Mapping) and "args" in state else {}
    return {name: arguments[name] for name in _ARGUMENTS if arguments.get(name)}


def matrices(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], split: Mapping[str, Any] | None = None
) -> tuple[Routing, dict[str, Tensor]]:
    """The matrices of a model as `muon_plugin.core.routing` finds them, and the tensors by the routing's names.

    Args:
        tensors, config: of `read`.
        split: pattern of names -> how a fused projection is taken apart, as in Muon's settings.
    """
    tensors = dict(_layers(tensors))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    model = _on_meta(config, shapes) if "model_type" in config else None
    routing = route(shapes, model=model, split=split)
    if any("linear_qkv" in name or "linear_fc1" in name for name in shapes):
        routing = _megatron(routing, config, split or {})
    return routing, tensors


def _layers(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Megatron saves equal layers as one tensor (layers, ...): each by itself, under its number."""
    for name, tensor in tensors.items():
        stacked = re.match(r"(.*\blayers)\.([a-z].*)", name)
        if not stacked:
            yield name, tensor
            continue
        for number, layer in enumerate(tensor):
            yield f"{stacked[1]}.{number}.{stacked[2]}", layer


def _on_meta(config: Mapping[str, Any], shapes: Mapping[str, Any]) -> Any:
    """Hugging Face's model without weights, whose modules and config say what is fused; None where names differ."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            options = {key: value for key, value in config.items() if key != "model_type"}
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **options))
    except (ImportError, ValueError, KeyError):
        return None
    return model if set(shapes) <= {name for name, _ in model.named_parameters(remove_duplicate=False)} else None


def _megatron(routing: Routing, config: Mapping[str, Any], split: Mapping[str, Any]) -> Routing:
    """Takes Megatron's fused projections apart: gate beside up where the shapes say so, query groups by arguments."""
    found: list[Matrix] = []
    notes = list(routing.notes)
    for matrix in routing.matrices:
        name = matrix.parameter
        fused = "linear_qkv" in name or name.endswith(("experts.weight1", "experts.weight2"))
        asked = any(pattern in name for pattern in split)
        rule = None if asked else _rule(name, matrix.rows, routing.shapes, config)
        if rule is None:
            found.append(matrix)
            if fused and not asked:
                notes.append(f"{name} is fused and stays whole: the checkpoint's arguments do not say how; see --split")
            continue
        for part in cut(matrix.name, Stored(1, matrix.rows, matrix.cols), rule):
            where = part.where._replace(start=part.where.start + matrix.where.start)
            found.append(replace(part, name=part.name.replace("][", ","), parameter=name, where=where))
    return replace(routing, matrices=tuple(found), notes=tuple(notes))


def _rule(name: str, rows: int, shapes: Mapping[str, Any], config: Mapping[str, Any]) -> Rule | None:
    if "linear_fc1" in name:
        second = shapes.get(name.replace("linear_fc1", "linear_fc2"))
        return Rule((rows // 2,) * 2) if second and rows == 2 * second[-1] else None
    if "linear_qkv" in name and config.get("kv_channels") and config.get("num_attention_heads"):
        groups = config.get("num_query_groups") or config["num_attention_heads"]
        width = config["kv_channels"]
        rule = Rule((config["num_attention_heads"] // groups * width, width, width), groups)
        return rule if sum(rule.sizes) * groups == rows else None
    return None
