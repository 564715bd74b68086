"""Saved parameter groups: which of them are those of this run.

A group is known by its name and the digest of its parameters in order; a state dict has no parameters' names. 0.1.0 had
no frozen parameters in its groups, and merged equal groups.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import count, islice
from typing import Any

from .frozen import FROZEN
from .groups import SHARED, Halved, layout_digest
from .settings import GROUP_KEYS

Group = Mapping[str, Any]
#: Keys of a group that are this run's own, whatever a checkpoint holds.
OWN_KEYS = ("name", "use_muon", "client_group", "layout", FROZEN)


def as_ours(
    saved: Sequence[Group],
    ours: Sequence[Group],
    members: Sequence[Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
    frozen: Collection[str] = (),
    any_order: bool = True,
) -> list[dict[str, Any]] | None:
    """The saved groups as this run has them: with the parameters that were frozen from the start on; and with
    `any_order` in its order, and those apart that 0.1.0 merged because they were equal.

    Args:
        saved: the groups of a state dict, whose "params" are numbers.
        ours: this run's groups.
        members: the names of the parameters in each of ours.
        shapes: name -> whole shape.
        frozen: the names of parameters that 0.1.0 did not have.
        any_order: whether groups are looked for; otherwise they have to be this run's, one by one.

    Returns:
        A saved group for each of ours; None where the checkpoint does not have the same parameters in them.
    """
    find = _in_any_order if any_order else _in_order
    if (found := find(saved, ours, members, shapes)) is not None or not frozen:
        return found
    trained = [[name for name in names if name not in frozen] for names in members]
    kept = [number for number, names in enumerate(trained) if names]
    found = find(saved, [ours[number] for number in kept], [trained[number] for number in kept], shapes)
    return None if found is None else _with_frozen(dict(zip(kept, found)), ours, members, frozen)


def _with_frozen(
    found: Mapping[int, Group], ours: Sequence[Group], members: Sequence[Sequence[str]], frozen: Collection[str]
) -> list[dict[str, Any]]:
    """Saved groups of trained parameters alone, by our number, as groups that hold what was frozen as well.

    A group that had nothing but frozen parameters has the rate of the other half of the client's group, where both
    halves have one rate now.
    """
    new = count(-1, -1)
    groups = []
    for number, (group, names) in enumerate(zip(ours, members, strict=True)):
        theirs = found.get(number)
        if theirs is None:
            other = next((n for n in found if ours[n]["client_group"] == group["client_group"]), None)
            shared: dict[str, Any] = {}
            if other is not None and all(Halved.alike(group[key], ours[other][key]) for key in SHARED):
                shared = {key: found[other][key] for key in (*SHARED, "initial_lr") if key in found[other]}
            theirs = {**group, "params": [], **shared}
        ids = iter(theirs["params"])
        params = [next(new) if name in frozen else next(ids) for name in names]
        groups.append({**theirs, "params": params, FROZEN: [i for i, name in enumerate(names) if name in frozen]})
    return groups


def _in_order(
    saved: Sequence[Group],
    ours: Sequence[Group],
    members: Sequence[Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[dict[str, Any]] | None:
    keys = [(group["name"], layout_digest(names, shapes)) for group, names in zip(ours, members)]
    return [dict(group) for group in saved] if [_key(group) for group in saved] == keys else None


def _in_any_order(
    saved: Sequence[Group],
    ours: Sequence[Group],
    members: Sequence[Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[dict[str, Any]] | None:
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
