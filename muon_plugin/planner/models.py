"""Sources of a model's parameters: Megatron's arguments, a Hugging Face config, or names and shapes in a JSON file."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.layout import Matrix
from ..core.muon import parameter_groups
from ..core.orthogonalize import NewtonSchulz
from ..core.routing import Routing, route
from ..core.settings import Settings
from ..megatron.routing import Parameter
from . import shapes
from .cost import Traffic
from .layouts import Call, Stage, Zero, zero_calls


@dataclass(frozen=True)
class Model:
    """A model under an engine, ready to be cut for any number of ranks.

    Attributes:
        title: what it is and under what.
        settings: Muon's, one line.
        notes: what the plan assumes or leaves out.
        newton_schulz, scalars: what a matrix costs; bf16 numbers that travel with each update.
        traffic: the engine's own, an element.
        baseline: AdamW under the same engine, its name.
        unit: the number of ranks is a multiple of this.
        layout: for a number of ranks, the sizes of the parallel dimensions by their name.
        stages: for a number of ranks, the kinds of pipeline stages.
    """

    title: str
    settings: str
    notes: tuple[str, ...]
    newton_schulz: NewtonSchulz
    scalars: int
    traffic: Traffic
    baseline: str
    unit: int
    layout: Callable[[int], Mapping[str, int]]
    stages: Callable[[int], list[Stage]]


@dataclass(frozen=True)
class Parallel:
    """The parallel dimensions asked for, 1 where not; under Megatron they replace those of its arguments."""

    tp: int | None = None
    pp: int | None = None
    ep: int | None = None
    cp: int | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.tp or 1, self.pp or 1, self.ep or 1, self.cp or 1


def read(path: str, flag: str) -> str:
    """A file of the user's.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {path}: {getattr(error, 'strerror', None) or error}; allowed: a text file") from None


def read_json(path: str, flag: str) -> dict[str, Any]:
    try:
        found = json.loads(read(path, flag))
    except json.JSONDecodeError as error:
        plain = Path(path).with_suffix(".json")
        other = f" without comments, such as {plain}" if plain.is_file() and Path(path).suffix == ".jsonc" else ""
        raise ValueError(f"{flag} {path} is not JSON: {error}; allowed: a JSON object{other}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{flag} {path} holds a {type(found).__name__}; allowed: a JSON object")
    return found


def megatron_arguments(path: str) -> list[str]:
    """Megatron's arguments from a file: as on a command line, over any number of lines, # begins a comment."""
    text = read(path, "--megatron")
    try:
        return shlex.split(text, comments=True)
    except ValueError as error:
        raise ValueError(f"--megatron {path}: {error}; allowed: Megatron's arguments, quoted as in a shell") from None


