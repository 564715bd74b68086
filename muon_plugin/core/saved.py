"""Saved parameter groups: which of them are those of this run.

A group is known by its name and the digest of its parameters in order; a state dict has no parameters' names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from .groups import SHARED, Halved, layout_digest
from .settings import GROUP_KEYS

Group = Mapping[str, Any]
#: Keys of a group that are this run's own, whatever a checkpoint holds.
OWN_KEYS = ("name", "use_muon", "client_group", "layout")


def same_groups(saved: Sequence[Group], ours: Sequence[Group]) -> bool:
    """Whether both have the same parameters in the same groups, in the same order."""
    return [_key(group) for group in saved] == [_key(group) for group in ours]


def as_ours(
    saved: Sequence[Group],
    ours: Sequence[Group],
    members: Sequence[Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[dict[str, Any]] | None:
    """The saved groups as this run has them: in its order, and those apart that 0.1.0 merged because they were equal.

    Args:
        saved: the groups of a state dict, whose "params" are numbers.
        ours: this run's groups.
        members: the names of the parameters in each of ours.
        shapes: name -> whole shape.

    Returns:
        A saved group for each of ours; None where the checkpoint does not have the same parameters in them.
    """
    theirs = {_key(group): group for group in saved}
    if len(theirs) < len(saved):
        return None
    apart = [[number] for number in range(len(ours))]
    for together in (apart, _equal(ours)):
        if (found := _matched(theirs, ours, members, shapes, together)) is not None:
            return found
    return None


def _equal(ours: Sequence[Group]) -> list[list[int]]:
    """The numbers of groups that 0.1.0 merged: those of one half with equal options."""
    merged: dict[str, list[int]] = {}
    for number, group in enumerate(ours):
        options = {**group, "lr": group.get("initial_lr", group["lr"])}
        merged.setdefault(repr([options.get(key) for key in ("name", "use_muon", *GROUP_KEYS)]), []).append(number)
    return list(merged.values())


def _matched(
    theirs: Mapping[Any, Group],
    ours: Sequence[Group],
    members: Sequence[Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
    together: Sequence[Sequence[int]],
) -> list[dict[str, Any]] | None:
    found: dict[int, dict[str, Any]] = {}
    for numbers in together:
        names = [name for number in numbers for name in members[number]]
        group = theirs.get((ours[numbers[0]]["name"], layout_digest(names, shapes)))
        if group is None:
            return None
        # ZeRO saves a number for a group, which holds all of its parameters in one flat tensor.
        ids = iter(group["params"]) if len(group["params"]) == len(names) else None
        for number in numbers:
            params = group["params"] if ids is None else list(islice(ids, len(members[number])))
            found[number] = {**group, "params": params}
    return [found[number] for number in range(len(ours))] if len(together) == len(theirs) else None


def difference(saved: Sequence[Group], ours: Sequence[Group], members: Sequence[Sequence[str]]) -> str:
    """What an error says of saved groups that are not those of this run."""
    theirs, mine = [_key(group) for group in saved], [_key(group) for group in ours]
    if not any(layout for _, layout in theirs):
        return "was saved by another optimizer than muon_plugin's Muon"
    if sorted(map(repr, theirs)) == sorted(map(repr, mine)):
        order = [theirs.index(key) for key in mine]
        return f"has this run's parameter groups in another order: this run's are its groups {order}"
    lacking = [
        f"param_groups[{number}] ({key[0]}: {_listed(members[number])})"
        for number, key in enumerate(mine)
        if key not in theirs
    ]
    extra = [f"[{number}] ({key[0]})" for number, key in enumerate(theirs) if key not in mine]
    return (
        f"has {len(theirs)} parameter groups, this run has {len(mine)}. With the same parameters in the same order, "
        f"the checkpoint lacks {', '.join(lacking) or 'none'}, this run its groups {', '.join(extra) or 'none'}"
    )


def check_halves(saved: Sequence[Group] | Mapping[int, Group], halved: Sequence[Halved], advice: str) -> None:
    """Refuses a checkpoint that has two rates, or decays, where this run has one for a client's group.

    Args:
        saved: a saved group for each of this run's groups.
        halved: this run's groups that were split in two.
        advice: what else to do.

    Raises:
        ValueError: with the positions, the values and what to do.
    """
    for halves in halved:
        for key in SHARED:
            matrices, rest = (saved[number].get(key) for number in (halves.matrices, halves.rest))
            if matrices is not None and rest is not None and not Halved.alike(matrices, rest):
                rates = "set muon_lr and adam_lr, as the run that saved it did" if key == "lr" else ""
                raise ValueError(
                    f"the checkpoint has {key} {matrices:g} in group {halves.matrices} and {rest:g} in group "
                    f"{halves.rest}, which are the matrices and the rest of one group in this run, with one {key}. "
                    f"Allowed: {rates}{' (their values come from the checkpoint); ' if rates else ''}give the matrices "
                    f"and the rest groups of their own; or {advice}"
                )


def _key(group: Group) -> tuple[Any, Any]:
    return group.get("name"), group.get("layout")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
