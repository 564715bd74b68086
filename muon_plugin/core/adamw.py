"""AdamW for the parameters that are not matrices: an existing implementation, chosen once.

On CPU the default is torch's unfused AdamW, whose result does not depend on where a shard is cut. That of fused
implementations does: their vector kernels round tail elements differently (with torch's, 2 of 200,003 elements over 63
cuts).

An engine's package may `offer` the engine's own implementation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .frozen import NONE, Frozen
from .layout import Strided
from .phases import phase

Groups = list[dict[str, Any]]
#: AdamW's state, apart from the number of steps.
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Implementation:
    """An AdamW that a user can choose.

    Attributes:
        build: constructs it over parameter groups; raises an ImportError with the reason if it cannot be used for them.
        integer_steps: whether it counts the steps of each tensor as an int in the tensor's state.
    """

    build: Callable[[Groups], Optimizer]
    integer_steps: bool = False


def _torch(groups: Groups) -> Optimizer:
    return torch.optim.AdamW(groups)


class InFp32(torch.optim.AdamW):
    """torch's AdamW in fp32, for parameters of any dtype: moments are fp32, and only the new weights are rounded."""

    state_dtype = torch.float32

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        given, wide = self.param_groups, []
        for group in given:
            copies = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                copy = p.detach().float()  # the tensor itself where it is fp32
                copy.grad, self.state[copy] = p.grad.float(), self.state[p]
                copies.append((p, copy))
            wide.append(({**group, "params": [copy for _, copy in copies]}, copies))
        self.param_groups = [group for group, _ in wide]
        try:
            return super().step(closure)
        finally:
            self.param_groups = given
            for p, copy in (pair for _, copies in wide for pair in copies):
                del self.state[copy]
                p.detach().copy_(copy)


def _torch_fp32(groups: Groups) -> Optimizer:
    return InFp32(groups)


def _torch_fused(groups: Groups) -> Optimizer:
    return torch.optim.AdamW(groups, fused=True)


def _apex(groups: Groups) -> Optimizer:
    import apex

    if not hasattr(apex, "optimizers"):
        warnings.warn(
            "the installed package 'apex' is not NVIDIA's: PyPI's apex is another project. Another AdamW is used. "
            "To use NVIDIA's, uninstall this package and build apex from NVIDIA's repository",
            stacklevel=2,
        )
        raise ImportError("PyPI's apex is not NVIDIA's apex")
    if any(p.dtype != torch.float32 for group in groups for p in group["params"]):
        raise ImportError("apex's FusedAdam supports only fp32 parameters here, since its kernel requires fp32 state")
    optimizer: Optimizer = apex.optimizers.FusedAdam(groups, adam_w_mode=True)
    return optimizer


#: In the order in which "auto" tries them on CUDA.
_IMPLEMENTATIONS: dict[str, Implementation] = {
    "apex": Implementation(_apex),
    "torch_fused": Implementation(_torch_fused),
    "torch": Implementation(_torch),
    "torch_fp32": Implementation(_torch_fp32),
}
#: Classes of optimizers that were built and count their steps as integers.
_INTEGER_STEPS: set[type[Optimizer]] = set()


def offer(name: str, build: Callable[[Groups], Optimizer], integer_steps: bool = False) -> None:
    """Adds an engine's own implementation, which "auto" tries first on CUDA. Idempotent."""
    others = {key: value for key, value in _IMPLEMENTATIONS.items() if key != name}
    _IMPLEMENTATIONS.clear()
    _IMPLEMENTATIONS.update({name: Implementation(build, integer_steps), **others})


def implementations() -> tuple[str, ...]:
    """What the setting ``adamw`` may be."""
    return ("auto", *_IMPLEMENTATIONS)


def build(groups: Groups, which: str) -> tuple[Optimizer, str]:
    """An AdamW over these parameter groups, and its name for the log.

    Args:
        groups: with "params", "lr", "betas", "eps", "weight_decay".
        which: one of `implementations`. On CUDA, "auto" is the first that can be built of the engine's own, apex's and
            torch's fused AdamW; elsewhere it is torch's unfused AdamW.

    Raises:
        ValueError: if the requested implementation cannot be used.
    """
    on_cuda = _is_cuda(groups)
    order = [which] if which != "auto" else list(_IMPLEMENTATIONS) if on_cuda else ["torch"]
    for name in order:
        implementation = _IMPLEMENTATIONS[name]
        try:
            optimizer = implementation.build(groups)
        except Exception as error:  # a missing package, a kernel that does not build
            if which != "auto":
                raise ValueError(
                    f"adamw={which!r} cannot be used here: {type(error).__name__}: {error}; "
                    f"allowed: {', '.join(implementations())}"
                ) from error
            continue
        if implementation.integer_steps:
            _INTEGER_STEPS.add(type(optimizer))
        inexact = not on_cuda and name not in ("torch", "torch_fp32")
        return optimizer, name + (" (not bit-exact over layouts on CPU)" if inexact else "")
    raise RuntimeError("unreachable: torch's AdamW can always be built")


def _is_cuda(groups: Groups) -> bool:
    return all(p.is_cuda for group in groups for p in group["params"])


def own_options(optimizer: Optimizer) -> dict[str, Any]:
    """The options that this implementation keeps in a parameter group, apart from lr, betas, eps and weight_decay."""
    return {
        key: value for key, value in optimizer.defaults.items() if key not in ("lr", "betas", "eps", "weight_decay")
    }


def moments(optimizer: Optimizer) -> tuple[str, ...]:
    """Names of what it keeps of a tensor's shape: AdamW's two, unless its class says otherwise."""
    return getattr(optimizer, "moments", MOMENTS)


