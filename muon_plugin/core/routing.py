"""Which parameters are matrices, which matrices a fused parameter holds, and why the rest goes to AdamW.

The paper's rule: matrices of the hidden layers get Muon; embeddings, the LM head, norms and biases get AdamW.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import Any

from torch import nn

from .adapters import adapter_rule, adapter_stored
from .cutting import Rule, Stored, asked_rule, cut
from .fused import known_batch, known_rule, stored_experts
from .heads import Heads, known_heads
from .layout import Matrix
from .modelling_code import split_in
from .places import Place, places

#: Words in the last two parts of a name that say "looked up by token or position".
EMBEDDING = re.compile("embed|wte|wpe")
#: Linear layers that are applied to embeddings, in spite of their names.
OF_EMBEDDINGS = re.compile(r"\w*embed\w*_(hidden_)?(mapping|proj|dense|transform)\w*")
#: The linear map of patches of an image, which models implement by convolutions and linear layers of many names.
PATCHES = re.compile(r"patch_(emb|conv|proj)\w*")
PATCH_CLASSES = re.compile(r"Patch\w*Embed|Vision\w*Embeddings$")
#: Names of an output head wherever it sits, and names that mean one only outside numbered blocks.
HEADS = {
    "lm_head",
    "lm_heads",
    "embed_out",
    "output_layer",
    "qa_outputs",
    "shadow_head",
    "seq_relationship",
    "decoder_dict",
}
OUTER_HEADS = {"head", "heads", "output", "classifier", "score", "fc", "proj_out"}
#: Layers that are heads by themselves, and (layer, the class that it is in) of heads with ordinary names.
HEAD_LAYERS = re.compile(r"(\w+_)?(heads?|classifier)|head_linear|action_out_proj|output_projection")
HEADS_IN = (
    ("out_proj|output_projection|summary", r"Classif\w*Head$|SequenceSummary"),
    ("decoder", r"(Prediction|LM)\w*Head$"),
    ("dense", "MobileBertLMPredictionHead"),  # the rest of the vocabulary's matrix, beside the embedding
    ("out", r"CTCEncoder$"),
    ("linear", r"ISTFTHead$"),
)
#: Names of heads that also are those of an attention's, or a patch merger's, own outputs.
OUTPUTS = {"output", "proj_out", "fc"}
INSIDE = re.compile(r"(Att(entio)?n(Block)?|Merger)$")
#: Hidden layers of a head, if they are not its last one, which gives the scores.
BEFORE_SCORES = re.compile(r"dense|linear\d*|transform|fc1|in_proj_weight")
#: Tables and vectors that have two or more dimensions: the parameter's own name.
NOT_MATRICES = re.compile(
    r"(bias|_table|_tokens?|A_log|query|queries|latents?|probe|prompts?|module_logits)$"
    r"|^(rel_pos|pos_bias|time_mix|position|codebook)"
)

#: What the table says where most matrices are factors of adapters; measured in benchmarks/lora_rates.py.
ADAPTER_RATE = (
    "AdamW's learning rate does not carry over to them as it does to full matrices; start at 3 times it, and search "
    "from 1 to 10 times it (docs/fine-tuning.md)"
)

#: The number of a layer or an expert in a name, but not that of ``linear_fc1``.
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|(?<=^chunk)\d+|(?<=\.weight)\d+$|(?<=\.expert_)\d+(?=\.)")


@dataclass(frozen=True)
class Routing:
    """Every trainable parameter's way: its matrices for Muon, or the reason why AdamW has it.

    Attributes:
        matrices: of all parameters, in their order.
        adamw: name of a parameter -> why AdamW has it.
        shapes: of all parameters.
        notes: for the start-up table.
        by_head: name -> its heads, of a projection of which each head is a matrix (``per_head_muon``).
        not_by_head: name -> why the heads of what looks like such a projection cannot be told.
    """

    matrices: tuple[Matrix, ...]
    adamw: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...] = field(default=())
    by_head: Mapping[str, Heads] = field(default_factory=dict)
    not_by_head: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> list[str]:
        """One line a parameter, for comparing ranks."""
        ways = dict(self.adamw)
        for matrix in self.matrices:
            ways[matrix.parameter] = ways.get(matrix.parameter, "") + f"[{matrix.rows}x{matrix.cols}]"
        return [f"{name} {list(shape)}: {ways[name]}" for name, shape in self.shapes.items()]

    @property
    def head_facts(self) -> HeadFacts:
        """For `check_heads`."""
        why = [(name, why) for name, why, _ in by_pattern(self.not_by_head.items())]
        return len(self.shapes), bool(self.by_head), why

    def joined(self, more: Routing) -> Routing:
        """The ways of both."""
        return Routing(
            self.matrices + more.matrices,
            {**self.adamw, **more.adamw},
            {**self.shapes, **more.shapes},
            tuple(dict.fromkeys(self.notes + more.notes)),
            {**self.by_head, **more.by_head},
            {**self.not_by_head, **more.not_by_head},
        )

    def only(self, names: Collection[str]) -> Routing:
        """The ways of these parameters alone."""
        return replace(
            self,
            matrices=tuple(matrix for matrix in self.matrices if matrix.parameter in names),
            adamw={name: why for name, why in self.adamw.items() if name in names},
            shapes={name: shape for name, shape in self.shapes.items() if name in names},
            by_head={name: heads for name, heads in self.by_head.items() if name in names},
            not_by_head={name: why for name, why in self.not_by_head.items() if name in names},
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
            by_head={names[name]: heads for name, heads in self.by_head.items()},
            not_by_head={names[name]: why for name, why in self.not_by_head.items()},
        )


def route(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    model: nn.Module | None = None,
    exclude: Sequence[str] = (),
    split: Mapping[str, Any] | None = None,
    layers: Mapping[str, Any] | None = None,
    complete: bool = True,
    per_head: bool = False,
    tp: Mapping[str, int] | None = None,
) -> Routing:
    """Decides for every parameter.

    Args:
        shapes: name -> full (unsharded) shape of each trainable parameter, in order.
        model: looked into for module types and its config; without it, names alone decide.
        exclude: shell-style patterns (``*.router.*``, or a part of the name) of parameters that go to AdamW.
        split: pattern -> how a parameter is cut (see `cutting.SPLIT_HELP`); the first match wins over the defaults.
        layers: number -> class of all layers, where names begin with their number and `model` holds only some of them;
            by default those of `model`. The last ones, of classes that occur once, are no blocks and may be heads.
        complete: whether these are all parameters, so that a pattern which none of them matches is a mistake.
        per_head: whether each head of query, key and value is a matrix, where `split` says nothing else.
        tp: in how many parts tensor parallelism has cut a parameter of `model`, by its name.

    Raises:
        ValueError: a pattern that matches nothing, or a split that does not fit a shape it matches.
    """
    split = dict(split or {})
    names = _all_names(model)
    known = places(model, [*{alias: None for name in shapes for alias in names.get(name, [name])}])
    tables = _tables(model)
    if complete:
        _check_patterns(shapes, exclude, split, names)
    ends = _last_layers(layer_types(model) if layers is None else layers)
    adamw: dict[str, str] = {}
    found = _Found()
    for name, shape in shapes.items():
        aliases = names.get(name, [name])
        reasons = (_not_a_matrix(alias, shape, known[alias], exclude, ends) for alias in aliases)
        why = tables.get(name) or next(filter(None, reasons), None)
        stored = stored_as(known[name], shape) if why is None else why
        if not isinstance(stored, str) and min(stored.rows, stored.cols) == 1:
            stored = "a vector"
        if isinstance(stored, str):
            adamw[name] = stored
            continue
        asked = _first_match(name, split)
        if asked is not None:
            shown = f"split[{asked!r}]={split[asked]!r}"
            found.add_asked(
                name, stored, asked_rule(stored, split[asked], f"{shown} for {name} of shape {list(shape)}"), shown
            )
            continue
        heads = known_heads(known[name], stored, (tp or {}).get(name, 1)) if per_head else None
        if isinstance(heads, Heads):
            found.add_heads(name, stored, heads)
            continue
        found.add(name, stored, _rule(known[name], stored))
        if heads is not None:
            found.not_by_head[name] = heads
    if complete:
        _check_splits_cut(split, found.matrices)
    notes = [note for why, of_why in found.whole.items() for note in kept_whole(why, of_why, "; `split` can cut it")]
    notes += not_cut_by_head(found.not_by_head)
    of_adapters = sum(known[matrix.parameter].tuner is not None for matrix in found.matrices)
    if 2 * of_adapters > len(found.matrices):
        notes.append(f"{of_adapters} of {len(found.matrices)} matrices are factors of adapters: {ADAPTER_RATE}")
    return Routing(tuple(found.matrices), adamw, dict(shapes), tuple(notes), found.by_head, found.not_by_head)


@dataclass
class _Found:
    """The matrices that `route` has found so far; `whole`: why a layer that looks fused is kept whole -> its names."""

    matrices: list[Matrix] = field(default_factory=list)
    whole: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    by_head: dict[str, Heads] = field(default_factory=dict)
    not_by_head: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, stored: Stored, rule: Rule | str) -> None:
        """Cuts by a default rule; with the reason why there is none, not at all."""
        parts = [] if isinstance(rule, str) else cut(name, stored, rule)
        if isinstance(rule, str):
            self.whole[rule].append(name)
        elif any(min(part.rows, part.cols) == 1 for part in parts):  # such as a single time step beside the states
            self.whole["it holds a vector beside matrices"].append(name)
            parts = []
        self.matrices += parts or cut(name, stored, Rule((stored.outputs,)))

    def add_heads(self, name: str, stored: Stored, heads: Heads) -> None:
        self.by_head[name] = heads
        self.matrices += cut(name, stored, heads.by_head)

    def add_asked(self, name: str, stored: Stored, rule: Rule, shown: str) -> None:
        """Cuts by a user's rule."""
        parts = cut(name, stored, rule)
        if any(min(part.rows, part.cols) == 1 for part in parts):
            raise ValueError(f"{shown} for {name}: a part of one row is not a matrix")
        self.matrices += parts