def megatron(arguments: Sequence[str], parallel: Parallel, world: int) -> Model:
    """GPTModel under Megatron's distributed optimizer."""
    from . import on_meta

    flags = {"tensor-model-parallel-size": parallel.tp, "pipeline-model-parallel-size": parallel.pp}
    flags |= {"expert-model-parallel-size": parallel.ep, "context-parallel-size": parallel.cp}
    extra = [text for flag, size in flags.items() if size for text in (f"--{flag}", str(size))]
    args, settings = on_meta.load([*arguments, *extra], world)
    kinds = list(on_meta.stages(args, settings))
    import megatron.core

    def stages(ranks: int) -> list[Stage]:
        cut = on_meta.sizes(args, ranks)
        found = []
        for kind in kinds:
            calls = tuple(_megatron_calls(kind, ranks, cut))
            found.append(Stage(kind.numbers, ranks // cut["pp"], calls))
        return found

    cut, instances = on_meta.sizes(args), args.num_distributed_optimizer_instances
    gradient = 4 if args.accumulate_allreduce_grads_in_fp32 or not (args.bf16 or args.fp16) else 2
    return Model(
        f"GPTModel under Megatron-Core {megatron.core.__version__.partition('+')[0]}",
        settings.describe(),
        (*settings.notes, *on_meta.assumptions(args)),
        settings.newton_schulz,
        0,
        Traffic(gradient, 2 if args.bf16 or args.fp16 else 4),
        "AdamW under Megatron's distributed optimizer",
        cut["pp"] * instances * math.lcm(cut["tp"] * cut["cp"], cut["etp"] * cut["ep"]),
        lambda ranks: on_meta.sizes(args, ranks),
        stages,
    )


def _megatron_calls(kind: Any, ranks: int, cut: Mapping[str, int]) -> Iterator[Call]:
    for buffers in kind.buffers(ranks):
        place = {number: i for i, number in enumerate(buffers.parameters)}
        parameters = tuple(kind.parameters[number] for number in buffers.parameters)
        held = tuple(tuple((place[n], start, end) for n, start, end in of_rank) for of_rank in buffers.held)
        names = {p.name for p in parameters}
        yield Call(
            "experts" if buffers.experts else "dense layers",
            parameters,
            tuple(m for m in kind.routing.matrices if m.parameter in names),
            len(held),
            held.__getitem__,
            cut["etp" if buffers.experts else "tp"],
            cut["ep"] if buffers.experts else 1,
        )


def deepspeed(
    config: Mapping[str, Any], hf: str | None, shapes_file: str | None, parallel: Parallel, zero_stage: int | None
) -> Model:
    """A model under DeepSpeed's ZeRO.

    Args:
        config: the DeepSpeed JSON; it may be empty.
        hf: a Hugging Face config.json or its folder, or
        shapes_file: names and shapes.
        parallel: TP, PP and EP for names and shapes alone.
        zero_stage: in the place of the config's.
    """
    settings, zero, traffic = _deepspeed_config(config, zero_stage)
    tp, pp, ep, cp = parallel.sizes
    if hf is not None:
        if (tp, pp, ep) != (1, 1, 1):
            raise ValueError(
                f"--tp {tp} --pp {pp} --ep {ep} with --hf; allowed: 1, since a Hugging Face model does not say how it "
                "is cut; use --shapes, whose entries say it, or Megatron's arguments"
            )
        model, title = _hf_model(hf)
        whole = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        routing = route(whole, model=model, exclude=settings.exclude, split=settings.split)
        parameters = [Parameter(name, p, 1, 1, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
        of_stage: list[tuple[tuple[int, ...], list[Parameter], Routing]] = [((0,), parameters, routing)]
    else:
        title = str(shapes_file)
        of_stage = [
            (numbers, found, route(whole, exclude=settings.exclude, split=settings.split))
            for numbers, found, whole in shapes.stages(read_json(title, "--shapes"), tp, pp, ep)
        ]

    def stages(ranks: int) -> list[Stage]:
        dp = ranks // (tp * pp)
        return [
            Stage(numbers, ranks // pp, tuple(_zero_stage_calls(found, routing, settings, zero, dp, tp, ep)))
            for numbers, found, routing in of_stage
        ]

    ways = {0: "without ZeRO", 1: "ZeRO-1", 2: "ZeRO-2", 3: "ZeRO-3"}
    return Model(
        f"{title} under DeepSpeed, {ways[zero.stage]}",
        f"{settings.adjust_lr_fn}, momentum {settings.momentum:g}, {settings.ns_steps} steps ({settings.ns_method})",
        tuple(note for *_, routing in of_stage for note in routing.notes),
        settings.newton_schulz,
        2 * (settings.adjust_lr_fn == "update_norm"),
        traffic,
        "AdamW " + (f"under ZeRO-{zero.stage}" if zero.stage else "without ZeRO"),
        tp * pp * math.lcm(ep, cp),
        lambda ranks: {
            "tp": tp,
            "pp": pp,
            "ep": ep,
            "cp": cp,
            "dp": ranks // (tp * pp),
            "edp": ranks // (tp * pp * ep),
        },
        stages,
    )


def _zero_stage_calls(
    found: Sequence[Parameter], routing: Routing, settings: Settings, zero: Zero, dp: int, tp: int, ep: int
) -> Iterator[Call]:
    """Parameter groups as the optimizer makes them; experts under EP in groups of their own."""
    by_name = {p.name: p for p in found}
    for experts in (False, True):
        names = [p.name for p in found if (ep > 1 and shapes.is_expert(p.name)) is experts]
        for group in (
            parameter_groups([{"params": [(name, name) for name in names]}], routing, settings) if names else ()
        ):
            mine = set(group["params"])
            matrices: list[Matrix] = [m for m in routing.matrices if m.parameter in mine]
            label = "experts" if experts else "dense layers" if ep > 1 else "matrices"
            yield from zero_calls(
                label if group["use_muon"] else "embeddings, norms, biases",
                [by_name[name] for name in group["params"]],
                matrices,
                zero,
                dp // ep if experts else dp,
                tp,
                ep if experts else 1,
            )


def _hf_model(path: str) -> tuple[Any, str]:
    """The model of a config.json without memory, and what to call it.

    Raises:
        ValueError: where there is none, or transformers does not know its type.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise ValueError(
            f"--hf {path}: there is no {file}; allowed: a config.json or its folder; a model's on the hub must be "
            "downloaded first"
        )
    values = read_json(str(file), "--hf")
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise ValueError("--hf needs transformers: pip install transformers; or use --shapes") from None
    if "model_type" not in values:
        raise ValueError(f"--hf {path} has no model_type; allowed: the config.json of a causal language model")
    try:
        kind = values.pop("model_type")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    except Exception as error:  # whatever a model's code does not like about its config
        raise ValueError(f"--hf {path}: {type(error).__name__}: {error}; allowed: a causal language model") from None
    return model, f"{kind} ({path})"


def _deepspeed_config(config: Mapping[str, Any], zero_stage: int | None) -> tuple[Settings, Zero, Traffic]:
    """Muon's settings, the cut, and the bytes of the engine's own traffic.

    Raises:
        ValueError: with the key, its value and what is allowed.
    """
    sections = {}
    for key in ("optimizer", "zero_optimization", "tensor_parallel", "bf16", "fp16", "data_types"):
        sections[key] = config.get(key) or {}
        if not isinstance(sections[key], Mapping):
            raise ValueError(f"{key}={config[key]!r} in the DeepSpeed JSON; allowed: an object")
    optimizer, section = sections["optimizer"] or {"type": "Muon"}, sections["zero_optimization"]
    if str(optimizer.get("type", "")).lower() != "muon":
        raise ValueError(f'optimizer.type={optimizer.get("type")!r} in the DeepSpeed JSON; allowed: "Muon"')
    settings = Settings.from_dict({k: v for k, v in (optimizer.get("params") or {}).items() if v != "auto"})
    stage = section.get("stage", 0 if config else 1) if zero_stage is None else zero_stage
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ValueError(f"zero_optimization.stage={stage!r}; allowed: 0, 1, 2, 3")
    size = section.get("sub_group_size", "auto")
    size = Zero.sub_group_size if size == "auto" else size
    if not isinstance(size, (int, float)) or size < 1:
        raise ValueError(f"zero_optimization.sub_group_size={size!r}; allowed: a number from 1 on")
    if sections["tensor_parallel"].get("autotp_size", 0) > 1:
        raise ValueError(
            f"tensor_parallel.autotp_size={sections['tensor_parallel']['autotp_size']!r}; allowed: 1 here: AutoTP cuts "
            "live modules. Use --shapes with --tp, whose entries say how they are cut"
        )
    half = not config or any(sections[key].get("enabled") not in (None, False) for key in ("bf16", "fp16"))
    each, accumulated = 2 if half else 4, sections["data_types"].get("grad_accum_dtype")
    given = config.get("communication_data_type") or accumulated
    widths = {None: each, "fp32": 4, "fp16": 2, "bf16": 2, "bfp16": 2}
    if given not in widths:
        raise ValueError(f"communication_data_type={given!r}; allowed: {', '.join(k for k in widths if k)}")
    wide = stage == 1 and half and accumulated == "fp32"  # its BF16_Optimizer knows no alignment
    zero = Zero(
        stage,
        int(size),
        bool(section.get("round_robin_gradients", False)) and not wide,
        bool(section.get("parameter_alignment", False)) and not wide,
        each,
    )
    gradient = widths[given] * (2 if stage == 0 else 1)  # an all-reduce is a reduce-scatter and an all-gather
    return settings, zero, Traffic(gradient, each, {0: 0, 3: 2}.get(stage, 1))
