"""What a user can set, checked: an unknown key, a wrong type or a value out of range is a ValueError that says so."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .adamw import IMPLEMENTATIONS
from .orthogonalize import METHODS, NewtonSchulz, coefficients_for

ADJUST_LR_FNS = ("match_rms_adamw", "original", "update_norm", "none")
#: What a client's parameter group may set for itself.
GROUP_KEYS = ("lr", "weight_decay", "momentum", "nesterov", "betas", "eps")


@dataclass(frozen=True)
class Settings:
    """The params of ``"type": "Muon"``, and the keyword arguments of `muon_plugin.Muon`.

    Attributes:
        lr, weight_decay: shared by the matrices and the rest, as in the paper.
        momentum, nesterov: of the matrices (Eq. 1; an exponential average, as in ``torch.optim.Muon``).
        ns_steps, ns_coefficients: Newton-Schulz (Eq. 2): a triple, a list of triples, or a set's name.
        ns_method: "standard", "gram", or "auto": fewer FLOPs for the shape.
        adjust_lr_fn: "match_rms_adamw" (Eq. 4: 0.2 sqrt(max(A, B))), "original" (sqrt(max(1, A/B))), "update_norm"
            (Eq. 6: 0.2 / RMS), "none".
        betas, eps: of AdamW.
        muon_lr, adam_lr: DeepSpeed's names for a learning rate of each half; lr where not given.
        exclude: patterns of names that go to AdamW.
        split: pattern of names -> how a fused projection is taken apart.
        adamw: the AdamW to use: "auto", or one of `muon_plugin.adamw.IMPLEMENTATIONS`.

    Raises:
        ValueError: with the key, its value and what is allowed.
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    ns_coefficients: Any = (3.4445, -4.7750, 2.0315)
    ns_method: str = "auto"
    adjust_lr_fn: str = "match_rms_adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    muon_lr: float | None = None
    adam_lr: float | None = None
    exclude: tuple[str, ...] = ()
    split: Mapping[str, Any] = field(default_factory=dict)
    adamw: str = "auto"

    def __post_init__(self) -> None:
        for key in ("muon_lr", "adam_lr"):
            if getattr(self, key) is not None:
                _check(key, getattr(self, key))
        for key in ("lr", "weight_decay", "momentum", "nesterov", "ns_steps", "betas", "eps", "exclude", "split"):
            _check(key, getattr(self, key))
        for key, allowed in (("ns_method", METHODS), ("adjust_lr_fn", ADJUST_LR_FNS), ("adamw", IMPLEMENTATIONS)):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}={getattr(self, key)!r} is not known; allowed: {', '.join(allowed)}")
        coefficients_for(self.ns_steps, self.ns_coefficients)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Settings:
        """Settings from keyword arguments or a JSON object; unknown keys are refused."""
        known = [f.name for f in fields(cls)]
        for key in given:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ValueError(f"{key}={given[key]!r} is not a setting of Muon{hint}; allowed: {', '.join(known)}")
        return cls(**given)

    @property
    def newton_schulz(self) -> NewtonSchulz:
        return NewtonSchulz(coefficients_for(self.ns_steps, self.ns_coefficients), self.ns_method)

    def of_group(self, given: Mapping[str, Any], muon: bool, extra: Sequence[str] = ()) -> dict[str, Any]:
        """Options of one half of a client's group: its own values first, then the half's, then the shared ones."""
        for key, value in given.items():
            if key in GROUP_KEYS:
                _check(f"param group {key}", value)
            elif key not in ("name", *extra):
                raise ValueError(
                    f"a parameter group sets {key}={value!r}; allowed there: params, name, {', '.join(GROUP_KEYS)}"
                )
        half_lr = self.muon_lr if muon else self.adam_lr
        options = {"lr": self.lr if half_lr is None else half_lr, "weight_decay": self.weight_decay}
        keys = ("momentum", "nesterov") if muon else ("betas", "eps")
        options |= {key: getattr(self, key) for key in keys}
        kept = {key: given[key] for key in extra if key in given}
        return kept | {key: given.get(key, value) for key, value in options.items()}


def scale_for(adjust_lr_fn: str, outputs: int, inputs: int) -> float:
    """The factor on the orthogonalized update of a matrix A x B (paper, Eqs. 4 and 6, and Keller Jordan's original).

    For "update_norm" this is the 0.2; the owner of the matrix adds 1 / RMS.
    """
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(outputs, inputs))
    if adjust_lr_fn == "original":
        return math.sqrt(max(1, outputs / inputs))
    return 0.2 if adjust_lr_fn == "update_norm" else 1.0


def _check(key: str, value: Any) -> None:
    name = key.rsplit(" ", 1)[-1]

    def number(v: Any) -> bool:
        return isinstance(v, numbers.Real) and not isinstance(v, bool) and math.isfinite(v)

    checks = {
        "lr": (lambda v: number(v) and v >= 0, "a number >= 0"),
        "muon_lr": (lambda v: number(v) and v >= 0, "a number >= 0"),
        "adam_lr": (lambda v: number(v) and v >= 0, "a number >= 0"),
        "weight_decay": (lambda v: number(v) and v >= 0, "a number >= 0"),
        "momentum": (lambda v: number(v) and 0 <= v < 1, "a number from 0 to below 1"),
        "eps": (lambda v: number(v) and v > 0, "a number > 0"),
        "nesterov": (lambda v: isinstance(v, bool), "true or false"),
        "ns_steps": (
            lambda v: isinstance(v, int) and not isinstance(v, bool) and 1 <= v < 100,
            "a whole number from 1 to 99",
        ),
        "betas": (
            lambda v: isinstance(v, (list, tuple)) and len(v) == 2 and all(number(b) and 0 <= b < 1 for b in v),
            "two numbers from 0 to below 1",
        ),
        "exclude": (
            lambda v: isinstance(v, (list, tuple)) and all(isinstance(p, str) and p for p in v),
            'a list of name patterns, such as ["*.router.*"]',
        ),
        "split": (
            lambda v: isinstance(v, Mapping) and all(isinstance(p, str) and p for p in v),
            'an object of name patterns, such as {"*.wqkv": [512, 256, 256]}',
        ),
    }
    test, allowed = checks[name]
    if not test(value):
        hint = " (a string where a number is wanted)" if isinstance(value, str) and "number" in allowed else ""
        if value == "auto":
            hint = " (Hugging Face's Trainer fills in lr, weight_decay, betas and eps, accelerate the first two)"
        raise ValueError(f"{key}={value!r} is not valid{hint}; allowed: {allowed}")
