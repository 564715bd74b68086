"""`pack` and `apply` of elementwise.py by Triton kernels that go over a table of runs (`kernels/table_triton.py`).

The table of some runs is made once, and lies on the device. The addresses of a step's gradients, momenta and weights,
and their rates, are copied there once a step. What does not fit (other dtypes, tensors in CPU memory, tensors without a
gradient) is left to plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .launches import count

if TYPE_CHECKING:
    from .elementwise import Run, Source, Target

#: Elements of a program, as in kernels/table_triton.py.
BLOCK = 1024
#: Elements of a run: the kernels count them in 32 bits.
MOST = 2**31 - BLOCK
#: Tables that are kept.
KEPT = 4096


@dataclass(frozen=True)
class Table:
    """Runs on a device.

    Attributes:
        tensors: the numbers of their tensors.
        numel: their elements.
        blocks: (programs, 2) int32: the number of a run, and of a block of its elements.
        runs: (runs, 7) int64, see `table_triton.FIELDS`.
        scales: (runs,) fp32: of their updates.
    """

    tensors: frozenset[int]
    numel: int
    blocks: Tensor
    runs: Tensor
    scales: Tensor


@dataclass(frozen=True)
class Step:
    """The tensors of a step, by their numbers.

    Attributes:
        kinds: what a kernel is to do with each; None where it cannot.
        pointers: their addresses, int64.
        numbers: fp32 factors of each.
    """

    kinds: Sequence[Any]
    pointers: Tensor
    numbers: Tensor


class Listed(list[Any]):
    """Sources or targets by the number of a tensor. Keeps what is on the device of them."""

    step: Step | None = None


_tables: dict[tuple[int, int, torch.device], tuple[Any, Any, Table | None]] = {}


def pack(runs: Iterable[Run], sources: Sequence[Source | None], flat: Tensor) -> bool:
    """As `elementwise.pack`; False, and nothing is done, where it does not fit."""

    def kind(source: Source | None) -> tuple[bool, bool] | None:
        held = () if source is None else [t for t in (source.values, source.towards, source.gradient) if t is not None]
        fits = source is not None and all(_fits(t, flat.device) for t in held)
        return (source.gradient is not None, source.towards is not None) if source is not None and fits else None

    def row(source: Source) -> tuple[list[int], list[float]]:
        gradient = source.values if source.gradient is None else source.gradient
        return [gradient.data_ptr(), source.momentum.data_ptr()], [source.average, source.weight]

    found = _prepared(runs, sources, flat, None, kind, row)
    if found is None:
        return False
    table, step, (average, nesterov) = found
    if flat.is_meta:
        count(table.numel * (14 if average else 10 if nesterov else 6))
        return True
    from ..kernels import table_triton

    table_triton.pack(table, step.pointers, step.numbers, flat, average, nesterov)
    return True


def apply(runs: Iterable[Run], targets: Sequence[Target | None], flat: Tensor, scales: Sequence[float]) -> bool:
    """As `elementwise.apply` without factors; False, and nothing is done, where it does not fit."""

    def kind(target: Target | None) -> bool | None:
        return True if target is not None and _fits(target.weights, flat.device) else None

    def row(target: Target) -> tuple[list[int], list[float]]:
        return [target.weights.data_ptr()], [target.decay, -target.rate]

    found = _prepared(runs, targets, flat, scales, kind, row)
    if found is None:
        return False
    table, step, _ = found
    if flat.is_meta:
        count(table.numel * 10)
        return True
    from ..kernels import table_triton

    table_triton.apply(table, step.pointers, step.numbers, flat)
    return True


def _prepared(
    runs: Iterable[Run],
    listed: Sequence[Any],
    flat: Tensor,
    scales: Sequence[float] | None,
    kind: Callable[[Any], Any],
    row: Callable[[Any], tuple[list[int], list[float]]],
) -> tuple[Table, Step, Any] | None:
    """The table, the step, and the one kind that all tensors of these runs are of. None where there is none."""
    table = _table(runs, scales, flat.device) if isinstance(runs, tuple) and runs and flat.is_contiguous() else None
    if table is None:
        return None
    step = listed.step if isinstance(listed, Listed) else None
    if step is None:
        step = _step(listed, flat.device, kind, row)
        if isinstance(listed, Listed):
            listed.step = step
    kinds = {step.kinds[number] for number in table.tensors}
    return (table, step, kinds.pop()) if len(kinds) == 1 and None not in kinds else None


def _fits(tensor: Tensor, device: torch.device) -> bool:
    return tensor.dtype == torch.float32 and tensor.device == device and tensor.is_contiguous()


def _step(
    listed: Sequence[Any],
    device: torch.device,
    kind: Callable[[Any], Any],
    row: Callable[[Any], tuple[list[int], list[float]]],
) -> Step:
    kinds = [kind(one) for one in listed]
    found = [None if of is None else row(one) for one, of in zip(listed, kinds)]
    one = next((of for of in found if of is not None), ([0], [0.0, 0.0]))
    addresses = [[0] * len(one[0]) if of is None else of[0] for of in found]
    numbers = [[0.0] * len(one[1]) if of is None else of[1] for of in found]
    if device.type == "meta":  # two small copies
        count(8 * len(addresses) * len(one[0]))
        count(4 * len(numbers) * len(one[1]))
        return Step(kinds, torch.empty(0, device=device), torch.empty(0, device=device))
    pointers, factors = torch.tensor(addresses, dtype=torch.int64), torch.tensor(numbers, dtype=torch.float32)
    return Step(kinds, pointers.to(device, non_blocking=True), factors.to(device, non_blocking=True))


def _table(runs: tuple[Run, ...], scales: Sequence[float] | None, device: torch.device) -> Table | None:
    """Made once, as long as the runs are the same object; None where a run is too long."""
    key = id(runs), id(scales), device
    if key not in _tables:
        if len(_tables) >= KEPT:
            _tables.clear()
        # The runs and scales are kept as well: another object must not get their id.
        _tables[key] = runs, scales, _made(runs, scales, device)
    return _tables[key][2]


def _made(runs: tuple[Run, ...], scales: Sequence[float] | None, device: torch.device) -> Table | None:
    if max(run.local.numel for run in runs) > MOST:
        return None
    rows = [
        [run.tensor, run.local.numel, run.local.run, run.local.start, run.local.stride, run.at.start, run.at.stride]
        for run in runs
    ]
    counts = torch.tensor([-(-run.local.numel // BLOCK) for run in runs])
    numbers = torch.repeat_interleave(torch.arange(len(runs)), counts)
    firsts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    blocks = torch.stack([numbers, torch.arange(len(numbers)) - firsts], 1).int()
    of_runs = [0.0 if scales is None else scales[run.matrix] for run in runs]
    return Table(
        frozenset(run.tensor for run in runs),
        sum(run.local.numel for run in runs),
        blocks.contiguous().to(device),
        torch.tensor(rows, dtype=torch.int64).to(device),
        torch.tensor(of_runs, dtype=torch.float32).to(device),
    )
