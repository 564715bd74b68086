"""Sources of a model's parameters: Megatron's arguments, a Hugging Face config, or names and shapes in a JSON file."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import nn

from ..core.groups import parameter_groups
from ..core.layout import Partition
from ..core.orthogonalize import NewtonSchulz
from ..core.routing import check_heads, route
from ..core.settings import Settings
from ..megatron.routing import is_expert
from . import deepspeed_json, on_meta, shapes
from .calls import PlannedCall, Stage, StageModel, Zero, zero_calls
from .cost import Traffic
from .memory import Engine

#: Classes of transformers that build a model from its config, in the order in which they are asked.
MODELS = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM")


@dataclass(frozen=True)
class Model:
    """A model under an engine, which can be sharded for any number of ranks.

    Attributes:
        title: names the model and the engine.
        settings: Muon's settings, in one line.
        notes: what the plan assumes or leaves out.
        newton_schulz, scalars: the iteration; number of bf16 values that are sent with each update.
        traffic: the engine's own communication per element.
        baseline: name of AdamW under the same engine.
        unit: the number of ranks must be a multiple of this.
        sizes: for a number of ranks, the sizes of the parallel dimensions by their name.
        stages: for a number of ranks, the kinds of pipeline stages.
        engine: what the engine holds in a rank's memory.
        state: bytes of state of an element of a matrix, and of any other; None: as the calls say.
    """

    title: str
    settings: str
    notes: tuple[str, ...]
    newton_schulz: NewtonSchulz
    scalars: int
    traffic: Traffic
    baseline: str
    unit: int
    sizes: Callable[[int], Mapping[str, int]]
    stages: Callable[[int], list[Stage]]
    engine: Engine
    state: tuple[int, int] | None = None


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


def megatron(arguments: Sequence[str], parallel: Parallel, world: int, strict: bool = False) -> Model:
    """GPTModel under Megatron's distributed optimizer; `strict`: see `on_meta.load`."""
    flags = {"tensor-model-parallel-size": parallel.tp, "pipeline-model-parallel-size": parallel.pp}
    flags |= {"expert-model-parallel-size": parallel.ep, "context-parallel-size": parallel.cp}
    extra = [text for flag, size in flags.items() if size for text in (f"--{flag}", str(size))]
    args, settings = on_meta.load([*arguments, *extra], world, strict)
    kinds = on_meta.stages(args, settings)
    if settings.per_head:
        check_heads("--muon-split-qkv-per-head", [kind.routing.head_facts for kind in kinds])
    import megatron.core

    from ..megatron.qk_clip import setting_of

    clip = setting_of(args)
    clips = f", QK-Clip at {clip.threshold:g}" if clip is not None else ""

    def stages(ranks: int) -> list[Stage]:
        cut = on_meta.sizes(args, ranks)
        return [Stage(kind.numbers, ranks // cut["pp"], tuple(_megatron_calls(kind, ranks, cut))) for kind in kinds]

    cut, instances, half = on_meta.sizes(args), args.num_distributed_optimizer_instances, args.bf16 or args.fp16
    gradient = 4 if args.accumulate_allreduce_grads_in_fp32 or not half else 2
    return Model(
        f"GPTModel under Megatron-Core {megatron.core.__version__.partition('+')[0]}",
        settings.describe() + clips,
        (*settings.notes, *on_meta.assumptions(args)),
        settings.newton_schulz,
        0,
        Traffic(gradient, 2 if half else 4),
        "AdamW under Megatron's distributed optimizer",
        cut["pp"] * instances * math.lcm(cut["tp"] * cut["cp"], cut["etp"] * cut["ep"]),
        lambda ranks: on_meta.sizes(args, ranks),
        stages,
        Engine(
            weights=2 if half else 4,
            gradients=gradient,
            masters=(2 if settings.lower_bits else 4) if half else 0,  # in fp32 they are the weights
            masters_away=settings.offload_fraction * settings.frees,
            state_away=settings.offload_fraction,
            momentum_away=settings.state_bytes[0] if settings.offload else 0,
            copies=settings.copied_bytes(half),
        ),
        settings.state_bytes,
    )


def _megatron_calls(kind: on_meta.BuiltStage, ranks: int, cut: Mapping[str, int]) -> Iterator[PlannedCall]:
    for buffers in kind.buffers(ranks):
        parameters = tuple(kind.parameters[number] for number in buffers.parameters)
        names = {p.name for p in parameters}
        yield PlannedCall(
            "experts" if buffers.experts else "dense layers",
            parameters,
            tuple(m for m in kind.routing.matrices if m.parameter in names),
            len(buffers.held),
            buffers.held.__getitem__,
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
    tp, pp, ep, cp = parallel.sizes
    read = deepspeed_json.read(config, zero_stage, ep)
    settings, zero = read.settings, read.zero
    if hf is not None:
        title, kinds = _hf_stage(hf, settings, parallel)
    else:
        title = str(shapes_file)
        of_stages = shapes.stages(read_json(title, "--shapes"), tp, pp, ep)
        kinds = [_stage_model(numbers, found, settings) for numbers, found in of_stages.items()]

    if settings.per_head_muon:
        check_heads("per_head_muon=True", [kind.routing.head_facts for kind in kinds])

    def stages(ranks: int) -> list[Stage]:
        dp = ranks // (tp * pp)
        calls = [tuple(_zero_stage_calls(kind, settings, zero, dp, tp, ep)) for kind in kinds]
        return [Stage(kind.numbers, ranks // pp, of_kind) for kind, of_kind in zip(kinds, calls)]

    def sizes(ranks: int) -> dict[str, int]:
        dp = ranks // (tp * pp)
        return {"tp": tp, "pp": pp, "ep": ep, "cp": cp, "dp": dp, "edp": dp // ep}

    ways = {0: "without ZeRO", 1: "ZeRO-1", 2: "ZeRO-2", 3: "ZeRO-3"}
    return Model(
        f"{title} under DeepSpeed, {ways[zero.stage]}",
        settings.describe(),
        (*settings.notes, *(note for kind in kinds for note in kind.routing.notes)),
        settings.newton_schulz,
        2 * (settings.adjust_lr_fn == "update_norm"),
        read.traffic,
        "AdamW " + (f"under ZeRO-{zero.stage}" if zero.stage else "without ZeRO"),
        tp * pp * math.lcm(ep, cp),
        sizes,
        stages,
        read.engine,
        (settings.momentum_type.itemsize, 2 * zero.moment_bytes),
    )


def _stage_model(
    numbers: tuple[int, ...], found: Sequence[Partition], settings: Settings, model: nn.Module | None = None
) -> StageModel:
    whole = {p.name: p.shape for p in found}
    routing = route(whole, model=model, exclude=settings.exclude, split=settings.split, per_head=settings.per_head_muon)
    return StageModel(numbers, tuple(found), routing)


def _hf_stage(path: str, settings: Settings, parallel: Parallel) -> tuple[str, list[StageModel]]:
    """What to call a Hugging Face model, and its only stage."""
    tp, pp, ep, _ = parallel.sizes
    if (tp, pp, ep) != (1, 1, 1):
        raise ValueError(
            f"--tp {tp} --pp {pp} --ep {ep} with --hf; allowed: 1, since a Hugging Face model does not say how it "
            "is cut; use --shapes, whose entries say it, or Megatron's arguments"
        )
    model, title, left_out = _hf_model(path)
    found = [Partition.of(name, p.shape) for name, p in model.named_parameters() if p.requires_grad]
    stage = _stage_model((0,), found, settings, model)
    notes = (*stage.routing.notes, *left_out)
    return title, [replace(stage, routing=replace(stage.routing, notes=notes))]


def _zero_stage_calls(
    kind: StageModel, settings: Settings, zero: Zero, dp: int, tp: int, ep: int
) -> Iterator[PlannedCall]:
    """Parameter groups as the optimizer makes them; experts under EP in groups of their own."""
    by_name = {p.name: p for p in kind.parameters}
    for experts in (False, True):
        names = [name for name in by_name if (ep > 1 and is_expert(name)) is experts]
        pairs = {"params": [(name, name) for name in names]}
        for group in parameter_groups([pairs], kind.routing, settings) if names else ():
            mine = set(group["params"])
            label = "experts" if experts else "dense layers" if ep > 1 else "matrices"
            yield from zero_calls(
                label if group["use_muon"] else "embeddings, norms, biases",
                [by_name[name] for name in group["params"]],
                [m for m in kind.routing.matrices if m.parameter in mine],
                zero,
                dp // ep if experts else dp,
                tp,
                ep if experts else 1,
            )


def _hf_model(path: str) -> tuple[Any, str, list[str]]:
    """The model of a config.json without memory, what to call it, and notes on what it was built without.

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
        import transformers
        from transformers import CONFIG_MAPPING, AutoConfig
    except ImportError:
        raise ValueError("--hf needs transformers: pip install transformers; or use --shapes") from None
    if "model_type" not in values:
        raise ValueError(f"--hf {path} has no model_type; allowed: the config.json of a language model")
    kind = values.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"--hf {path}: transformers {transformers.__version__} does not know model_type {kind!r}; allowed: a type "
            "that it knows (pip install --upgrade transformers), or --shapes with the names and shapes of the model"
        )
    architectures = values.get("architectures") or ()
    unknown = [name for name in architectures if not hasattr(transformers, name)]
    try:
        config = AutoConfig.for_model(kind, **values)
        with torch.device("meta"):
            model = _built(config, architectures)
    except Exception as error:  # whatever a model's code does not like about its config
        why = shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
        raise ValueError(f"--hf {path}: {why}; allowed: the config.json of a language model, or --shapes") from None
    built = type(model).__name__
    found = [f"planned as {built}: transformers has no {name}" for name in unknown]
    found += [*_not_in(model, config), *_multi_token_layers(model, values.get("num_nextn_predict_layers"))]
    return model, f"{kind} ({path})", found


def _built(config: Any, architectures: Sequence[str]) -> Any:
    """The class that the config names, or the first that transformers has for its kind."""
    import transformers

    named = next((found for name in architectures if (found := getattr(transformers, name, None))), None)
    if named is not None:
        own = config if isinstance(config, named.config_class) else config.get_text_config()
        return named._from_config(own)
    factories: list[Any] = [getattr(transformers, name) for name in MODELS]
    factory = next((each for each in factories if type(config) in each._model_mapping), None)
    if factory is None:
        raise ValueError("it is not a language model")
    return factory.from_config(config)


def _not_in(model: nn.Module, config: Any) -> list[str]:
    """Parts of a composite config (a vision tower) that the model was built without."""
    built = {type(module.config) for module in model.modules() if hasattr(module, "config")}
    parts = {key: value for key, value in vars(config).items() if key.endswith("_config") and hasattr(value, "to_dict")}
    return [f"without {key}: {type(model).__name__} does not have it" for key in parts if type(parts[key]) not in built]


def _multi_token_layers(model: nn.Module, layers: int | None) -> list[str]:
    """Those for multi-token prediction, which transformers mostly does not build."""
    if not layers or any("mtp" in name or "nextn" in name for name, _ in model.named_parameters()):
        return []
    return [f"without the {layers} layers of num_nextn_predict_layers: {type(model).__name__} has none"]
