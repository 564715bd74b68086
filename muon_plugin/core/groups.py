"""Parameter groups: checks those that the client passed, and splits them into groups of Muon and of AdamW."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .routing import Routing
from .settings import Settings


def _no_name(group: Mapping[str, Any]) -> str | None:
    return None


@dataclass(frozen=True)
class Host:
    """What the engine around the optimizer requires of it. The defaults are for use without an engine.

    Attributes:
        momentum: name of the momentum in the optimizer's state.
        advice: ends the error about a checkpoint with other parameter groups: what to do instead.
        group_keys: further keys that a parameter group may have.
        experts: returns the engine's name of a group of experts that it shards over other ranks than the rest, which
            the group keeps; None for other groups.
    """

    momentum: str = "momentum_buffer"
    advice: str = "load the weights alone"
    group_keys: tuple[str, ...] = ()
    experts: Callable[[Mapping[str, Any]], str | None] = _no_name


#: Engines that may take over an optimizer which was built without one.
_expected: list[Host] = []


def expect(host: Host) -> None:
    """Lets optimizers that are built without an engine keep this engine's group keys. For an engine's package."""
    if host not in _expected:
        _expected.append(host)


def no_engine() -> Host:
    """The host of an optimizer that is built without an engine, and may be handed over to one."""

    def experts(group: Mapping[str, Any]) -> str | None:
        return next((name for host in _expected if (name := host.experts(group)) is not None), None)

    return Host(group_keys=tuple(key for host in _expected for key in host.group_keys), experts=experts)


def named_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """The client's parameter groups, with "params" as (name, parameter) pairs and without frozen parameters."""
    given = list(params)
    if not given:
        raise ValueError("params is empty: Muon needs model.named_parameters(), or parameter groups of such pairs")
    groups = [dict(item) for item in given] if isinstance(given[0], dict) else [{"params": given}]
    seen: set[Tensor] = set()
    for group in groups:
        pairs = list(group.get("params", ()))
        for pair in pairs:
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)):
                raise ValueError(
                    f"params holds a {type(pair).__name__} without a name; allowed: (name, parameter) pairs such as "
                    "model.named_parameters(), whose names tell embeddings and heads from matrices"
                )
        group["params"] = [(name, p) for name, p in pairs if p.requires_grad]
        for name, p in group["params"]:
            if p in seen:
                raise ValueError(f"parameter {name} is in params twice; allowed: each parameter once")
            seen.add(p)
    if not seen:
        raise ValueError("params holds no trainable parameter (requires_grad is false for all of them)")
    return groups


def whole_shape(name: str, p: Tensor) -> tuple[int, ...]:
    if p.is_complex() or not p.is_floating_point() or p.is_sparse:
        raise ValueError(f"parameter {name} is {p.dtype}, {p.layout}; allowed: dense real floating-point parameters")
    if type(p.data).__name__ == "DTensor":
        raise ValueError(f"parameter {name} is a DTensor; allowed: whole tensors (one process, plain DDP) or an engine")
    if not p.is_contiguous():
        raise ValueError(f"parameter {name} is not contiguous (strides {p.stride()}); allowed: contiguous parameters")
    return tuple(p.shape)


def layout_digest(names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A digest of the parameters of a group, in order: ZeRO saves a group as one flat tensor, without their names."""
    lines = "\n".join(f"{name} {list(shapes[name])}" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def parameter_groups(
    groups: Iterable[Mapping[str, Any]], routing: Routing, settings: Settings, host: Host | None = None
) -> list[dict[str, Any]]:
    """Splits each client group into one of matrices and one of the rest, in an order that depends only on the model.

    Groups with equal options are merged, since ZeRO steps group by group, and ranks are balanced and communication
    overlaps with computation only within a group. The order must not depend on the world size, because flat groups are
    resumed by position.

    Args:
        groups: the client's groups, with "params" as (name, parameter) pairs.
        routing: which parameters are matrices.
        settings: values for the options that a group does not set.
        host: the engine, for its group keys and experts.
    """
    host = host or Host()
    merged: dict[str, dict[str, Any]] = {}
    for group in groups:
        given = {key: value for key, value in group.items() if key != "params"}
        for muon in (True, False):
            members = [p for name, p in group["params"] if (name not in routing.adamw) is muon]
            options = settings.of_group(given, muon, host.group_keys)
            label = "-".join([*([given["name"]] if "name" in given else []), "muon" if muon else "adamw"])
            label = host.experts(given) or label
            key = repr((label, options))
            if members:
                into = merged.setdefault(key, {"params": [], "use_muon": muon, "name": label, **options})
                into["params"] += members
    return list(merged.values())
