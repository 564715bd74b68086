"""Where the query, key and value heads of an attention layer lie: which outputs of which parameter are which head.

For modules of torch, transformers and what is built like them; an engine with its own modules describes these by the
same classes. What a module or its config does not say is not guessed: the numbers of heads and their widths must make
up the outputs exactly (DeepSpeed 0.19.8's ``per_head_muon`` asks the same).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from .cutting import Rule, Stored
from .fused import known_rule
from .places import Place

QUERY, KEY, VALUE, GATE = "query", "key", "value", "gate"


@dataclass(frozen=True)
class Part:
    """Heads of one kind, one after the other along the outputs of a projection.

    Attributes:
        role: `QUERY`, `KEY`, `VALUE`, or `GATE` (on the outputs of the attention, head by head).
        width: outputs of one head.
        heads: how many.
        rotary: the last so many outputs of each head that alone have a rotary position embedding: of latent attention,
            where a group has one head.
    """

    role: str
    width: int
    heads: int = 1
    rotary: int = 0


@dataclass(frozen=True)
class Head:
    """One head: `width` outputs from `start` on. `number` counts the heads of its role, query group by query group."""

    role: str
    number: int
    start: int
    width: int
    rotary: int = 0


@dataclass(frozen=True)
class Heads:
    """The outputs of a projection as heads: the parts in their order, and that `groups` times.

    Examples, for 8 query and 2 key and value heads of 64 outputs:
        A projection of the keys alone: ``Heads((Part(KEY, 64, 2),))``.
        All of them in one parameter, in order: ``Heads((Part(QUERY, 64, 8), Part(KEY, 64, 2), Part(VALUE, 64, 2)))``.
        By query group: ``Heads((Part(QUERY, 64, 4), Part(KEY, 64), Part(VALUE, 64)), groups=2)``.

    Attributes:
        parts: of one group.
        groups: how often they repeat.
        softmax: whether they are those of a softmax attention, which has logits.
    """

    parts: tuple[Part, ...]
    groups: int = 1
    softmax: bool = True

    @property
    def outputs(self) -> int:
        return self.groups * sum(part.heads * part.width for part in self.parts)

    @property
    def by_head(self) -> Rule:
        """Each head as a matrix of its own."""
        return Rule(tuple(part.width for part in self.parts for _ in range(part.heads)) * self.groups)

    @property
    def by_role(self) -> Rule:
        """Queries, keys, values as one matrix each; of latent attention also W_UQ and W_QR (DeepSeek-V2's names)."""
        sizes = []
        for part in self.parts:
            sizes += (
                [part.heads * part.width - part.rotary, part.rotary] if part.heads == 1 else [part.heads * part.width]
            )
        return Rule(tuple(size for size in sizes if size), self.groups)

    def __iter__(self) -> Iterator[Head]:
        """All heads, in the order of the outputs."""
        start, seen = 0, Counter[str]()
        for _ in range(self.groups):
            for part in self.parts:
                for _ in range(part.heads):
                    yield Head(part.role, seen[part.role], start, part.width, part.rotary)
                    start, seen[part.role] = start + part.width, seen[part.role] + 1

    def describe(self, inputs: int) -> str:
        """``32 query heads of 128x4096, 8 key and 8 value heads of 64x4096``."""
        shapes: dict[int, dict[str, int]] = {}
        for part in self.parts:
            of_width = shapes.setdefault(part.width, {})
            of_width[part.role] = of_width.get(part.role, 0) + part.heads * self.groups
        found = []
        for width, counts in shapes.items():
            *before, last = [f"{count} {role}" for role, count in counts.items()]
            named = f"{', '.join(before)} and {last}" if before else last
            found.append(f"{named} head{'s' * (sum(counts.values()) > 1)} of {width}x{inputs}")
        return ", ".join(found)


#: Layers that project to the heads of one role, as their names are in most models, in lower case.
SEPARATE = (
    (QUERY, r"q|wq|q_(proj|lin|linear|attn|b_proj|proj_weight)|query(_proj|_global)?|to_q|project_q"),
    (KEY, r"k|wk|k_(proj|lin|linear|proj_weight)|key(_proj|_global)?|to_k|project_k"),
    (VALUE, r"v|wv|v_(proj|lin|linear|proj_weight)|value(_proj|_global)?|to_v|project_v"),
)
#: Layers that hold several roles, (layer, class of the block, their order); `fused.known_rule` knows the sizes.
TOGETHER = (
    ("qkv_proj", "CodeGen", (QUERY, VALUE, KEY)),
    ("in_proj", "Deberta|DisentangledSelfAttention", (QUERY, KEY, VALUE)),
    ("proj", "EsmFoldSelfAttention", (QUERY, KEY, VALUE)),
    ("kv_proj|to_kv", "JetMoe|GraniteSpeech|Evolla", (KEY, VALUE)),
    (r"w?qkv|w_pack|qkv_(proj|linear)|c_attn|att_proj|in_proj_weight|query_key_value", "", (QUERY, KEY, VALUE)),
)
#: Up-projections of multi-head latent attention, where the block has the sizes.
LATENT = r"q_b_proj|q_proj|q_gate_proj|kv_b_proj"
#: Query and its gate, head by head, in one layer.
GATED_QUERY = (r"q_proj", r"Qwen3Next|Qwen3_5|Qwen4Exp")
#: Linear attention whose own numbers of heads say how it is cut (Kimi Delta Attention; DeepSpeed #8436).
DELTA = r"Kimi(Linear)?DeltaAttention$"
#: What an attention is called, and what has heads of another geometry (DeepSpeed #8420): (class, layers, why).
ATTENTION = re.compile(r"Att(entio)?n|MHA|MLA$|MultiHead", re.IGNORECASE)
#: Names that mean a projection to heads in every class.
DISTINCT = r"w?[qkv]_proj(_weight)?|w[qkv]|w?qkv|qkv_proj|q_b_proj"
OTHERS = (
    (r"\w*Indexer", r"w[qk](_b)?|q_b_proj|kv_proj|index_qk_proj", "an indexer scores tokens by heads of its own"),
    (
        r"(?!KimiLinearAtt)\w*(Delta|Lightning|LinearAtt|xLSTM|Rwkv|RecurrentBlock)",
        r"(q|k|v|qkv|query|key|value)(_proj)?|qkv_opreact|in_proj(_qkvz?)?",
        "linear attention has heads of its own",
    ),
    (r"\w*Mamba|FalconH1Mixer|Bamba\w*Mixer|GraniteMoeHybrid\w*Mamba", "in_proj", "a state space has heads of its own"),
    (r"\w*Channel\w*Att", "qkv", "its heads are channels of the image"),
)
UNKNOWN = "neither its module nor the config says how its outputs are heads"
VECTORS = "a head of one output is a vector"

#: What the numbers of heads and the outputs of one are called, in modules and in configs.
_QUERIES = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_q_heads", "num_query_heads", "heads", "nhead")
_SHARED = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "num_kv", "kv_heads")
_WIDTHS = (
    "head_dim",
    "attention_head_size",
    "head_size",
    "key_value_proj_dim",
    "d_head",
    "dim_head",
    "d_kv",
    "hidden_size_per_attention_head",
)
_VALUE_WIDTHS = ("v_head_dim", "value_head_dim", "head_v_dim")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "embed_dim")