def not_cut_by_head(names: Mapping[str, str]) -> list[str]:
    """Notes on projections whose heads are no matrices although each head should be one."""
    return [
        f"{name} is not cut by head, because {why}" + (f" ({count} parameters)" if count > 1 else "")
        for name, why, count in by_pattern(names.items())
    ]


#: What `check_heads` is told of one rank's parameters: their number, whether any is cut by head, (name, why not).
HeadFacts = tuple[int, bool, list[tuple[str, str]]]


def check_heads(setting: str, of_ranks: Sequence[HeadFacts]) -> None:
    """Refuses to cut by head where nothing can be told to be one, on any rank.

    Raises:
        ValueError: with the setting, the projections and why their heads are not known.
    """
    if not any(parameters for parameters, _, _ in of_ranks) or any(found for _, found, _ in of_ranks):
        return
    names: dict[str, list[str]] = defaultdict(list)
    for name, why in dict.fromkeys(pair for _, _, of_rank in of_ranks for pair in of_rank):
        names[why].append(name)
    shown = "; ".join(f"{', '.join(of_why)}: {why}" for why, of_why in names.items())
    raise ValueError(
        f"{setting}, but of no trainable parameter is it known which of its outputs are a head "
        f"({shown or 'none of them looks like a projection to queries, keys or values'}); allowed: a model whose "
        "attention says its numbers of heads and their widths (without an engine: model=...), or `split` with the "
        "number of heads in the place of this setting"
    )


