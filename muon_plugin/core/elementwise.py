"""What a step does element by element, for many parts of tensors at once: plain torch, in few launches.

Two functions touch every element of this rank's shards: `pack` writes directions (momentum and Nesterov) into a flat
bf16 buffer, `apply` decays weights and adds the updates that lie in such a buffer. What becomes of an element depends
on nothing but the element, and each operation rounds as it is written here.

On CPUs parts are taken one after the other, while they are in the cache. On other devices small parts are taken
together (`torch._foreach_*`), which takes a pass over memory more and a launch for each of them less. On CUDA both
functions are a Triton kernel that goes over a table of the runs (by_table.py), where it has the same bits.
"""

from __future__ import annotations

import functools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import by_table
from .layout import Strided
from .trial import usable

T = TypeVar("T")
#: Elements from which on a part has a launch of its own: a GPU takes longer for it than the host does to launch it.
LARGE = 2**20
#: Elements of smaller parts that are taken together, which bounds the memory of what is computed in between.
PORTION = 2**25


class Run(NamedTuple):
    """Elements of a matrix that lie evenly in one of this rank's tensors and in a flat bf16 buffer.

    Attributes:
        matrix: its number; that of the first where a run goes over several, which then have one scale.
        tensor: the number of the tensor.
        local: where in the tensor.
        at: the same elements in the buffer, in as many runs.
    """

    matrix: int
    tensor: int
    local: Strided
    at: Strided


@dataclass(frozen=True)
class Source:
    """The direction of a tensor's elements: ``values + weight (towards - values)``, or `values` alone. Flat, fp32.

    Attributes:
        gradient, average: a momentum (`towards`, or `values` alone) that `pack` first updates with these, as `average`
            does. Each element must then be packed once.
    """

    values: Tensor
    towards: Tensor | None = None
    weight: float = 0.0
    gradient: Tensor | None = None
    average: float = 0.0

    @property
    def momentum(self) -> Tensor:
        return self.values if self.towards is None else self.towards


@dataclass(frozen=True)
class Target:
    """Flat weights, which become ``decay weights - rate change``."""

    weights: Tensor
    rate: float
    decay: float


#: Is told of a run and its scaled update, fp32.
Seen = Callable[[Run, Tensor], None]


