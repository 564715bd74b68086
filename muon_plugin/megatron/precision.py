"""What is kept of the optimizer's state between steps: Megatron's precision-aware optimizer and its CPU offload.

Under AdamW, Transformer Engine's FusedAdam does the one, and holds the main parameters; HybridDeviceOptimizer does the
other, and steps what it offloads on the CPU. Here Megatron builds its ordinary optimizer, with main parameters in fp32,
and a step works on fp32 tensors on the device. Before and after it:

- moments whose dtype is bf16 are rounded to the nearest, as FusedAdam does, but for the momentum of matrices, which is
  rounded stochastically (core/rounding.py);
- of the main parameter of a bf16 weight only the lower 16 bits are kept, as FusedAdam does: the weight has the upper
  ones. The weight is the main parameter rounded to the nearest; one that lies halfway is rounded away from zero. So the
  main parameter can be put together again, to the bit;
- what is offloaded is copied from and to pinned CPU memory.

All of it works element by element, so the result does not depend on where a shard is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..core.rounding import stochastic

MOMENTUM = "momentum_buffer"
MOMENTS = (MOMENTUM, "exp_avg", "exp_avg_sq")


def split(main: Tensor, weight: Tensor) -> Tensor:
    """Rounds fp32 values into a bf16 weight, and returns the int16 bits that it lacks."""
    bits = main.view(torch.int32)
    lower = bits.to(torch.int16)  # the lower 16 bits
    weight.view(torch.int16).copy_((bits >> 16) + (lower < 0))
    weight.masked_fill_(main.isnan(), torch.nan)  # of which rounding up could make a number
    return lower


def joined(weight: Tensor, lower: Tensor) -> Tensor:
    """The fp32 values that `split` was given."""
    upper = weight.view(torch.int16).to(torch.int32) - (lower < 0).to(torch.int32)
    return ((upper << 16) | (lower.to(torch.int32) & 0xFFFF)).view(torch.float32)


class Kept:
    """What is kept of the state of one optimizer.

    Args:
        state: of the optimizer. Its moments are given their dtypes and their places at once.
        dtypes: names of moments -> their dtype between steps; others stay in fp32.
        weights: main parameters, each in memory of its own -> the fp16 or bf16 weights that they update. If there are
            any, Megatron need not copy the one to the other.
        lower_bits: whether only the bits are kept of main parameters that their bf16 weights lack.
        offloaded: tensors of the optimizer whose state is kept in CPU memory, as they are themselves if in `weights`.
    """

    def __init__(
        self,
        state: Callable[[], MutableMapping[Tensor, Any]],
        dtypes: Mapping[str, torch.dtype],
        weights: Mapping[Tensor, Tensor],
        lower_bits: bool,
        offloaded: Collection[Tensor],
    ) -> None:
        self._state, self._offloaded = state, offloaded
        self._dtypes = {**dict.fromkeys(MOMENTS, torch.float32), **dtypes}
        self._weights = dict(weights)
        self._lower_bits = {main for main, weight in weights.items() if lower_bits and weight.dtype == torch.bfloat16}
        #: main parameters that have no memory between steps -> what is kept of them
        self._mains: dict[Tensor, Tensor] = {}
        self._close({}, None)

    @property
    def nbytes(self) -> int:
        """Of main parameters that have no memory of their own."""
        return sum(kept.nbytes for kept in self._mains.values())

    def main(self, main: Tensor) -> Tensor:
        """The values of a main parameter; between steps a copy, if it has no memory."""
        if main not in self._mains:
            return main
        kept = self._mains[main].to(main.device)
        return joined(self._weights[main], kept) if main in self._lower_bits else kept

    def set_main(self, main: Tensor, values: Tensor) -> None:
        if main in self._lower_bits:
            values = values.to(main.device, torch.float32, copy=True).view(main.shape)
            self._mains[main].copy_(split(values, self._weights[main]))
        else:
            self._mains.get(main, main).copy_(values)

    @contextmanager
    def opened(self, step: int | None = None) -> Iterator[None]:
        """While it lasts, the state is in fp32, on the device, with every main parameter in its memory.

        Args:
            step: the number of the step that is made meanwhile; None where moments stay as they are.
        """
        before = {}
        for p, name, moment in self._kept_otherwise():
            before[p, name] = moment
            self._state()[p][name] = moment.to(p.device, torch.float32, copy=True)
        for main in self._mains:
            values = self.main(main)
            main.untyped_storage().resize_(main.numel() * main.element_size())
            main.copy_(values)
        try:
            yield
        finally:
            self._close(before, step)

    def _kept_otherwise(self) -> list[tuple[Tensor, str, Tensor]]:
        """Moments that are kept in another dtype or place than they have in a step."""
        return [
            (p, name, of_tensor[name])
            for p, of_tensor in self._state().items()
            for name in self._dtypes.keys() & of_tensor.keys()
            if self._dtypes[name] != torch.float32 or p in self._offloaded
        ]

    def close(self) -> None:
        """Gives moments that a checkpoint has brought their dtypes and places."""
        self._close_moments({}, None)

    def _close(self, before: Mapping[tuple[Tensor, str], Tensor], step: int | None) -> None:
        for main, weight in self._weights.items():
            if main in self._lower_bits:
                kept = split(main, weight)
            else:
                weight.copy_(main)
                kept = main
            if main in self._offloaded:
                kept = _put(kept, self._mains.get(main))
            if kept is not main:
                self._mains[main] = kept
                main.untyped_storage().resize_(0)
        self._close_moments(before, step)

    def _close_moments(self, before: Mapping[tuple[Tensor, str], Tensor], step: int | None) -> None:
        for p, name, moment in self._kept_otherwise():
            kept, dtype = before.get((p, name)), self._dtypes[name]
            if step is not None and name == MOMENTUM and dtype == torch.bfloat16:
                moment = stochastic(moment, step)
            if p in self._offloaded:
                kept = _put(moment.to(dtype), kept)
            else:
                kept = moment.to(dtype) if kept is None else kept.copy_(moment)
            self._state()[p][name] = kept


def _put(tensor: Tensor, place: Tensor | None) -> Tensor:
    """A copy in CPU memory, pinned where that is faster; in `place`, once there is one."""
    if place is None:
        place = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
    return place.copy_(tensor)


def first_part(tensors: Collection[Tensor], fraction: float) -> set[Tensor]:
    """The first of these tensors, up to so much of their elements."""
    most, found = fraction * sum(p.numel() for p in tensors), set()
    for p in tensors:
        most -= p.numel()
        if most < 0:
            break
        found.add(p)
    return found
