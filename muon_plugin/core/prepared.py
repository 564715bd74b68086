"""What a `Muon` is built of: the client's parameters, checked, routed and in groups. Nothing here is collective."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .groups import Host, check_parameter, is_usable, named_groups, notes_on, parameter_groups, to_leave_out, without
from .routing import Routing, route
from .settings import Settings

NOTHING = "no parameter requires gradients: nothing is trained"


@dataclass(frozen=True)
class Prepared:
    """The client's parameters, as the optimizer will hold them.

    Attributes:
        groups: parameter groups as `parameter_groups` makes them.
        routing: of the parameters in them.
        names: parameter -> its name in `routing`.
        left_out: the same of parameters that are frozen now, and that are not trained if they are unfrozen.
    """

    groups: list[dict[str, Any]]
    routing: Routing
    names: dict[Tensor, str]
    left_out: dict[Tensor, str]

    def frozen(self) -> set[Tensor]:
        """Those that are trained once they are unfrozen."""
        return {p for p in self.names if not p.requires_grad}

    def describe(self) -> list[str]:
        """One line a parameter, for comparing ranks; and one for each that is frozen."""
        frozen = sorted(self.names[p] for p in self.frozen())
        return [*self.routing.describe(), *(f"{name} is frozen" for name in frozen)]


def prepare(
    given: Sequence[Mapping[str, Any]],
    settings: Settings,
    host: Host,
    model: nn.Module | None,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    in_engine: bool = False,
    unfreezes: bool = True,
    first: int = 0,
    complete: bool = True,
) -> Prepared:
    """Checks and routes parameters.

    Args:
        given: the client's groups, with "params" as (name, parameter) pairs.
        settings, host, model, shapes, unfreezes: those of `Muon`.
        in_engine: whether an engine shards the parameters, which then have to be contiguous.
        first: the number of the first of these groups among the client's.
        complete: whether these are all parameters.

    Raises:
        ValueError: for an invalid parameter, group or pattern.
    """
    left_out = to_leave_out(given, unfreezes, any_strides=not in_engine)
    groups = without(given, left_out)
    names = {p: name for group in groups for name, p in group["params"]}
    for p, name in names.items():
        check_parameter(name, p, any_strides=not in_engine)
    whole = {name: (shapes or {}).get(name, host.shape(p)) for p, name in names.items()}
    if not whole:  # patterns, which have nothing to match, are no mistake: they may come with another model
        return Prepared([], Routing((), {}, {}, (NOTHING,)), names, left_out)
    tp = {name: math.prod(whole[name]) // max(math.prod(host.shape(p)), 1) for p, name in names.items()}
    routing = route(
        whole,
        model=model,
        exclude=settings.exclude,
        split=settings.split,
        layers=host.layers(model),
        complete=complete,
        per_head=settings.per_head_muon,
        tp=tp,
    )
    matrices = {p: name for p, name in names.items() if name not in routing.adamw}
    if scattered := {p: n for p, n in matrices.items() if not p.requires_grad and not is_usable(n, p)}:
        left_out, groups = left_out | scattered, without(groups, scattered)
        names = {p: name for p, name in names.items() if p not in scattered}
        routing = routing.only(set(names.values()))
    for p, name in names.items():
        check_parameter(name, p, any_strides=name in routing.adamw)
    split = parameter_groups(groups, routing, settings, host, first)
    return Prepared(split, replace(routing, notes=(*routing.notes, *notes_on(groups, host))), names, left_out)


def prepare_later(
    param_group: Any,
    settings: Settings,
    host: Host,
    model: nn.Module | None,
    known: Prepared,
) -> Prepared:
    """The same for a group that is added to an optimizer which has `known`.

    Raises:
        TypeError: for what is no dict.
        ValueError: also for a parameter or a name that is there already, and for a group with nothing to train.
    """
    if not isinstance(param_group, dict):
        raise TypeError(f"param_group must be a dict, but is {type(param_group).__name__}")
    given = named_groups([param_group])
    pairs = given[0]["params"]
    if not any(p.requires_grad for _, p in pairs):
        raise ValueError(
            "add_param_group was given no parameter that requires gradients; allowed: set requires_grad=True first"
        )
    for name, p in pairs:
        if p in known.names:
            raise ValueError(
                f"parameter {name} is in the optimizer already; allowed: each parameter once (one that was frozen is "
                "trained as soon as it is unfrozen)"
            )
        if name in known.routing.shapes:
            raise ValueError(
                f"the optimizer holds another parameter of the name {name}; allowed: names of their own. After "
                "replacing a layer, build a new Muon"
            )
    first = 1 + max(group["client_group"] for group in known.groups)
    return prepare(given, settings, host, model, first=first, complete=False)
