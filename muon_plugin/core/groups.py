"""Parameter groups: checks those that the client passed, and splits them into groups of Muon and of AdamW."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from .routing import Routing, layer_types
from .settings import Settings, keys_not_read


def _no_name(group: Mapping[str, Any]) -> str | None:
    return None


def _own_shape(p: Tensor) -> tuple[int, ...]:
    return tuple(p.shape)


@dataclass(frozen=True)
class Host:
    """What the engine around the optimizer requires of it. The defaults are for use without an engine.

    Attributes:
        momentum: name of the momentum in the optimizer's state.
        advice: ends the error about a checkpoint with other parameter groups: what to do instead.
        unfreeze: ends the error about a parameter that is unfrozen where it cannot be trained: what to do instead.
        group_keys: further keys that a parameter group may have.
        experts: returns the engine's name of a group of experts that it shards over other ranks than the rest, which
            the group keeps; None for other groups.
        shape: returns a parameter's whole shape, where the engine has cut the parameter before the optimizer sees it.
        layers: returns number -> class of a model's layers, as `routing.layer_types` does: a pipeline's stage holds
            only some of them.
    """

    momentum: str = "momentum_buffer"
    advice: str = "load the weights alone"
    unfreeze: str = "build a new Muon with it"
    group_keys: tuple[str, ...] = ()
    experts: Callable[[Mapping[str, Any]], str | None] = _no_name
    shape: Callable[[Tensor], tuple[int, ...]] = _own_shape
    layers: Callable[[nn.Module | None], Mapping[str, Any]] = layer_types


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

    def shape(p: Tensor) -> tuple[int, ...]:
        return next((found for host in _expected if (found := host.shape(p)) != tuple(p.shape)), tuple(p.shape))

    def layers(model: nn.Module | None) -> Mapping[str, Any]:
        own = layer_types(model)
        return next((found for host in _expected if (found := host.layers(model)) != own), own)

    keys = tuple(key for host in _expected for key in host.group_keys)
    return Host(group_keys=keys, experts=experts, shape=shape, layers=layers)


def named_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """The client's parameter groups, with "params" as (name, parameter) pairs.

    Raises:
        ValueError: for no parameters at all, one without a name, or one that is there twice.
    """
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
        group["params"] = pairs
        for name, p in pairs:
            if p in seen:
                raise ValueError(f"parameter {name} is in params twice; allowed: each parameter once")
            seen.add(p)
    return groups


def without(groups: Iterable[Mapping[str, Any]], left_out: Container[Tensor]) -> list[dict[str, Any]]:
    """These groups of (name, parameter) pairs without some of the parameters (a set: tensors in a list are compared by
    value)."""
    return [{**group, "params": [pair for pair in group["params"] if pair[1] not in left_out]} for group in groups]


def to_leave_out(groups: Iterable[Mapping[str, Any]], unfreezes: bool, any_strides: bool = False) -> dict[Tensor, str]:
    """The frozen parameters that are not trained once they are unfrozen, with their names.

    Args:
        groups: the client's, with "params" as (name, parameter) pairs.
        unfreezes: whether those are trained that can be. Where nothing is trainable, nothing is planned.
        any_strides: as for `check_parameter`.
    """
    pairs = [pair for group in groups for pair in group["params"]]
    unfreezes = unfreezes and any(p.requires_grad for _, p in pairs)
    return {p: name for name, p in pairs if not p.requires_grad and not (unfreezes and is_usable(name, p, any_strides))}


def is_usable(name: str, p: Tensor, any_strides: bool = False) -> bool:
    """Whether `check_parameter` lets it pass."""
    try:
        check_parameter(name, p, any_strides)
    except ValueError:  # quantized, for example
        return False
    return True


def check_parameter(name: str, p: Tensor, any_strides: bool = False) -> None:
    """Refuses what is no dense tensor of real floating-point numbers, and contiguous unless `any_strides`.

    Matrices are read in the order in which their elements lie. torch's AdamW takes any strides.
    """
    if p.is_complex() or not p.is_floating_point() or p.is_sparse:
        raise ValueError(f"parameter {name} is {p.dtype}, {p.layout}; allowed: dense real floating-point parameters")
    is_dtensor = type(p.data).__name__ == "DTensor"
    if is_dtensor or getattr(p, "_fsdp_flattened", False):  # FSDP1's parts of a flat tensor look like vectors
        cut = "a DTensor" if is_dtensor else "cut by FSDP"
        raise ValueError(f"parameter {name} is {cut}; allowed: whole tensors (one process, plain DDP) or an engine")
    if not (any_strides or p.is_contiguous()):
        raise ValueError(
            f"parameter {name} is not contiguous (strides {p.stride()}); allowed: contiguous parameters, such as "
            "model.to(memory_format=torch.contiguous_format) has instead of channels_last"
        )


def layout_digest(names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A digest of the parameters of a group, in order: ZeRO saves a group as one flat tensor, without their names."""
    lines = "\n".join(f"{name} {list(shapes[name])}" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def parameter_groups(
    groups: Iterable[Mapping[str, Any]],
    routing: Routing,
    settings: Settings,
    host: Host | None = None,
    first: int = 0,
) -> list[dict[str, Any]]:
    """The client's groups in their order; each that holds both matrices and other parameters becomes two.

    Groups are not merged, even if their options are equal: a schedule may tell them apart by position. The order must
    not depend on the world size, because flat groups are resumed by position.

    Args:
        groups: the client's groups, with "params" as (name, parameter) pairs.
        routing: which parameters are matrices.
        settings: values for the options that a group does not set.
        host: the engine, for its group keys and experts.
        first: the number of the first of these groups among the client's.
    """
    host = host or Host()
    found: list[dict[str, Any]] = []
    for number, group in enumerate(groups, first):
        given = {key: value for key, value in group.items() if key != "params"}
        for muon in (True, False):
            members = [p for name, p in group["params"] if (name not in routing.adamw) is muon]
            options = settings.of_group(given, muon, host.group_keys)
            label = "-".join([*([given["name"]] if "name" in given else []), "muon" if muon else "adamw"])
            name = host.experts(given) or label
            if members:
                found.append({"params": members, "use_muon": muon, "name": name, "client_group": number, **options})
    return found


def notes_on(groups: Iterable[Mapping[str, Any]], host: Host) -> tuple[str, ...]:
    """What the table says of the keys of the client's groups."""
    keys = dict.fromkeys(key for group in groups for key in keys_not_read(group, host.group_keys))
    return (f"parameter groups keep {', '.join(keys)}, which Muon does not read",) if keys else ()


#: What both halves of a client's group are given.
SHARED = ("lr", "weight_decay")


@dataclass(frozen=True)
class Halved:
    """A client's group that was split in two, which have one rate and one decay.

    Attributes:
        matrices, rest: the positions of its halves among the optimizer's groups.
    """

    matrices: int
    rest: int

    @classmethod
    def among(cls, groups: Sequence[Mapping[str, Any]]) -> list[Halved]:
        """Those among the groups that `parameter_groups` made."""
        pairs = enumerate(pairwise(groups))
        return [cls(i, i + 1) for i, (one, other) in pairs if one["client_group"] == other["client_group"]]

    @staticmethod
    def alike(one: Any, other: Any) -> bool:
        return math.isclose(float(one), float(other), rel_tol=1e-6)

    def check(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Refuses a rate or a decay that was changed in one half alone, as by a list meant for the client's groups.

        Raises:
            RuntimeError: with the positions, the values and what to do.
        """
        for key in SHARED:
            matrices, rest = groups[self.matrices][key], groups[self.rest][key]
            if not self.alike(matrices, rest):
                apart = ", or set muon_lr and adam_lr" if key == "lr" else ""
                raise RuntimeError(
                    f"{key} is {float(matrices):g} in param_groups[{self.matrices}] and {float(rest):g} in "
                    f"param_groups[{self.rest}], the matrices and the rest of one group of yours. Each group that was "
                    f'given has become one or two of {len(groups)}, with its number as "client_group": change both '
                    f"halves alike. To drive them apart, give the matrices and the rest groups of their own{apart}"
                )
