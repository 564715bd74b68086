"""Which parameters are matrices, which matrices a fused parameter holds, and why the rest goes to AdamW.

The paper's rule: matrices of the hidden layers get Muon; embeddings, the LM head, norms and biases get AdamW.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .layout import Matrix, Strided

#: Words in a name that say "table looked up by token or position" (DeepSpeed's own Muon knows "embed" and "lm_head").
EMBEDDING_WORDS = ("embed", "wte", "wpe")
#: Names of an output head, wherever it sits, and names that mean one only outside numbered blocks.
HEADS = {"lm_head", "embed_out", "output_layer"}
OUTER_HEADS = {"head", "output", "classifier", "score"}
#: Names of fused projections that the defaults take apart, all parts one after the other along the output dimension.
QKV_NAMES = {"qkv", "qkv_proj", "wqkv", "c_attn", "in_proj_weight", "w_pack"}
#: GPT-NeoX and BLOOM: q, k and v of one head, then of the next.
QKV_BY_HEAD_NAMES = {"query_key_value"}
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


def route(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    model: nn.Module | None = None,
    exclude: Sequence[str] = (),
    split: Mapping[str, Any] | None = None,
) -> Routing:
    """Decides for every parameter.

    Args:
        shapes: name -> full (unsharded) shape of each trainable parameter, in order.
        model: looked into for module types and its config; without it, names alone decide.
        exclude: shell-style patterns (``*.router.*``, or a part of the name) of parameters that go to AdamW.
        split: pattern -> how a fused projection is cut (see `SPLIT_HELP`); the first match wins over the defaults.

    Raises:
        ValueError: a pattern that matches nothing, or a split that does not fit a shape it matches.
    """
    split = dict(split or {})
    for key, patterns in (("exclude", exclude), ("split", split)):
        for pattern in patterns:
            if not any(_matches(name, pattern) for name in shapes):
                raise ValueError(
                    f"{key} pattern {pattern!r} matches no trainable parameter; allowed: a part of a name or a "
                    f"shell-style pattern. The names here are like {', '.join(list(shapes)[:5])}"
                )
    modules = _owners(model)
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    matrices: list[Matrix] = []
    adamw: dict[str, str] = {}
    notes: list[str] = []
    for name, shape in shapes.items():
        module = modules.get(name)
        why = _not_a_matrix(name, shape, module, exclude)
        if why is not None:
            adamw[name] = why
            continue
        rows, cols, transposed = _geometry(shape, module)
        batch = math.prod(shape) // (rows * cols)
        transposed = transposed or (batch > 1 and _stored_in_out(name, rows, cols, config))
        outputs = cols if transposed else rows
        asked = next((p for p in split if _matches(name, p)), None)
        if asked is not None:
            rule = _asked(name, shape, outputs, asked, split[asked])
        else:
            known = _default_rule(name, outputs, rows if transposed else cols, config)
            rule = known or Rule((outputs,))
            if known is None:
                notes.append(f"{name} looks like fused query, key and value but is kept whole; to cut it, set split")
        parts = _cut(name, batch, rows, cols, rule, transposed)
        if any(min(part.rows, part.cols) == 1 for part in parts):
            adamw[name] = "a vector"
        else:
            matrices += parts
    return Routing(tuple(matrices), adamw, dict(shapes), tuple(notes))


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or (not any(c in pattern for c in "*?[") and pattern in name)


def _owners(model: nn.Module | None) -> dict[str, nn.Module]:
    """Parameter name -> the module that holds it."""
    found: dict[str, nn.Module] = {}
    for prefix, module in model.named_modules() if model is not None else ():
        for name, _ in module.named_parameters(recurse=False):
            found[f"{prefix}.{name}" if prefix else name] = module
    return found


def _not_a_matrix(name: str, shape: tuple[int, ...], module: nn.Module | None, exclude: Iterable[str]) -> str | None:
    if any(_matches(name, pattern) for pattern in exclude):
        return "excluded"
    if len(shape) < 2:
        return "a vector"
    parts = name.split(".")
    owner = parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]
    if isinstance(module, nn.Embedding) or "Embedding" in type(module).__name__:
        return "embedding"
    if any(word in part for part in parts for word in EMBEDDING_WORDS) and "embed_out" not in parts:
        return "embedding"
    in_block = any(re.fullmatch(r"\d+", part) for part in parts)
    if owner in HEADS or (owner in OUTER_HEADS and not in_block):
        return "output head"
    return None


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
    return hidden == (rows if gate_or_up else cols)


def _default_rule(name: str, outputs: int, inputs: int, config: Any) -> Rule | None:
    """The cut of the fused projections known by name; None where the name is known but the sizes are not."""
    parts = name.lower().split(".")
    owner = parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]
    if owner in GATE_UP_NAMES and outputs % 2 == 0:
        if getattr(config, "model_type", None) == "gpt_oss":  # gate and up alternate
            return Rule((1, 1), outputs // 2)
        return Rule((outputs // 2,) * 2)
    if owner not in QKV_NAMES | QKV_BY_HEAD_NAMES:
        return Rule((outputs,))
    heads = int(getattr(config, "num_attention_heads", None) or getattr(config, "n_head", None) or 0)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    width, rest = divmod(outputs, heads + 2 * groups) if heads else (0, 1)
    if owner in QKV_BY_HEAD_NAMES:
        return Rule((width,) * 3, heads) if not rest and heads == groups else None
    if not rest:
        return Rule((heads * width, groups * width, groups * width))
    return Rule((inputs,) * 3) if not heads and outputs == 3 * inputs else None


def _asked(name: str, shape: tuple[int, ...], outputs: int, pattern: str, value: Any) -> Rule:
    """The rule a user wrote, checked against the shape."""
    where = f"split[{pattern!r}]={value!r} for {name} of shape {list(shape)}"

    def positive(number: Any) -> bool:
        return isinstance(number, int) and not isinstance(number, bool) and number > 0

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


def _cut(name: str, batch: int, rows: int, cols: int, rule: Rule, transposed: bool) -> list[Matrix]:
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