def known_heads(place: Place, stored: Stored, tp: int = 1) -> Heads | str | None:
    """Which outputs of a parameter are which head.

    Args:
        place: where the parameter is.
        stored: how it is stored, whole.
        tp: in so many parts tensor parallelism has cut it; its module may count the heads of one (as under AutoTP).

    Returns:
        The heads; or why they cannot be told, of what looks like a projection to heads; None for everything else, and
        for the parameters of adapters, whatever they adapt.
    """
    attribute = place.attribute.lower()
    if place.tuner is not None:
        return None
    if place.block is None:  # by names alone
        return UNKNOWN if roles_of(attribute, "Attention") else None
    kind = type(place.block).__name__.removeprefix("Parametrized")
    if re.match(DELTA, kind) and (roles := roles_of(attribute, kind)):
        return _checked(_by_role(place, stored, roles, tp, softmax=False), stored)
    for blocks, layers, why in OTHERS:
        if re.match(blocks, kind) and re.fullmatch(layers, attribute):
            return why
    if re.fullmatch(LATENT, attribute) and (latent := _latent(place, attribute, stored, tp)) is not None:
        return _checked(latent, stored)
    if attribute in ("kv_b_proj", "q_gate_proj"):
        return UNKNOWN
    roles = roles_of(attribute, kind)
    if not roles or not (ATTENTION.search(kind) or re.fullmatch(DISTINCT, attribute)):
        return None
    if re.fullmatch(GATED_QUERY[0], attribute) and re.match(GATED_QUERY[1], kind):
        return _checked(_gated(place, stored, tp) or _by_role(place, stored, roles, tp), stored)
    return _checked(_by_role(place, stored, roles, tp), stored)


def _checked(found: Heads | None, stored: Stored) -> Heads | str:
    if found is None or found.outputs != stored.outputs or not stored.told:
        return UNKNOWN
    return VECTORS if any(part.width == 1 for part in found.parts) else found


def roles_of(attribute: str, kind: str) -> tuple[str, ...]:
    """What a layer of this name, in a block of this class, projects to; nothing for other layers."""
    for role, layers in SEPARATE:
        if re.fullmatch(layers, attribute):
            return (role,)
    for layers, blocks, roles in TOGETHER:
        if re.fullmatch(layers, attribute) and re.match(blocks, kind):
            return roles
    return ()


