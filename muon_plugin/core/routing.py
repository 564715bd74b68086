"""Which parameters are matrices, which matrices a fused parameter holds, and why the rest goes to AdamW.

The paper's rule: matrices of the hidden layers get Muon; embeddings, the LM head, norms and biases get AdamW.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import Any

from torch import nn

from .checks import is_whole
from .layout import Matrix, Strided

#: Words in the last two parts of a name that say "looked up by token or position".
EMBEDDING_WORDS = ("embed", "wte", "wpe")
#: Names of an output head wherever it sits, and names that mean one only outside numbered blocks.
HEADS = {"lm_head", "lm_heads", "embed_out", "output_layer", "qa_outputs"}
OUTER_HEADS = {"head", "output", "classifier", "score", "fc", "proj_out"}
#: Tables and vectors that have two or more dimensions: the last part of the name ends or starts so.
NOT_MATRICES = re.compile(r"(bias|_table|_tokens?|A_log)$|^rel_pos")
#: Fused query, key and value, one after the other along the output dimension, in plain torch and timm models ...
QKV_NAMES = {"qkv", "qkv_proj", "wqkv", "c_attn", "in_proj_weight", "query_key_value", "w_pack"}
#: ... and in models with a config: those whose code was read. Others use the same names for other layouts.
QKV_IN_ORDER = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "phi3", "mpt", "dbrx", "modernbert"}
#: q, k and v of one head, then of the next.
QKV_BY_HEAD = {"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon"}
GATE_UP_NAMES = {"gate_up_proj", "w12", "gate_up"}

SPLIT_HELP = (
    'sizes along the output dimension ([512, 256, 256]), a number of equal parts (3), {"sizes": [...], "groups": n} '
    'for sizes that repeat n times (interleaved by head or query group), or "whole"'
)


@dataclass(frozen=True)
class Rule:
    """How the output dimension of a fused parameter is cut: `sizes`, repeated `groups` times."""

    sizes: tuple[int, ...]
    groups: int = 1


@dataclass(frozen=True)
class Routing:
    """Every trainable parameter's way: its matrices for Muon, or the reason why AdamW has it."""

    matrices: tuple[Matrix, ...]
    adamw: Mapping[str, str]  # name -> why
    shapes: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...] = field(default=())

    def describe(self) -> list[str]:
        """One line a parameter, for comparing ranks."""
        ways = dict(self.adamw)
        for matrix in self.matrices:
            ways[matrix.parameter] = ways.get(matrix.parameter, "") + f"[{matrix.rows}x{matrix.cols}]"
        return [f"{name} {list(shape)}: {ways[name]}" for name, shape in self.shapes.items()]

    def joined(self, more: Routing) -> Routing:
        """The ways of both."""
        return Routing(
            self.matrices + more.matrices,
            {**self.adamw, **more.adamw},
            {**self.shapes, **more.shapes},
            tuple(dict.fromkeys(self.notes + more.notes)),
        )

    def renamed(self, names: Mapping[str, str]) -> Routing:
        """The same ways under other names; `names` has a name for every parameter."""
        return replace(
            self,
            matrices=tuple(
                replace(m, name=names[m.parameter] + m.name[len(m.parameter) :], parameter=names[m.parameter])
                for m in self.matrices
            ),
            adamw={names[name]: why for name, why in self.adamw.items()},
            shapes={names[name]: shape for name, shape in self.shapes.items()},
        )


