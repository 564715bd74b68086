"""What is proven of a run: at start, that every element of every parameter is trained by one half, in one place; in
the first step, that it was.

`layout.check_once` proves the same of each matrix when it is planned, `Call` of each tensor.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .agreement import gather
from .call import Call
from .frozen import Frozen
from .holders import holders, publish
from .layout import Matrix, Strided, by_parameter, check_once


def check_routing(matrices: Sequence[Matrix], rest: Collection[str], shapes: Mapping[str, Sequence[int]]) -> None:
    """Checks that every parameter is in one half, and that the matrices of one make up all of it.

    Args:
        matrices: Muon's.
        rest: names of AdamW's parameters.
        shapes: whole shapes of all parameters, by name.

    Raises:
        ValueError: for the first parameter of which this is not true.
    """
    of_parameter = by_parameter(matrices)
    for name in {**shapes, **of_parameter, **dict.fromkeys(rest)}:
        if (name in rest) is (name in of_parameter) or name not in shapes:
            raise ValueError(f"parameter {name} is in both halves of the optimizer, or in none. Please report this")
        if name in of_parameter:
            wheres = [matrices[number].where for number in of_parameter[name]]
            check_once(name, math.prod(shapes[name]), wheres, "its matrices")


def held(call: Call, shapes: Mapping[str, Sequence[int]], device: torch.device) -> set[str]:
    """The parameters that the ranks of a call hold, each element once (replicas apart). Collective.

    Args:
        call: which one.
        shapes: whole shapes of all parameters, by name; the same on every rank.
        device: of this rank.

    Raises:
        ValueError: on every rank, for a parameter of which that is not true.
    """
    parameters, index = publish(whole(shapes), call.shards, call.process_group, device)
    holders(parameters, index)
    return {parameter.name for parameter in parameters}


def whole(shapes: Mapping[str, Sequence[int]]) -> list[Matrix]:
    """Parameters as if each were one matrix."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    return [Matrix(name, name, 1, numel, Strided(0, numel)) for name, numel in sizes.items()]


def check_calls(
    half: str, names: Iterable[str], calls: Sequence[Collection[str]], shapes: Mapping[str, Sequence[int]]
) -> None:
    """Checks that each parameter of a half is in exactly one of the calls that the engine makes of its step.

    Args:
        half: its name.
        names: of its parameters.
        calls: for each call, the names of the parameters that its ranks hold.
        shapes: whole shapes of all parameters, by name; those without elements are not looked for.

    Raises:
        ValueError: for a parameter that is in none, in several, or in no half's.
    """
    found, own = Counter(name for call in calls for name in call), dict.fromkeys(names)
    for name in {**own, **found}:
        if math.prod(shapes[name]) and (found[name] != 1 or name not in own):
            raise ValueError(
                f"{half} is to train parameter {name}, which is in {found[name]} calls of the engine's step; each has "
                "to be in one. Please report the engine's release and settings"
            )


class FirstStep:
    """Proves that the first step of an engine reaches all that it should: every tensor of every call, in either half.

    An engine may make one step of several calls (ZeRO: one for each group). The first step is over when all calls were
    made, or when one comes for the second time.

    Args:
        calls: those that the engine will make.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls
        #: tensor -> name of a parameter -> how many of its elements are there
        self._held: dict[Tensor, dict[str, int]] = {p: {} for call in calls for p in call.tensors}
        for call in calls:
            for shard in call.shards:
                of_tensor = self._held[shard.tensor]
                of_tensor[shard.parameter] = of_tensor.get(shard.parameter, 0) + shard.local.numel
        self._made: set[int] = set()
        #: the same of what has to be updated still
        self._lacking = dict(self._held)
        self._frozen: set[str] = set()

    def begin(self, tensors: Sequence[Tensor], frozen: Frozen) -> None:
        """A call with these tensors, before it changes anything. Collective where a step has ended without all.

        Raises:
            RuntimeError: on every rank, if the step before has left something out.
        """
        given = set(tensors)
        # Megatron may leave a rank without a tensor in a call that all ranks make.
        now = {i for i, call in enumerate(self._calls) if not call.tensors or not given.isdisjoint(call.tensors)}
        if now & self._made:
            self._check()
        self._made |= now
        self._frozen |= frozen.names
        for p in tensors:  # what has no gradient is skipped, as in torch's optimizers
            self._lacking[p] = dict(self._held[p]) if p.grad is not None else {}

    def applied(self, p: Tensor, parameter: str, elements: int) -> None:
        """So many elements of a parameter that are in this tensor were updated."""
        self._lacking[p][parameter] -= elements

    def stepped(self, tensors: Iterable[Tensor]) -> None:
        """AdamW was given these tensors."""
        for p in tensors:
            self._lacking[p] = dict.fromkeys(self._lacking[p], 0)

    def end(self) -> bool:
        """After a call: whether the first step is over, and has left nothing out. Collective where it is over.

        Raises:
            RuntimeError: on every rank, if it has left something out.
        """
        if len(self._made) < len(self._calls):
            return False
        self._check()
        return True

    def _check(self) -> None:
        error = self._first_left_out()
        groups: list[Any] = []
        for call in self._calls:
            if not any(call.process_group is group for group in groups):
                groups.append(call.process_group)
        # Twice: dense layers and experts are in groups of other ranks, and what one has told is passed on to the other.
        for group in [*groups, *groups]:
            error = next((told for told in gather(error, group) if told is not None), None)
        if error is not None:
            raise RuntimeError(error)

    def _first_left_out(self) -> str | None:
        """What is wrong with the first parameter of which this rank knows something, if there is one."""
        for number, call in enumerate(self._calls):
            for p in call.tensors:
                for name, elements in self._lacking[p].items():
                    if elements and name not in self._frozen:
                        why = f"{abs(elements):,} of the {self._held[p][name]:,} elements that a rank holds of it were "
                        why += "not updated" if elements > 0 else "updated twice"
                        if number not in self._made:
                            why = "the engine did not step its parameter group"
                        return (
                            f"the first step left out parameter {name}, which requires gradients: {why}. Please report "
                            "this, with the engine's release and settings"
                        )
        return None