def new_state(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """The state that `optimizer` would create lazily in its first step, in its own format."""
    dtype = getattr(optimizer, "state_dtype", parameter.dtype)
    state: dict[str, Any] = {name: torch.zeros_like(parameter, dtype=dtype) for name in moments(optimizer)}
    optimizer = getattr(optimizer, "counted_as", optimizer)
    if isinstance(optimizer, torch.optim.AdamW):
        fused = bool(optimizer.defaults.get("fused"))
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu")
    elif type(optimizer) in _INTEGER_STEPS:
        state["step"] = 0  # apex keeps it in the group instead
    return state


def adopt(optimizer: Optimizer, group: dict[str, Any], tensors: Sequence[Tensor], state: Any) -> None:
    """Converts a restored group and its tensors' state, which another AdamW may have saved, to `optimizer`'s format."""
    group.update(own_options(optimizer))
    steps = [state[p]["step"] for p in tensors if "step" in state[p]] or [group.pop("step", 0)]
    most = max(float(s) for s in steps)
    for p in tensors:
        fresh, saved = new_state(optimizer, p.reshape(-1)[:0]), state[p].get("step")
        # torch counts for each tensor, some implementations on only one tensor of a group or in the group
        step = float(saved) if isinstance(saved, Tensor) else most
        if "step" not in fresh:
            group["step"] = int(most)
            state[p].pop("step", None)
        else:
            state[p]["step"] = fresh["step"].fill_(step) if isinstance(fresh["step"], Tensor) else int(step)


class AdamWHalf:
    """The tensors that hold no matrices.

    Args:
        optimizer: an AdamW, or a `Lion`, which is given the tensors and their state in each step; None if there are no
            tensors.
        label: its name in the start-up table.
        tensors: those that it updates.
        counts_frozen: whether the number of steps, by which AdamW corrects its bias, is that of the optimizer: then it
            is the same on all layouts, as ZeRO has one number for a flat tensor of several parameters. Otherwise, as in
            torch, steps in which a tensor is frozen are not counted.
        name: of the rule.

    Attributes:
        bytes_each: state of an element.
    """

    def __init__(
        self,
        optimizer: Any = None,
        label: str = "none",
        tensors: Iterable[Tensor] = (),
        counts_frozen: bool = False,
        name: str = "AdamW",
    ) -> None:
        self.optimizer, self.label, self._counts_frozen, self.name = optimizer, label, counts_frozen, name
        self.bytes_each = 4 * len(moments(optimizer))
        self._tensors = dict.fromkeys(tensors)

    @property
    def tensors(self) -> Iterable[Tensor]:
        return self._tensors.keys()

    def new_state(self, p: Tensor) -> dict[str, Any]:
        return new_state(self.optimizer, p.detach())

    def adopt(
        self, group: dict[str, Any], tensors: Sequence[Tensor], state: Any, saved: Mapping[Tensor, Any] | None = None
    ) -> None:
        """Converts restored state to the format of this AdamW; another implementation may have saved it.

        Args:
            group, tensors, state: as restored.
            saved: the state of these tensors as it was saved: torch's own `load_state_dict` casts it to the tensors'
                dtype.
        """
        adopt(self.optimizer, group, tensors, state)
        dtype = getattr(self.optimizer, "state_dtype", None)
        for p in tensors if dtype is not None else ():
            kept = {} if saved is None else saved[p]
            state[p] |= {key: kept[key].to(p.device, dtype, copy=True) for key in MOMENTS if key in kept}

    def step(
        self, groups: Sequence[MutableMapping[str, Any]], state: MutableMapping[Tensor, Any], frozen: Frozen = NONE
    ) -> set[Tensor]:
        """Steps these groups' tensors, except for what is frozen; returns those that were given to the optimizer."""
        stepped: set[Tensor] = set()
        cut: list[tuple[Tensor, Tensor]] = []
        parts: list[tuple[dict[str, Any], MutableMapping[str, Any]]] = []
        for group in groups:
            params = []
            for p in group["params"]:
                if p not in self._tensors:
                    continue
                if frozen.rest.get(p) == ():
                    if self._counts_frozen and "step" in state.get(p, {}):
                        state[p]["step"] += 1
                    continue
                if not state[p] and p.numel():  # it was frozen until now, or on NVMe when the optimizer was attached
                    state[p] = self.new_state(p)
                pieces = _pieces(p, state, frozen.rest[p]) if p in frozen.rest and p.grad is not None else []
                cut += [(p, piece) for piece in pieces]
                params += pieces or [p]
                stepped.add(p)
            if params:
                parts.append(({**group, "params": params}, group))
        if not parts:
            return stepped
        self.optimizer.state, self.optimizer.param_groups = state, [part for part, _ in parts]
        with phase("adamw"):
            self.optimizer.step()
        for p, piece in cut:
            if "step" in state[piece]:
                state[p]["step"] = state[piece]["step"]
            del state[piece]
        for part, group in parts:  # some count their steps in the group
            group.update({key: value for key, value in part.items() if key != "params"})
        return stepped


def _pieces(p: Tensor, state: MutableMapping[Tensor, Any], parts: Sequence[Strided]) -> list[Tensor]:
    """Parts of a tensor as tensors of their own: they share its memory and that of its gradient and its state, where
    they are put as well. AdamW works element by element, so their bits are those of the whole tensor's step."""
    found = []
    for part in parts:
        piece = part.view(p.detach().view(-1))
        piece.grad = part.view(p.grad.reshape(-1)) if p.grad is not None else None
        state[piece] = {
            key: part.view(value.view(-1)) if key in MOMENTS else _own(value) for key, value in state[p].items()
        }
        found.append(piece)
    return found


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