def route(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    model: nn.Module | None = None,
    exclude: Sequence[str] = (),
    split: Mapping[str, Any] | None = None,
    layers: Mapping[str, Any] | None = None,
    complete: bool = True,
) -> Routing:
    """Decides for every parameter.

    Args:
        shapes: name -> full (unsharded) shape of each trainable parameter, in order.
        model: looked into for module types and its config; without it, names alone decide.
        exclude: shell-style patterns (``*.router.*``, or a part of the name) of parameters that go to AdamW.
        split: pattern -> how a fused projection is cut (see `SPLIT_HELP`); the first match wins over the defaults.
        layers: number -> class of all layers, where names begin with their number and `model` holds only some of them;
            by default those of `model`. The last ones, of classes that occur once, are no blocks and may be heads.
        complete: whether these are all parameters, so that a pattern which none of them matches is a mistake.

    Raises:
        ValueError: a pattern that matches nothing, or a split that does not fit a shape it matches.
    """
    split = dict(split or {})
    modules, heads, names = _modules_of(model, shapes), _tables(model), _all_names(model)
    if complete:
        _check_patterns(shapes, exclude, split, names)
    ends = _last_layers(layer_types(model) if layers is None else layers)
    matrices: list[Matrix] = []
    adamw: dict[str, str] = {}
    notes: list[str] = []
    for name, shape in shapes.items():
        module, config = modules.get(name, (None, None))
        known = [(alias, modules.get(alias, (None, None))[0]) for alias in names.get(name, [name])]
        reasons = (_not_a_matrix(alias, shape, of_alias, exclude, ends) for alias, of_alias in known)
        why = heads.get(name) or next(filter(None, reasons), None)
        if why is not None:
            adamw[name] = why
            continue
        stored = _stored(name, shape, module, config)
        asked = _first_match(name, split)
        rule = _known_rule(name, stored, config) if asked is None else _asked(name, shape, stored, asked, split[asked])
        if rule is None:
            notes.append(f"{name} looks like a fused projection of an unknown layout and is kept whole; see split")
            rule = Rule((stored.outputs,))
        parts = cut(name, stored.batch, stored.rows, stored.cols, rule, stored.transposed)
        if all(min(part.rows, part.cols) > 1 for part in parts):
            matrices += parts
        elif asked is None or min(stored.rows, stored.cols) == 1:
            adamw[name] = "a vector"
        else:
            raise ValueError(f"split[{asked!r}]={split[asked]!r} for {name}: a part of one row is not a matrix")
    if complete:
        _check_splits_cut(split, matrices)
    return Routing(tuple(matrices), adamw, dict(shapes), tuple(notes))


def _check_patterns(
    shapes: Iterable[str], exclude: Sequence[str], split: Iterable[str], all_names: Mapping[str, Sequence[str]]
) -> None:
    """Refuses a pattern that matches no parameter."""
    names = [alias for name in shapes for alias in all_names.get(name, [name])]
    for key, patterns in (("exclude", exclude), ("split", split)):
        for pattern in patterns:
            if not any(_matches(name, pattern) for name in names):
                raise ValueError(
                    f"{key} pattern {pattern!r} matches no trainable parameter; allowed: a part of a name or a "
                    f"shell-style pattern. The names here are like {', '.join(names[:5])}"
                )


def _check_splits_cut(split: Mapping[str, Any], matrices: Sequence[Matrix]) -> None:
    """Refuses a split pattern that decides about no matrix."""
    used = {_first_match(matrix.parameter, split) for matrix in matrices}
    for pattern in split:
        if pattern not in used:
            raise ValueError(
                f"split[{pattern!r}]={split[pattern]!r} cuts nothing: what it matches goes to AdamW, or an earlier "
                "pattern matches it first; allowed: patterns of parameters that go to Muon"
            )


def _first_match(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that matches wins."""
    return next((pattern for pattern in patterns if _matches(name, pattern)), None)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or (not any(c in pattern for c in "*?[") and pattern in name)


def _modules_of(model: nn.Module | None, shapes: Iterable[str]) -> dict[str, tuple[nn.Module, Any]]:
    """`_owners`, where the model holds all these parameters; empty without a model.

    Raises:
        ValueError: for a parameter that the model does not have.
    """
    modules = _owners(model)
    missing = sorted(set(shapes) - set(modules))
    if model is not None and missing:
        raise ValueError(f"model has no parameter {missing[0]}; allowed: the module whose named_parameters() these are")
    return modules


def _owners(model: nn.Module | None) -> dict[str, tuple[nn.Module, Any]]:
    """Parameter name -> the module that holds it, and the config nearest above it (a vision tower has its own)."""
    found: dict[str, tuple[nn.Module, Any]] = {}
    configs: dict[str, Any] = {}
    for prefix, module in model.named_modules(remove_duplicate=False) if model is not None else ():
        above = configs.get(prefix.rpartition(".")[0]) if prefix else None
        config = getattr(module, "config", None) or above
        configs[prefix] = config
        if config is not None and hasattr(config, "get_text_config"):
            config = config.get_text_config()
        for name, _ in module.named_parameters(recurse=False):
            found[f"{prefix}.{name}" if prefix else name] = module, config
    return found


def layer_types(model: nn.Module | None) -> dict[str, type[nn.Module]]:
    """Number -> class, of a model that is a sequence of layers: then names begin with a layer's number."""
    return {name: type(layer) for name, layer in model.named_children() if name.isdigit()} if model is not None else {}


def _last_layers(layers: Mapping[str, Any]) -> set[str]:
    """The numbers of the layers after the last block."""
    numbers, kinds = list(layers), list(layers.values())
    return set(takewhile(lambda number: kinds.count(layers[number]) == 1, reversed(numbers)))


def _all_names(model: nn.Module | None) -> dict[str, list[str]]:
    """First name of each parameter -> all its names: a tied weight is an embedding, or a head, by any of them."""
    found: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False) if model is not None else ():
        found.setdefault(id(p), []).append(name)
    return {names[0]: names for names in found.values()}


