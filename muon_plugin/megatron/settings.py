"""Megatron's ``--muon-*`` flags, with Megatron's meaning and defaults, read from its OptimizerConfig."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import torch

from ..core.checks import SWITCH, above, fraction, in_range, one_of, require, whole
from ..core.coefficients import COEFFICIENT_SETS, coefficients_for, notes
from ..core.layout import Matrix
from ..core.orthogonalize import DTYPES, METHODS, NewtonSchulz, check_dtype

#: The paper's settings in Megatron's terms (Eqs. 1, 2 and 4): what ``--muon-paper`` sets.
PAPER: dict[str, Any] = {
    "muon_momentum": 0.95,
    "muon_nesterov": True,
    "muon_num_ns_steps": 5,
    "muon_coefficient_type": "simple",
    "muon_scale_mode": "spectral",
    "muon_extra_scale_factor": 0.2,
}
#: Factor on the update of a matrix with `a` outputs and `b` inputs.
SCALE_MODES = {
    "spectral": lambda a, b: math.sqrt(max(a, b)),
    "unit_rms_norm": lambda a, b: math.sqrt(a / b),
    "shape_scaling": lambda a, b: math.sqrt(max(1.0, a / b)),
}
#: Fields of Megatron's precision-aware optimizer, and the dtypes of its command line by torch's names.
PRECISION = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "uint8": "fp8"}
TP_MODES = ("blockwise", "duplicated", "distributed")
PRECISIONS = ("low", "medium", "high")
SCALAR_OPTIMIZERS = ("adam", "lion")
#: What each flag may be.
CHECKS = {
    "muon-momentum": in_range(0, 1),
    "muon-nesterov": SWITCH,
    "muon-num-ns-steps": whole(1, 99),
    "muon-coefficient-type": one_of(COEFFICIENT_SETS),
    "muon-scale-mode": one_of(SCALE_MODES),
    "muon-extra-scale-factor": above(0),
    "muon-split-qkv": SWITCH,
    "muon-split-qkv-per-head": SWITCH,
    "muon-ns-method": one_of(METHODS),
    "muon-ns-dtype": one_of(DTYPES),
    "muon-offload": SWITCH,
    "muon-scalar-optimizer": one_of(SCALAR_OPTIMIZERS),
    "lion-beta1": in_range(0, 1),
    "lion-beta2": in_range(0, 1),
    "optimizer-offload-fraction": fraction(),
}
#: Fields that may be set on an OptimizerConfig though its release does not have them.
OURS = (
    "muon_paper",
    "muon_nesterov",
    "muon_coefficient_type",
    "muon_scalar_optimizer",
    "lion_beta1",
    "lion_beta2",
    "muon_ns_method",
    "muon_ns_dtype",
    "muon_offload",
    "muon_split_qkv_per_head",
)


@dataclass(frozen=True)
class Settings:
    """What `from_config` read.

    Attributes:
        momentum, nesterov: ``--muon-momentum``, ``--muon-nesterov`` (0.16.1: ``--muon-use-nesterov``).
        steps, coefficients, method, dtype: Newton-Schulz; the last two are ours (``--muon-ns-method``,
            ``--muon-ns-dtype``).
        scale_mode, extra_scale_factor: the factor on the update.
        split_qkv: attention's fused projections are taken apart.
        per_head: each head of query, key and value is a matrix of its own (``--muon-split-qkv-per-head``).
        offload: the momentum lives in CPU memory (``--muon-offload``).
        scalar: what trains everything but the matrices (``--muon-scalar-optimizer``).
        lion_beta1, lion_beta2: ``--lion-beta1``, ``--lion-beta2``.
        exp_avg, exp_avg_sq: dtypes between steps (``--exp-avg-dtype``, ``--exp-avg-sq-dtype``) of the momentum and of
            AdamW's or Lion's first moment, and of AdamW's second one.
        offload_fraction: how much of the state is in CPU memory between steps (``--optimizer-cpu-offload``,
            ``--optimizer-offload-fraction``).
        lower_bits: of bf16 weights' main parameters only the bits are kept that the weights lack
            (``--use-precision-aware-optimizer``, store_param_remainders).
        fp8_weights: some weights are in fp8 (``--fp8-param-gather``). Main parameters then stay in GPU memory, whole:
            Megatron quantizes them into the weights after the step.
        ignored: flags that were set and do nothing here, and why.

    Raises:
        ValueError: with the flag, its value and what is allowed.
    """

    momentum: float
    nesterov: bool
    steps: int
    coefficients: str
    scale_mode: str
    extra_scale_factor: float
    split_qkv: bool
    method: str
    offload: bool
    per_head: bool = False
    dtype: str = "auto"
    scalar: str = "adam"
    lion_beta1: float = 0.95
    lion_beta2: float = 0.98
    exp_avg: str = "fp32"
    exp_avg_sq: str = "fp32"
    lower_bits: bool = False
    fp8_weights: bool = False
    offload_fraction: float = 0.0
    ignored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        values = {
            "muon-momentum": self.momentum,
            "muon-nesterov": self.nesterov,
            "muon-num-ns-steps": self.steps,
            "muon-coefficient-type": self.coefficients,
            "muon-scale-mode": self.scale_mode,
            "muon-extra-scale-factor": self.extra_scale_factor,
            "muon-split-qkv": self.split_qkv,
            "muon-ns-method": self.method,
            "muon-ns-dtype": self.dtype,
            "muon-offload": self.offload,
            "muon-split-qkv-per-head": self.per_head,
            "muon-scalar-optimizer": self.scalar,
            "lion-beta1": self.lion_beta1,
            "lion-beta2": self.lion_beta2,
            "optimizer-offload-fraction": self.offload_fraction,
        }
        for flag, value in values.items():
            require(f"--{flag} {value!r}", value, CHECKS[flag])
        check_dtype(f"--muon-ns-dtype {self.dtype}", f"--muon-ns-method {self.method}", self.newton_schulz)
        if self.per_head and not self.split_qkv:
            raise ValueError("--muon-split-qkv-per-head and --muon-no-split-qkv exclude each other: drop one")

    @classmethod
    def from_config(cls, config: Any, arguments: Any = None, fp8_weights: bool = False) -> Settings:
        """Reads an OptimizerConfig.

        Args:
            config: of 0.16.1 or 0.19.2; what a release does not have gets the default of 0.19.2.
            arguments: Megatron's command line, for the flags that the OptimizerConfig does not know.
            fp8_weights: whether some of the model's weights are in fp8.
        """
        ignored = []
        if config is not arguments:
            _check_names(config)
        if getattr(config, "muon_paper", False):  # set from Python; the command line sets what it stands for
            config = _as_in_the_paper(config)

        def ours(key: str, default: Any) -> Any:
            return getattr(config, key, getattr(arguments, key, default))

        mode = getattr(config, "muon_tp_mode", "blockwise")
        require(f"--muon-tp-mode {mode}", mode, one_of(TP_MODES))
        if mode != "blockwise":  # the default, so perhaps not asked for
            ignored.append(f"--muon-tp-mode {mode} does nothing: every matrix is orthogonalized whole, once")
        precision = getattr(config, "muon_fp32_matmul_prec", "medium")
        require(f"--muon-fp32-matmul-prec {precision}", precision, one_of(PRECISIONS))
        if precision != "medium":
            ignored.append(f"--muon-fp32-matmul-prec {precision} does nothing: see --muon-ns-dtype")
        return cls(
            momentum=config.muon_momentum,
            nesterov=getattr(config, "muon_nesterov", getattr(config, "muon_use_nesterov", False)),
            steps=config.muon_num_ns_steps,
            coefficients=ours("muon_coefficient_type", "quintic"),
            scale_mode=config.muon_scale_mode,
            extra_scale_factor=config.muon_extra_scale_factor,
            split_qkv=config.muon_split_qkv,
            method=ours("muon_ns_method", "auto"),
            offload=ours("muon_offload", False),
            per_head=ours("muon_split_qkv_per_head", False),
            dtype=ours("muon_ns_dtype", "auto"),
            scalar=ours("muon_scalar_optimizer", "adam"),
            lion_beta1=ours("lion_beta1", 0.95),
            lion_beta2=ours("lion_beta2", 0.98),
            offload_fraction=_offload_fraction(config),
            fp8_weights=fp8_weights,
            **_precision(config, fp8_weights),
            ignored=tuple(ignored),
        )

    @property
    def newton_schulz(self) -> NewtonSchulz:
        return NewtonSchulz(coefficients_for(self.steps, self.coefficients), self.method, dtype=self.dtype)

    @property
    def frees(self) -> bool:
        """Whether main parameters do not stay in memory between steps."""
        return (self.lower_bits or self.offload_fraction > 0) and not self.fp8_weights

    @property
    def rounded(self) -> dict[str, torch.dtype]:
        """Moments that are not in fp32 between steps: only bf16 is allowed beside it."""
        names = {"momentum_buffer": self.exp_avg, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {name: torch.bfloat16 for name, dtype in names.items() if dtype != "fp32"}

    @property
    def state_bytes(self) -> tuple[int, int]:
        """State of an element of a matrix, and of any other; main parameters apart."""
        first, second = (4 if dtype == "fp32" else 2 for dtype in (self.exp_avg, self.exp_avg_sq))
        return first, first + second * (self.scalar != "lion")

    def copied_bytes(self, masters: bool) -> tuple[float, float]:
        """What a step copies of an element of a matrix, and of any other, into fp32 on the device (`precision.Kept`).

        Args:
            masters: whether main parameters are not the weights themselves.
        """
        first, second = (
            4 * self.offload_fraction if dtype == "fp32" else 4 for dtype in (self.exp_avg, self.exp_avg_sq)
        )
        main = masters * self.frees * 4 * (1.0 if self.lower_bits else self.offload_fraction)
        return main + first, main + first + second * (self.scalar != "lion")

    @property
    def notes(self) -> tuple[str, ...]:
        """What the start-up table says of these settings beside their values."""
        return (*self.ignored, *notes(self.newton_schulz.coefficients))

    def scale(self, matrix: Matrix) -> float:
        return SCALE_MODES[self.scale_mode](*matrix.out_in) * self.extra_scale_factor

    def describe(self) -> str:
        """One line for the start-up table, with what differs from the paper."""
        flags = {
            "muon_momentum": self.momentum,
            "muon_nesterov": self.nesterov,
            "muon_num_ns_steps": self.steps,
            "muon_coefficient_type": self.coefficients,
            "muon_scale_mode": self.scale_mode,
            "muon_extra_scale_factor": self.extra_scale_factor,
        }
        form = self.method if self.dtype == "auto" else f"{self.method} in {self.dtype}"
        ours = (
            f"scale {self.extra_scale_factor:g} x {self.scale_mode}, momentum {self.momentum:g}"
            f"{' (Nesterov)' if self.nesterov else ''}, {self.steps} steps ({self.coefficients}, {form})"
            f"{', momentum in CPU memory' if self.offload else ''}"
            f"{f', the rest by Lion ({self.lion_beta1:g}, {self.lion_beta2:g})' if self.scalar == 'lion' else ''}"
            f"{', attention head by head' if self.per_head else ''}"
            f"{'' if self.split_qkv else ', attention projections fused'}"
        )
        other = [f"{key.removeprefix('muon_')} {PAPER[key]}" for key, value in flags.items() if value != PAPER[key]]
        dtypes = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        ours += "".join(f", {name} in {dtype}" for name, dtype in dtypes.items() if dtype != "fp32")
        if self.offload_fraction:
            what = "moments" if self.fp8_weights else "state"
            ours += f", {self.offload_fraction:.0%} of the {what} in CPU memory"
        ours += ", of main parameters the 16 bits that weights lack" * self.lower_bits
        return ours + (f"; the paper has {', '.join(other)} (--muon-paper)" if other else "; as in the paper")


def precision_aware(config: Any) -> bool:
    return bool(getattr(config, "use_precision_aware_optimizer", False))


def dtype_name(config: Any, field: str) -> str:
    """As on the command line: fp32, bf16, fp16, fp8."""
    name = str(getattr(config, field, "fp32")).removeprefix("torch.")
    return DTYPE_NAMES.get(name, name)


def _precision(config: Any, fp8_weights: bool) -> dict[str, Any]:
    if not precision_aware(config):
        return {}
    # As Megatron, under which FusedAdam does not hold main parameters with these recipes. Every launch line has a
    # recipe, with or without fp8: delayed is the default.
    whole = getattr(config, "fp8_recipe", None) not in (None, "delayed")
    lower_bits = bool(getattr(config, "store_param_remainders", True) and getattr(config, "bf16", False))
    return {
        "exp_avg": dtype_name(config, "exp_avg_dtype"),
        "exp_avg_sq": dtype_name(config, "exp_avg_sq_dtype"),
        "lower_bits": lower_bits and not whole and not fp8_weights,
    }


def _offload_fraction(config: Any) -> Any:
    offloads = getattr(config, "optimizer_cpu_offload", False)
    return getattr(config, "optimizer_offload_fraction", 1.0) if offloads else 0.0


def _as_in_the_paper(config: Any) -> Any:
    """The same settings with the paper's; one that says something else by itself would be ignored, and is refused."""
    defaults = {field.name: field.default for field in fields(config)} if is_dataclass(config) else {}
    for key, value in PAPER.items():
        own = getattr(config, key, value)
        if own not in (value, defaults.get(key, own)):
            raise ValueError(
                f"OptimizerConfig.{key}={own!r} and muon_paper=True ({value!r}) exclude each other: drop one"
            )
    return SimpleNamespace(**{**vars(config), **PAPER})


def _check_names(config: Any) -> None:
    """An attribute that is no field of this release's OptimizerConfig, nor ours, would do nothing."""
    known = {*(field.name for field in fields(config)), *OURS} if is_dataclass(config) else set(vars(config))
    for key in vars(config):
        if "muon" in key and key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            every = ", ".join(sorted(name for name in known if "muon" in name))
            raise ValueError(f"OptimizerConfig.{key} is not a setting of this release; {hint}allowed: {every}")
