"""What a user can set, checked: an unknown key, a wrong type or a value out of range is a ValueError that says so."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from .adamw import implementations
from .checks import BETAS, PATTERN_TABLE, PATTERNS, SWITCH, above, at_least, in_range, one_of, require, whole
from .coefficients import coefficients_for, notes
from .orthogonalize import DTYPES, METHODS, NewtonSchulz, check_dtype
from .qk_clip import QKClip

MOMENTUM_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ADJUST_LR_FNS = ("match_rms_adamw", "original", "update_norm", "none")
#: What a client's parameter group may set for itself.
GROUP_KEYS = ("lr", "weight_decay", "momentum", "nesterov", "betas", "eps")
#: What schedules read in a group, and optimizers keep.
KEPT_KEYS = ("initial_lr",)
#: Keys that others give a group and that would mean something else here, or nothing: options of other optimizers, and
#: what ours and AdamW's implementations keep there.
FOREIGN_KEYS = (
    *("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"),
    *("correct_bias", "bias_correction", "adam_w_mode", "step", "param_names", "layout", "client_group", "use_muon"),
    *("learning_rate", "wd", "decay", "beta1", "beta2", "epsilon"),
)
#: What each setting may be. muon_lr and adam_lr may also be None; `coefficients_for` checks ns_coefficients, and adamw
#: may be what `adamw.implementations` lists by then.
CHECKS = {
    "lr": at_least(0),
    "muon_lr": at_least(0),
    "adam_lr": at_least(0),
    "weight_decay": at_least(0),
    "momentum": in_range(0, 1),
    "nesterov": SWITCH,
    "ns_steps": whole(1, 99),
    "ns_method": one_of(METHODS),
    "ns_dtype": one_of(DTYPES),
    "adjust_lr_fn": one_of(ADJUST_LR_FNS),
    "betas": BETAS,
    "eps": above(0),
    "momentum_dtype": one_of(MOMENTUM_DTYPES),
    "offload": SWITCH,
    "per_head_muon": SWITCH,
    "exclude": PATTERNS,
    "split": PATTERN_TABLE,
}


@dataclass(frozen=True)
class Settings:
    """The params of ``"type": "Muon"``, and the keyword arguments of `muon_plugin.Muon`.

    Attributes:
        lr, weight_decay: shared by the matrices and the rest, as in the paper.
        momentum, nesterov: of the matrices (Eq. 1; an exponential average, as in ``torch.optim.Muon``).
        ns_steps, ns_coefficients: Newton-Schulz (Eq. 2): a triple, a list of triples, or a set's name.
        ns_method: "standard", "gram", or "auto": fewer FLOPs for the shape.
        ns_dtype: of the Gram form: "bf16", "fp16", or "auto": fp16 on CUDA. The standard form is in bf16.
        adjust_lr_fn: "match_rms_adamw" (Eq. 4: 0.2 sqrt(max(A, B))), "original" (sqrt(max(1, A/B))), "update_norm"
            (Eq. 6: 0.2 / RMS), "none".
        betas, eps: of AdamW.
        momentum_dtype: of the matrices' momentum between steps: "fp32", or "bf16", half of its memory: stochastically
            rounded, and gradients are overwritten in the step.
        offload: the momentum of the matrices is kept in pinned CPU memory between steps, and their gradients are
            overwritten in the step. The same bits.
        per_head_muon: each head of query, key and value is a matrix of its own (Kimi K3, arXiv 2607.24653; GLM-5,
            2602.15763), with the scale of its own shape.
        muon_lr, adam_lr: a learning rate of each half; lr where not given.
        exclude: patterns of names that go to AdamW.
        split: pattern of names -> how a fused projection is taken apart.
        adamw: the AdamW to use: one of `adamw.implementations`.
        qk_clip: None, or the fields of `qk_clip.QKClip`: heads whose attention logits exceed a threshold have their
            query and key weights scaled down after the update.

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
    ns_dtype: str = "auto"
    adjust_lr_fn: str = "match_rms_adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    muon_lr: float | None = None
    adam_lr: float | None = None
    momentum_dtype: str = "fp32"
    offload: bool = False
    per_head_muon: bool = False
    exclude: tuple[str, ...] = ()
    split: Mapping[str, Any] = field(default_factory=dict)
    adamw: str = "auto"
    qk_clip: Any = None

    def __post_init__(self) -> None:
        for key in CHECKS:
            if key not in ("muon_lr", "adam_lr") or getattr(self, key) is not None:
                _check(key, getattr(self, key))
        require(f"adamw={self.adamw!r}", self.adamw, one_of(implementations()))
        check_dtype(f"ns_dtype={self.ns_dtype!r}", f"ns_method={self.ns_method!r}", self.newton_schulz)
        QKClip.of(self.qk_clip)

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
        return NewtonSchulz(coefficients_for(self.ns_steps, self.ns_coefficients), self.ns_method, dtype=self.ns_dtype)

    @property
    def momentum_type(self) -> torch.dtype:
        return MOMENTUM_DTYPES[self.momentum_dtype]

    @property
    def clip(self) -> QKClip | None:
        return QKClip.of(self.qk_clip)

    def describe(self) -> str:
        """One line for the start-up table and the planner."""
        places = [*["in bf16"] * (self.momentum_dtype == "bf16"), *["in CPU memory"] * self.offload]
        momentum = " ".join([f"momentum {self.momentum:g}", *places])
        named = f", {self.ns_coefficients}" if isinstance(self.ns_coefficients, str) else ""
        by_head = ", attention head by head" if self.per_head_muon else ""
        clip = f", QK-Clip at {self.clip.threshold:g}" if self.clip is not None else ""
        form = self.ns_method if self.ns_dtype == "auto" else f"{self.ns_method} in {self.ns_dtype}"
        return f"{self.adjust_lr_fn}, {momentum}, {self.ns_steps} steps ({form}{named}){by_head}{clip}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What the start-up table says of these settings beside their values."""
        return notes(self.newton_schulz.coefficients)

    def of_group(self, given: Mapping[str, Any], muon: bool, extra: Sequence[str] = ()) -> dict[str, Any]:
        """Options of one half of a client's group: its own values first, then the half's, then the shared ones.

        Args:
            given: the keys of the client's group, without its params.
            muon: the half of the matrices, or that of the rest.
            extra: further keys that an engine allows there; they are passed on.

        Keys that no optimizer knows (a schedule's ``lr_scale``) are kept, as torch's optimizers keep them.

        Raises:
            ValueError: for a key that looks like a setting but is none of a group, or a value that is not allowed.
        """
        for key, value in given.items():
            if key in GROUP_KEYS:
                _check(key, value, "param group ")
            elif key not in ("name", *extra) and _looks_like_a_setting(key):
                raise ValueError(
                    f"a parameter group sets {key}={value!r}; allowed there: "
                    f"{', '.join(('params', 'name', *GROUP_KEYS, *extra))}, and keys of your own"
                )
        half_lr = self.muon_lr if muon else self.adam_lr
        options = {"lr": self.lr if half_lr is None else half_lr, "weight_decay": self.weight_decay}
        keys = ("momentum", "nesterov") if muon else ("betas", "eps")
        options |= {key: getattr(self, key) for key in keys}
        kept = {key: value for key, value in given.items() if key not in ("name", *GROUP_KEYS)}
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


def _looks_like_a_setting(key: Any) -> bool:
    """Whether a group's key is an option of an optimizer, or nearly one: a typo must not be kept in silence."""
    known = (*(f.name for f in fields(Settings)), *FOREIGN_KEYS)
    if not isinstance(key, str):
        return True
    of_its_own = any(key.startswith(f"{name}_") for name in known)  # lr_scale
    return key in known or (not of_its_own and bool(difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.8)))


def keys_not_read(given: Mapping[str, Any], extra: Sequence[str] = ()) -> list[str]:
    """The keys of a client's group that neither Muon nor an engine reads."""
    return [key for key in given if key not in ("params", "name", *GROUP_KEYS, *KEPT_KEYS, *extra)]


def _check(key: str, value: Any, where: str = "") -> None:
    hint = "Hugging Face's Trainer fills in lr, weight_decay, betas and eps, accelerate the first two"
    require(f"{where}{key}={value!r}", value, CHECKS[key], hint if value == "auto" else "")