def _tables(model: nn.Module | None) -> dict[str, str]:
    """What a Hugging Face model itself calls its embeddings and its output head."""
    found: dict[int, str] = {}
    for get, why in (("get_output_embeddings", "output head"), ("get_input_embeddings", "embedding")):
        try:
            module = getattr(model, get)()
        except (AttributeError, NotImplementedError, TypeError):
            # AttributeError: no model, or not of transformers. NotImplementedError: of transformers, without such a
            # module. TypeError: the model uses the name for something else. Names and module types then decide alone.
            continue
        found |= {id(p): why for p in (module.parameters() if isinstance(module, nn.Module) else ())}
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found} if model is not None else {}


def _owner(name: str) -> str:
    """The name of the module, or of the bare parameter, that holds the weight."""
    parts = name.split(".")
    return parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]


def _not_a_matrix(
    name: str, shape: tuple[int, ...], module: nn.Module | None, exclude: Iterable[str], ends: Collection[str]
) -> str | None:
    if any(_matches(name, pattern) for pattern in exclude):
        return "excluded"
    if len(shape) < 2 or 0 in shape:
        return "a vector"
    parts = name.split(".")
    if isinstance(module, nn.Embedding) or "Embedding" in type(module).__name__:
        return "embedding"
    if any(word in part for part in parts[-2:] for word in EMBEDDING_WORDS) and "embed_out" not in parts:
        return "embedding"
    if NOT_MATRICES.search(parts[-1]):
        return "a table or a bias"
    outside = [*takewhile(lambda part: not part.isdigit(), parts[1:] if parts[0] in ends else parts)]
    if set(parts) & HEADS or set(outside) & OUTER_HEADS:
        return "output head"
    experts = "expert" in name.lower() or "expert" in type(module).__name__.lower()
    if len(shape) > 2 and not (experts or isinstance(module, nn.modules.conv._ConvNd)):
        # A batch of matrices and a kernel look alike; by names alone, four dimensions can only be a kernel.
        return None if module is None and len(shape) > 3 else f"{len(shape)} dimensions, neither a kernel nor experts"
    return None


@dataclass(frozen=True)
class Stored:
    """How a parameter holds matrices: `batch` of (rows, cols), (inputs, outputs) if `transposed`."""

    batch: int
    rows: int
    cols: int
    transposed: bool

    @property
    def outputs(self) -> int:
        return self.cols if self.transposed else self.rows

    @property
    def inputs(self) -> int:
        return self.rows if self.transposed else self.cols


def _stored(name: str, shape: tuple[int, ...], module: nn.Module | None, config: Any) -> Stored:
    rows, cols, transposed = _geometry(shape, module)
    batch = math.prod(shape) // (rows * cols)
    return Stored(batch, rows, cols, transposed or (batch > 1 and _stored_in_out(name, rows, cols, config)))


def _geometry(shape: tuple[int, ...], module: nn.Module | None) -> tuple[int, int, bool]:
    """(rows, cols, stored in-out) of one matrix of the parameter; leading dimensions are a batch."""
    if isinstance(module, nn.modules.conv._ConvNd):
        # A kernel is the matrix (outputs, inputs x window); a grouped convolution is one matrix a group. A transposed
        # convolution holds (inputs, outputs, window): its rows are inputs.
        return shape[0] // module.groups, math.prod(shape[1:]), module.transposed
    if module is None and len(shape) > 3:
        return shape[0], math.prod(shape[1:]), False  # by names alone, four dimensions can only be a kernel
    return shape[-2], shape[-1], type(module).__name__ == "Conv1D"


def _stored_in_out(name: str, rows: int, cols: int, config: Any) -> bool:
    """Whether batched expert weights are stored (in, out), told by the model's hidden size."""
    hidden = getattr(config, "hidden_size", None)
    if hidden is None or rows == cols:
        return False
    gate_or_up = any(word in name for word in ("gate", "up"))
    return bool(hidden == (rows if gate_or_up else cols))


