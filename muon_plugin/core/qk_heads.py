"""The attention layers of a model, as QK-Clip scales them: told by `heads` of the projections in one module."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from .cutting import Stored
from .heads import KEY, QUERY, UNKNOWN, Head, Heads, known_heads, roles_of
from .layout import Strided
from .places import COPIES, Place, places
from .qk_clip import ROTARY, AttentionLayer, Rows
from .routing import stored_as

#: Norms of queries and keys: behind them, logits do not depend on the size of the projections.
QK_NORMS = re.compile(
    r"(q|k|qk|query|key)_?(rope_only_)?(layer_?)?(norms?|ln)|norm_(q|k|query|key)|(layer)?norm_(q|k)", re.IGNORECASE
)

#: What a block adds to its queries or keys, beside their projections (Zamba2's layers that share one attention).
ADDED = re.compile(r"linear_[qk]_adapter_list")


@dataclass(frozen=True)
class Found:
    """The attention of a model.

    Attributes:
        layers: what is scaled.
        modules: those that compute them, and the number of the layer: several compute one where weights are tied.
        left: modules whose logits do not matter: what they project with is not trained.
        notes: for the start-up table.
    """

    layers: tuple[AttentionLayer, ...] = ()
    modules: Mapping[nn.Module, int] = field(default_factory=dict)
    left: tuple[nn.Module, ...] = ()
    notes: tuple[str, ...] = ()


#: (Name, how it is stored, its heads) of a parameter.
Projection = tuple[str, Stored, Heads]


@dataclass
class _Block:
    """The projections to heads in one module."""

    module: nn.Module
    path: str
    projections: list[Projection] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether both queries and keys are trained."""
        return bool(_of(self.projections, QUERY) and _of(self.projections, KEY))

    @property
    def scaled(self) -> frozenset[str]:
        """The parameters that QK-Clip scales for it."""
        return frozenset(name for role in (QUERY, KEY) for name, _, _ in _of(self.projections, role))


def _of(projections: Sequence[Projection], role: str) -> list[tuple[str, Stored, Head]]:
    return [(name, stored, head) for name, stored, held in projections for head in held if head.role == role]