def _by_role(place: Place, stored: Stored, roles: Sequence[str], tp: int, softmax: bool = True) -> Heads | None:
    """The parts of `known_rule` in heads of one width."""
    rule = Rule((stored.outputs,)) if len(roles) == 1 else known_rule(place, stored)
    if rule is None:
        return None
    if len(rule.sizes) == 2 and len(roles) == 3:  # cross attention
        roles = (KEY, VALUE)
    if len(rule.sizes) != len(roles):
        return None
    # In a fused projection the first role's heads say the width of all.
    first = _heads_of(place, roles[0], rule.sizes[0] * rule.groups, tp)
    if first is None or any(size % first.width for size in rule.sizes):
        return None
    parts = tuple(Part(role, first.width, size // first.width) for role, size in zip(roles, rule.sizes))
    return Heads(parts, rule.groups, softmax)


def _heads_of(place: Place, role: str, outputs: int, tp: int) -> Part | None:
    """The only number and width of heads that make up the outputs, by what the module says, then its config too."""
    config, own = _config(place), _numbers((place.block,), _WIDTHS)
    of_config = _numbers((config,), _QUERIES)
    by_default = {h // n for h, n in product(_numbers((config,), _HIDDEN), of_config) if h % n == 0}
    for sources, widths in (((place.block,), set[int]()), ((place.block, config), by_default)):
        queries, widths = _numbers(sources, _QUERIES), widths | _numbers(sources, _WIDTHS)
        if role == VALUE:
            widths |= _numbers(sources, _VALUE_WIDTHS)
        counts = queries if role == QUERY else _shared(sources, queries)
        counts |= {count * tp for count in counts}
        found = {(count, width) for count, width in product(counts, widths) if count * width == outputs}
        if found:
            (count, width), *others = found
            return None if others else Part(role, width, count)
    if tp > 1 and len(own) == 1 and outputs % (width := own.pop()) == 0:  # AutoTP leaves the width, not the number
        return Part(role, width, outputs // width)
    queries = _numbers((place.block,), _QUERIES)
    counts = queries if role == QUERY else _shared((place.block,), queries)
    # A module without a config that says how many heads it has, and not how wide they are.
    if tp == 1 and not of_config and not own and len(counts) == 1 and outputs % (count := counts.pop()) == 0:
        return Part(role, outputs // count, count)
    return None


def _shared(sources: Sequence[Any], queries: set[int]) -> set[int]:
    """How many heads of keys and of values there may be."""
    found = _numbers(sources, _SHARED)
    found |= {n // each for n, each in product(queries, _numbers(sources, ("num_key_value_groups",))) if n % each == 0}
    return found or queries


def _latent(place: Place, attribute: str, stored: Stored, tp: int) -> Heads | None:
    """Of multi-head latent attention; None in other blocks."""
    names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    plain, rotary, value = (_number(place.block, name) for name in names)
    if not plain or (attribute != "q_b_proj" and attribute != "q_proj" and not value):
        return None
    if attribute == "kv_b_proj":
        parts: tuple[Part, ...] = (Part(KEY, plain), Part(VALUE, value))
    else:
        gates = (Part(GATE, value),) if attribute == "q_gate_proj" else ()
        parts = (Part(QUERY, plain + rotary, rotary=rotary), *gates)
    heads, rest = divmod(stored.outputs, sum(part.width for part in parts))
    named = _numbers((place.block,), _QUERIES) or _numbers((_config(place),), _QUERIES)
    fits = not named or heads in named or tp > 1  # AutoTP leaves the widths, not the number
    return Heads(parts, heads) if fits and not rest else None


def _gated(place: Place, stored: Stored, tp: int) -> Heads | None:
    query = _heads_of(place, QUERY, stored.outputs // 2, tp)
    return Heads((Part(QUERY, query.width), Part(GATE, query.width)), query.heads) if query else None


def _numbers(sources: Sequence[Any], names: Sequence[str]) -> set[int]:
    return {_number(source, name) for source in sources for name in names} - {0}


def _number(source: Any, name: str) -> int:
    """A number of heads or of outputs; 0 where the source does not have it."""
    try:
        value = getattr(source, name, None)
    except RuntimeError:  # of transformers, where it differs by layer and this is the config of all
        return 0
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _config(place: Place) -> Any:
    """The config of the layer: its language model's where it is a composite one, its own where layers differ."""
    config = place.config
    if not _numbers((config,), _QUERIES):
        config = getattr(config, "text_config", config)
    number = getattr(place.block, "layer_idx", None)
    each = config.per_layer_config if getattr(config, "is_heterogeneous", False) else ()
    return each[number] if isinstance(number, int) and 0 <= number < len(each) else config