def _known_rule(name: str, stored: Stored, config: Any) -> Rule | None:
    """The default cut of a parameter; None where it looks fused and the layout is not known."""
    square_experts = stored.batch > 1 and stored.rows == stored.cols  # whether stored (in, out), nobody can tell
    if square_experts and _owner(name).lower() in GATE_UP_NAMES:
        return None
    return _default_rule(name, stored.outputs, stored.inputs, config)


def _default_rule(name: str, outputs: int, inputs: int, config: Any) -> Rule | None:
    """The cut of the fused projections known by name; None where the name is known but the sizes are not."""
    owner = _owner(name).lower()
    if owner in GATE_UP_NAMES and outputs % 2 == 0:
        if getattr(config, "model_type", None) == "gpt_oss":  # gate and up alternate
            return Rule((1, 1), outputs // 2)
        return Rule((outputs // 2,) * 2)
    if owner not in QKV_NAMES:
        return Rule((outputs,))
    model_type = getattr(config, "model_type", None)
    if model_type is None and owner == "query_key_value":
        return None  # by head in most models
    if owner in ("in_proj_weight", "qkv") or model_type is None:  # torch's attention, vision transformers, plain models
        heads = groups = 0
    elif model_type in QKV_IN_ORDER | QKV_BY_HEAD:
        heads = int(getattr(config, "num_attention_heads", None) or getattr(config, "n_head", None) or 0)
        groups = int(getattr(config, "num_key_value_heads", None) or heads)
    else:
        return None
    if not heads:
        return Rule((inputs,) * 3) if outputs == 3 * inputs else None
    width, rest = divmod(outputs, heads + 2 * groups)
    if rest:
        return None
    if model_type in QKV_BY_HEAD:
        return Rule((width,) * 3, heads) if heads == groups else None
    return Rule((heads * width, groups * width, groups * width))


def _asked(name: str, shape: tuple[int, ...], stored: Stored, pattern: str, value: Any) -> Rule:
    """The rule a user wrote, checked against the shape."""
    outputs = stored.outputs
    where = f"split[{pattern!r}]={value!r} for {name} of shape {list(shape)}"

    def positive(number: Any) -> bool:
        return is_whole(number) and bool(number > 0)

    if value == "whole":
        return Rule((outputs,))
    if positive(value):
        if outputs % value:
            raise ValueError(f"{where}: {outputs} outputs cannot be cut in {value} equal parts; allowed: {SPLIT_HELP}")
        return Rule((outputs // value,) * value)
    sizes, groups = value, 1
    if isinstance(value, Mapping):
        if set(value) - {"sizes", "groups"} or "sizes" not in value:
            raise ValueError(f"{where}: the keys are {sorted(map(str, value))}; allowed: {SPLIT_HELP}")
        sizes, groups = value["sizes"], value.get("groups", 1)
    if not (isinstance(sizes, (list, tuple)) and sizes and all(map(positive, sizes)) and positive(groups)):
        raise ValueError(f"{where} is not a split; allowed: {SPLIT_HELP}")
    if sum(sizes) * groups != outputs:
        raise ValueError(f"{where}: the sizes add up to {sum(sizes) * groups}, not to its {outputs} outputs")
    return Rule(tuple(sizes), groups)


def cut(name: str, batch: int, rows: int, cols: int, rule: Rule, transposed: bool) -> list[Matrix]:
    """The matrices of one parameter: each part of the rule, for each entry of the batch."""
    found = []
    period, several = sum(rule.sizes), batch * len(rule.sizes) > 1
    for entry in range(batch):
        base = entry * rows * cols
        begin = 0
        for number, size in enumerate(rule.sizes):
            label = ",".join(str(i) for i, n in ((entry, batch), (number, len(rule.sizes))) if n > 1)
            outputs = size * rule.groups
            # Stored (in, out), a part is columns: `groups` runs in each of `rows` rows, all one period apart.
            unit, count = (1, rows * rule.groups) if transposed else (cols, rule.groups)
            run, stride = size * unit, period * unit
            if run == stride:
                run, count = run * count, 1
            where = Strided(base + begin * unit, run, stride, count)
            shape = (rows, outputs) if transposed else (outputs, cols)
            found.append(Matrix(f"{name}[{label}]" if several else name, name, *shape, where, transposed))
            begin += size
    return found