def kept_whole(why: str, names: Iterable[str], advice: str = "") -> list[str]:
    """Notes on fused parameters that are kept whole: one for the same parameter of all layers."""
    return [
        f"{name} is kept whole, because {why}{advice}" + (f" ({count} parameters)" if count > 1 else "")
        for name, _, count in by_pattern((name, why) for name in names)
    ]


def by_pattern(ways: Iterable[tuple[str, str]]) -> list[tuple[str, str, int]]:
    """(Name, way, how many) of names with the same way that differ in their numbers alone, which are * then."""
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, way in ways:
        alike[NUMBER.sub("*", name), way].append(name)
    return [(pattern if len(n) > 1 else n[0], way, len(n)) for (pattern, way), n in alike.items()]


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
    """What Hugging Face models call their embeddings and output head: the model itself, or those that it wraps."""
    found: dict[int, str] = {}
    for get, why in (("get_output_embeddings", "output head"), ("get_input_embeddings", "embedding")):
        for asked in _outermost_with(model, get):
            try:
                module = getattr(asked, get)()
            except (AttributeError, NotImplementedError, TypeError):
                # AttributeError, NotImplementedError: of transformers, without such a module. TypeError: the model
                # uses the name for something else. Names and module types then decide alone.
                continue
            found |= {id(p): why for p in (module.parameters() if isinstance(module, nn.Module) else ())}
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found} if model is not None else {}


def _outermost_with(model: nn.Module | None, attribute: str) -> list[nn.Module]:
    """The modules that have the attribute, without those inside another such module."""
    if model is None or hasattr(model, attribute):
        return [] if model is None else [model]
    return [found for child in model.children() for found in _outermost_with(child, attribute)]


def _not_a_matrix(
    alias: str, shape: tuple[int, ...], place: Place, exclude: Iterable[str], ends: Collection[str]
) -> str | None:
    """Why AdamW has the parameter, as far as its name, its dimensions and its module say; None for a matrix."""
    if any(_matches(alias, pattern) for pattern in exclude):
        return "excluded"
    if len(shape) < 2 or 0 in shape:
        return "a vector"
    parts = place.name.split(".")
    if place.magnitude:
        return "magnitudes of a normed weight"
    if _is_embedding(place, parts):
        return "embedding"
    if NOT_MATRICES.search(parts[-1]):
        return "a table or a bias"
    if _is_head(place, parts, _outside(place, parts, ends)):
        return "output head"
    return None