def average(momenta: Sequence[tuple[Tensor, Tensor, float]], together: bool | None = None) -> None:
    """M <- M + weight (G - M), in place, for each (M, G, weight).

    Args:
        momenta: flat or not, each pair of one shape.
        together: whether several parts are taken in one launch; None where the device gives the same bits so.
    """
    alike: dict[tuple[float, torch.device], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for momentum, gradient, weight in momenta:
        if _together(together, momentum.device):
            alike[weight, momentum.device].append((momentum, gradient))
        else:
            momentum.lerp_(gradient, weight)
    for (weight, _), pairs in alike.items():
        for into, gradients in _dense_apart(pairs):
            torch._foreach_lerp_(into, gradients, weight)


def pack(runs: Iterable[Run], sources: Sequence[Source | None], flat: Tensor, together: bool | None = None) -> None:
    """Writes the direction of each run to its place in a bf16 buffer; zeros for tensors without a source.

    Args:
        runs: where they lie in `flat`.
        sources: by the number of a tensor.
        flat: bf16.
        together: as for `average`; parts of LARGE elements are taken one by one.
    """
    if together is None and by_table_on(flat.device) and by_table.pack(runs, sources, flat):
        return
    runs = list(runs)
    due = [(run.local, of) for run in runs if (of := sources[run.tensor]) is not None and of.gradient is not None]
    average(
        [(at.view(of.momentum), at.view(of.gradient), of.average) for at, of in due if of.gradient is not None],
        together,
    )
    copies: list[tuple[Tensor, Tensor]] = []
    small: dict[float, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
    together = _together(together, flat.device)
    for run in runs:
        source, out = sources[run.tensor], run.at.view(flat)
        if source is None:
            out.zero_()
            continue
        values = run.local.view(source.values)
        towards = None if source.towards is None else run.local.view(source.towards)
        if values.device != flat.device:  # what goes to another device is rounded before
            copies.append((out, (values if towards is None else values.lerp(towards, source.weight)).bfloat16()))
        elif towards is None:
            copies.append((out, values))
        elif together and run.at.numel < LARGE and values.is_contiguous():
            small[source.weight].append((values, towards, out))
        else:
            torch.lerp(values, towards, source.weight, out=out)
    copy(copies)
    for weight, parts in small.items():
        for portion in _portions(parts, lambda part: part[2].numel()):
            values_of, towards_of, outs = map(list, zip(*portion))
            copy(zip(outs, torch._foreach_lerp(values_of, towards_of, weight)))


def apply(
    runs: Iterable[Run],
    targets: Sequence[Target | None],
    flat: Tensor,
    scales: Sequence[float],
    factors: Mapping[int, Tensor] | None = None,
    seen: Seen | None = None,
    together: bool | None = None,
) -> None:
    """Updates the weights of runs; those of tensors without a target stay as they are.

    Always in this order: u to fp32, times its scale, times its factor, times the rate. Others round differently.

    Args:
        runs: where they lie in `flat`.
        targets: by the number of a tensor.
        flat: bf16 updates.
        scales: by the number of a matrix.
        factors: likewise, fp32 scalars, where updates are normalized.
        seen: told of each run.
        together: as for `average`; not with `factors`, nor for weights on another device.
    """
    plain = together is not None or factors is not None or seen is not None
    if not plain and by_table_on(flat.device) and by_table.apply(runs, targets, flat, scales):
        return
    held = [(run, target) for run in runs if (target := targets[run.tensor]) is not None]
    here = factors is None and all(target.weights.device == flat.device for _, target in held)
    if here and _together(together, flat.device):
        for portion in _portions(held, lambda pair: pair[0].at.numel):
            _apply_together(portion, flat, scales, seen)
        return
    for run, target in held:
        change = run.at.view(flat).to(target.weights.device).float().mul_(scales[run.matrix])
        if factors is not None:
            change.mul_(factors[run.matrix].to(change.device))
        run.local.view(target.weights).mul_(target.decay).add_(change, alpha=-target.rate)
        if seen is not None:
            seen(run, change)


def _apply_together(
    held: Sequence[tuple[Run, Target]], flat: Tensor, scales: Sequence[float], seen: Seen | None
) -> None:
    alike: dict[tuple[float, float], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for (run, target), change in zip(held, _scaled([run for run, _ in held], flat, scales)):
        alike[target.rate, target.decay].append((run.local.view(target.weights), change))
        if seen is not None:
            seen(run, change)
    for (rate, decay), pairs in alike.items():
        for weights, changes in _dense_apart(pairs):
            torch._foreach_mul_(weights, decay)
            torch._foreach_add_(weights, changes, alpha=-rate)


def copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copies, for each (into, from)."""
    for into, values in _dense_apart(pairs):
        torch._foreach_copy_(into, values)


def _scaled(runs: Sequence[Run], flat: Tensor, scales: Sequence[float]) -> list[Tensor]:
    """The updates of runs in fp32, times their scales."""
    found = {scales[run.matrix] for run in runs}
    begin, end = min(run.at.start for run in runs), max(run.at.end for run in runs)
    if len(found) == 1 and sum(run.at.numel for run in runs) == end - begin:  # nothing lies in between
        changes = torch.mul(flat[begin:end], _scalar(found.pop(), flat.device))
        return [run.at._replace(start=run.at.start - begin).view(changes) for run in runs]
    parts = [run.at.view(flat) for run in runs]
    changes = torch.empty(sum(part.numel() for part in parts), device=flat.device)
    into = [own.view(part.shape) for own, part in zip(torch.split(changes, [part.numel() for part in parts]), parts)]
    copy(zip(into, parts))
    torch._foreach_mul_(into, [scales[run.matrix] for run in runs])
    return into


def _portions(parts: Sequence[T], numel: Callable[[T], int]) -> Iterator[list[T]]:
    """In their order, in lists of at most PORTION elements (or of one part)."""
    portion: list[T] = []
    held = 0
    for part in parts:
        held += numel(part)
        if portion and held > PORTION:
            yield portion
            portion, held = [], numel(part)
        portion.append(part)
    if portion:
        yield portion


def _together(asked: bool | None, device: torch.device) -> bool:
    if asked is not None:
        return asked
    if device.type in ("cpu", "meta"):  # on meta there are no bits: a step is only counted
        return device.type == "meta"
    return same_bits_together(device)


@functools.cache
def same_bits_together(device: torch.device) -> bool:
    """Whether this device gives the same bits for parts that are taken together, tried once on random numbers.

    Which parts are small depends on the layout, and weights must not.
    """
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(3 * 4099, generator=generator, device=device).to(dtype)

    gradient, update = drawn(), drawn(dtype=torch.bfloat16)
    runs = [Run(i, i % 2, at, at) for i, at in enumerate((Strided(0, 4099), Strided(4099, 64), Strided(5000, 3001)))]
    found = []
    for together, momenta, weights in zip((False, True), drawn().expand(2, -1), drawn().expand(2, -1)):
        mine, own = momenta.clone(), weights.clone()
        average([(part.view(mine), part.view(gradient), 0.05) for part in (run.local for run in runs)], together)
        direction = torch.zeros_like(update)
        pack(runs, [Source(gradient, mine, 0.95)] * 2, direction, together)
        apply(runs, [Target(own, 3e-3, 0.999), Target(own, 1e-3, 1.0)], update, [0.2, 6.4, 0.7], together=together)
        found.append(torch.cat([mine, own, direction.float()]))
    same = torch.equal(*found)
    if not same:
        warnings.warn(
            f"muon_plugin: torch's multi-tensor operations round differently on {device} than its single ones: parts "
            "of shards are updated one by one, in more launches",
            stacklevel=2,
        )
    return same


def by_table_on(device: torch.device) -> bool:
    """Whether directions are packed, and updates applied, by a kernel that goes over a table of runs."""
    if device.type == "meta":  # a step of a CUDA device is counted
        return True
    return device.type == "cuda" and torch.version.hip is None and same_bits_by_table(device)


@functools.cache
def same_bits_by_table(device: torch.device) -> bool:
    """Whether the kernels have the bits of plain torch on this device, tried once on random numbers; told if not."""
    what = "Triton kernel for directions and updates"
    return usable(what, device, lambda: _found_alone(device), lambda: _found_by_table(device))


def _found_alone(device: torch.device) -> list[bytes]:
    return _found(device, functools.partial(pack, together=False), functools.partial(apply, together=False))


def _found_by_table(device: torch.device) -> list[bytes]:
    return _found(device, by_table.pack, by_table.apply)


def _found(device: torch.device, packs: Callable[..., Any], applies: Callable[..., Any]) -> list[bytes]:
    """What a step makes of random numbers: momenta, directions and weights; both ways of torch's lerp among them."""
    size, found = 6000, []
    places = Strided(0, 1500), Strided(1501, 64), Strided(1600, 3, 7, 400), Strided(4700, 1)
    runs = tuple(Run(i, i % 2, at, Strided(at.start, at.run, at.stride, at.count)) for i, at in enumerate(places))
    for nesterov in (True, False):
        for weight in (0.95, 0.3):
            generator = torch.Generator(device).manual_seed(0)
            momenta, gradients, weights = torch.randn(3, 2, size, generator=generator, device=device)
            flat = torch.randn(size, generator=generator, device=device).bfloat16()
            sources = [
                Source(g, m, weight, g, 1 - weight) if nesterov else Source(m, gradient=g, average=1 - weight)
                for g, m in zip(gradients, momenta)
            ]
            targets = [Target(weights[0], 3e-3, 0.999), Target(weights[1], 1e-3, 1.0)]
            applies(runs, targets, flat, [0.2, 6.4, 0.7, 1.0])
            packs(runs, sources, flat)
            found += [t.cpu().contiguous().view(torch.uint8).numpy().tobytes() for t in (momenta, weights, flat)]
    return found


@functools.cache
def _scalar(value: float, device: torch.device) -> Tensor:
    """fp32, with a dimension: a product with it is fp32 where the other factor is bf16."""
    return torch.tensor([value], dtype=torch.float32, device=device)


def _dense_apart(parts: Iterable[tuple[Tensor, Tensor]]) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
    """As two lists, the contiguous ones apart from others, on which torch's multi-tensor kernels would not run."""
    kinds: dict[bool, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for one, other in parts:
        kinds[one.is_contiguous() and other.is_contiguous()].append((one, other))
    for alike in kinds.values():
        ones, others = map(list, zip(*alike))
        yield ones, others