def attention_layers(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> Found:
    """The layers of softmax attention whose query and key projections are trained.

    Args:
        model: whose modules say what their projections hold.
        shapes: name -> whole shape, of the parameters that are trained.

    Raises:
        ValueError: where QK-Clip cannot work: heads that cannot be told, norms behind the projections, adapters on
            them.
    """
    names = _all_names(model, shapes)
    where = places(model, list(names))
    frozen = _replaced(model, where)
    blocks: dict[int, _Block] = {}
    paths = {id(module): path for path, module in model.named_modules()}
    others: list[str] = []
    for name, known in names.items():
        place, shape = where[name], shapes[known]
        _refuse_adapter(name, place)
        if len(shape) < 2 or place.block is None or place.tuner is not None or name in frozen:
            continue
        stored = stored_as(place, tuple(shape))
        found = None if isinstance(stored, str) else known_heads(place, stored)
        if found == UNKNOWN:
            raise ValueError(
                f"qk_clip: {name} {list(shape)} projects to attention heads, and {found}. Leave qk_clip out for this "
                "model, or give the module num_heads, num_key_value_heads and head_dim"
            )
        if isinstance(found, str) or (isinstance(found, Heads) and not found.softmax):
            others.append(name)
        elif isinstance(found, Heads) and not isinstance(stored, str):
            _refuse_parametrized(name, found)
            block = blocks.setdefault(id(place.block), _Block(place.block, paths.get(id(place.block), name)))
            if (known, stored, found) not in block.projections:  # a module with several paths
                block.projections.append((known, stored, found))
    complete = [block for block in blocks.values() if block.complete]
    left = [*_without_training(model, where), *(b.module for b in blocks.values() if not b.complete)]
    layers: dict[frozenset[str], AttentionLayer] = {}
    modules: dict[nn.Module, int] = {}
    for block in complete:
        _refuse_behind(block)
        _refuse_half_tied(block, complete)
        if block.scaled not in layers:
            layers[block.scaled] = attention_layer(block.path, block.projections, shapes)
        modules[block.module] = list(layers).index(block.scaled)
    partly = [block.path for block in blocks.values() if not block.complete]
    notes = [f"QK-Clip leaves {len(others)} projections that are no query or key of a softmax: {o}" for o in others[:1]]
    if partly:
        notes.append(
            f"QK-Clip leaves {len(partly)} attention layers in which query or key projections are frozen or not known: "
            f"{partly[0]}"
        )
    return Found(tuple(layers.values()), modules, tuple(left), tuple(notes))


def _all_names(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Name -> the name in `shapes` of the same parameter: tied weights have several."""
    named = dict(model.named_parameters(remove_duplicate=False))
    known = {id(named[name]): name for name in shapes if name in named}
    return {name: name for name in shapes} | {n: known[id(p)] for n, p in named.items() if id(p) in known}


def attention_layer(
    label: str, projections: Sequence[Projection], shapes: Mapping[str, Sequence[int]]
) -> AttentionLayer:
    """What is scaled of the projections to queries and keys of one layer.

    Args:
        label: for the log.
        projections: of whole parameters.
        shapes: name -> whole shape, of the parameters that are trained.
    """
    queries, keys = _of(projections, QUERY), _of(projections, KEY)
    shared, rest = divmod(len(queries), len(keys))
    if rest:
        raise ValueError(
            f"qk_clip: {label} has {len(queries)} query and {len(keys)} key heads, of which none is shared evenly"
        )
    rows: list[Rows] = []
    for name, stored, head in sorted(queries, key=lambda found: found[2].number):
        group = head.number // shared * shared
        plain = head.width - head.rotary
        parts = [(QUERY, head.start, plain), (ROTARY, head.start + plain, head.rotary)]
        for role, start, width in parts:
            rows += _rows(name, stored, start, width, role, group, shared, shapes)
    for name, stored, head in keys:
        rows += _rows(name, stored, head.start, head.width, KEY, head.number * shared, shared, shapes)
    return AttentionLayer(label, len(queries), tuple(rows))


def _rows(
    name: str,
    stored: Stored,
    start: int,
    width: int,
    role: str,
    first: int,
    heads: int,
    shapes: Mapping[str, Sequence[int]],
) -> list[Rows]:
    """Some outputs of a projection: in its weight, and in its bias if that is trained."""
    if not width:
        return []
    if stored.transposed:
        where = Strided(start, width, stored.cols, stored.rows)
    else:
        where = Strided(start * stored.cols, width * stored.cols)
    bias = re.sub(r"weight$", "bias", name)
    found = [Rows(name, where, role, first, heads)]
    if bias != name and bias in shapes and tuple(shapes[bias]) == (stored.outputs,):
        found.append(Rows(bias, Strided(start, width), role, first, heads))
    return found


def _refuse_adapter(name: str, place: Place) -> None:
    """What an adapter adds to a frozen projection is not scaled by scaling either of them."""
    adapted = place.adapted
    if place.tuner is None or adapted is None or adapted.block is None:
        return
    roles = roles_of(adapted.attribute.lower(), type(adapted.block).__name__)
    if {QUERY, KEY} & set(roles):
        raise ValueError(
            f"qk_clip: {name} is an adapter of a query or key projection; allowed: adapters of other layers, or no "
            "qk_clip. What a head computes is the frozen projection and the adapter together"
        )


def _refuse_behind(block: _Block) -> None:
    """What stands between the projections and the logits, which do not shrink with the projections' weights then."""
    for name, child in block.module.named_children():
        if ADDED.fullmatch(name):
            raise ValueError(
                f"qk_clip: {block.path} adds an adapter ({name}) to its queries or keys, which is not scaled with "
                "their projections; allowed: the model without such adapters, or no qk_clip"
            )
        if QK_NORMS.fullmatch(name) and not isinstance(child, nn.Identity):
            raise ValueError(
                f"qk_clip: {block.path} norms its queries or keys ({name}) behind the projections, so that its logits "
                "do not depend on the size of their weights, and cannot be clipped by scaling these; allowed: models "
                "without QK-norm. The norm bounds the logits itself"
            )


def _replaced(model: nn.Module, where: Mapping[str, Place]) -> set[str]:
    """Frozen parameters beside which there is a trained copy, which the model uses: as with PEFT's modules_to_save."""
    named = dict(model.named_parameters(remove_duplicate=False))
    trained = {where[name].name for name in where if COPIES in name.split(".") and named[name].requires_grad}
    return {name for name in where if where[name].name in trained and not named[name].requires_grad}


def _refuse_parametrized(name: str, heads: Heads) -> None:
    """A weight that is computed from the parameter, by weight or spectral norm for example, does not scale with it."""
    parts = name.split(".")
    made = "parametrizations" in parts or parts[-1] in ("weight_v", "weight_orig")
    if made and any(part.role in (QUERY, KEY) for part in heads.parts):
        raise ValueError(
            f"qk_clip: {name} is parametrized: the weight of the query or key projection is computed from it, and need "
            "not shrink with it; allowed: plain projections, or no qk_clip"
        )


def _refuse_half_tied(block: _Block, others: Sequence[_Block]) -> None:
    """What one layer's logits ask for would change those of another, or be done twice."""
    twice = [name for name, held in Counter(name for name, _, _ in block.projections).items() if held > 1]
    tied = [name for other in others if other.scaled != block.scaled for name in other.scaled & block.scaled]
    for name in twice + tied:
        raise ValueError(
            f"qk_clip: {name} is tied to a projection of other heads; allowed: layers that share all of their query "
            "and key projections or none, or no qk_clip"
        )


def _without_training(model: nn.Module, where: Mapping[str, Place]) -> list[nn.Module]:
    """The modules in which nothing is trained but adapters."""
    trained = {""}
    for name, place in where.items():
        if place.tuner is None:
            parts = name.split(".")
            trained |= {".".join(parts[:length]) for length in range(1, len(parts))}
    return [module for path, module in model.named_modules() if path not in trained]