def _is_embedding(place: Place, parts: Sequence[str]) -> bool:
    layer, block = type(place.layer).__name__, type(place.block).__name__
    if "Embedding" in layer:
        return True
    linear = isinstance(place.layer, (nn.Linear, nn.modules.conv._ConvNd))
    if linear and OF_EMBEDDINGS.fullmatch(place.attribute):
        return False
    if any(PATCHES.fullmatch(part) for part in parts[-3:-1]):
        return True
    if isinstance(place.layer, nn.modules.conv._ConvNd) and PATCH_CLASSES.search(block):
        return True
    return bool(EMBEDDING.search(".".join(parts[-2:]))) and "embed_out" not in parts


def _outside(place: Place, parts: Sequence[str], ends: Collection[str]) -> list[str]:
    """The parts of a name before the first numbered block, which the last layers of a Sequential are not."""
    found: list[str] = []
    for i, part in enumerate(parts):
        if part.isdigit():
            holder = place.modules[i - 1] if 0 < i < len(place.modules) else None
            last = _last_layers(layer_types(holder)) if isinstance(holder, nn.Sequential) else ()
            if part not in (last if i else ends):
                break
        found.append(part)
    return found


def _is_head(place: Place, parts: Sequence[str], outside: Collection[str]) -> bool:
    """Whether the layer's outputs are scores or codes.

    Args:
        parts: of its name.
        outside: the parts before the first numbered block.
    """
    named = [part for part in parts if part in HEADS or (part in OUTER_HEADS and part in outside)]
    if place.block is None or place.tuner is not None:
        return bool(named)
    block = type(place.block).__name__
    if any(re.fullmatch(layers, place.attribute) and re.search(blocks, block) for layers, blocks in HEADS_IN):
        return True
    if isinstance(place.layer, nn.Linear) and place.attribute in outside and HEAD_LAYERS.fullmatch(place.attribute):
        return True
    if place.attribute in named:
        return place.attribute not in OUTPUTS or not INSIDE.search(block)
    return bool(named) and not _is_before_scores(place, place.modules[parts.index(named[0]) :])


def _is_before_scores(place: Place, modules: Sequence[nn.Module]) -> bool:
    """Whether a layer in a module that is called a head comes before the one that gives the scores.

    Args:
        modules: that module, and those inside it that hold the layer.
    """
    head = next(module for module in modules if not isinstance(module, (nn.ModuleList, nn.ModuleDict)))
    if re.search(r"Pooling|SelfOutput$", type(head).__name__):  # they give hidden states
        return True
    linear = [module for module in head.modules() if isinstance(module, nn.Linear)]
    hidden = place.attribute.isdigit() or BEFORE_SCORES.fullmatch(place.attribute)
    return bool(hidden and linear and place.layer is not linear[-1])


def stored_as(place: Place, shape: tuple[int, ...]) -> Stored | str:
    """How a parameter stores matrices, or the reason why it stores none."""
    if place.tuner is not None:
        return adapter_stored(place, shape)
    batch = known_batch(place, shape)
    if batch is not None:
        return batch
    layer = place.layer
    if isinstance(layer, nn.modules.conv._ConvNd):
        # A kernel is the matrix (outputs, inputs x window); a grouped convolution is one matrix a group. A transposed
        # convolution holds (inputs, outputs, window): its rows are inputs.
        return Stored(layer.groups, shape[0] // layer.groups, math.prod(shape[1:]), layer.transposed)
    if len(shape) == 2:
        return Stored(1, *shape, type(layer).__name__ == "Conv1D")
    if layer is None and len(shape) > 3:  # by names alone, four dimensions can only be a kernel
        return Stored(1, shape[0], math.prod(shape[1:]))
    if "expert" in place.name.lower() or "expert" in type(layer).__name__.lower():
        return stored_experts(place, shape)
    # A batch of matrices and a kernel look alike.
    return f"{len(shape)} dimensions, neither a kernel nor experts"


def _rule(place: Place, stored: Stored) -> Rule | str:
    """How a parameter is cut by default, or the reason why it is kept whole although it looks fused."""
    rule = known_rule(place, stored) if place.tuner is None else adapter_rule(place, stored)
    if rule is None:
        return "it looks like a fused projection of an unknown layout"
    if rule != Rule((stored.outputs,)):
        return rule if stored.told else "nothing says whether it is stored (in, out)"
    if place.tuner is None and place.block is not None and place.attribute in _split_in(place.block):
        return "the model's code splits its outputs in a way that is not known here"
    return rule


def _split_in(block: nn.Module) -> Collection[str]:
    of_class: Any = type(block)
    return split_in(of_class)
