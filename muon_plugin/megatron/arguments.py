"""Megatron's command line: what is validated otherwise, and the plugin's own flags. Imports no engine."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from ..core.orthogonalize import DTYPES, METHODS
from .settings import PAPER, PRECISION, SCALAR_OPTIMIZERS, precision_aware


def asks_for_muon(config: Any) -> bool:
    """Whether these arguments, or this OptimizerConfig, mean this Muon: the stock distributed optimizer with Muon."""
    return bool(config.optimizer == "muon" and config.use_distributed_optimizer)


def add_arguments(parser: Any) -> Any:
    """Adds the plugin's flags to Megatron's parser, unless a patched source has done so already."""
    if any("--muon-paper" in action.option_strings for action in parser._actions):
        return parser
    group = parser.add_argument_group("muon_plugin")
    group.add_argument(
        "--muon-paper",
        action=_Paper,
        nargs=0,
        default=argparse.SUPPRESS,
        help="The settings of 'Muon is Scalable for LLM Training'; --muon-* flags after it change them: "
        + ", ".join(f"{key} {value}" for key, value in PAPER.items()),
    )
    group.add_argument(
        "--muon-ns-method",
        default="auto",
        choices=METHODS,
        help="Form of the Newton-Schulz iteration; auto takes the one with fewer FLOPs for each shape",
    )
    group.add_argument(
        "--muon-ns-dtype",
        default="auto",
        choices=DTYPES,
        help="Of the Gram form of Newton-Schulz, which fp16 takes for every shape; auto: fp16 on CUDA, bf16 on the CPU",
    )
    group.add_argument(
        "--muon-offload", action="store_true", help="Keep Muon's momentum in pinned CPU memory between steps"
    )
    if not any("--muon-split-qkv-per-head" in action.option_strings for action in parser._actions):  # of later releases
        group.add_argument(
            "--muon-split-qkv-per-head",
            action="store_true",
            help="Each head of query, key and value is a matrix of its own, also of multi-latent attention's "
            "up-projections",
        )
    if not any("--muon-scalar-optimizer" in action.option_strings for action in parser._actions):  # 0.16.1
        group.add_argument("--muon-scalar-optimizer", default="adam", choices=SCALAR_OPTIMIZERS)
        for number, beta in ((1, 0.95), (2, 0.98)):
            group.add_argument(f"--lion-beta{number}", type=float, default=beta)
    return parser


#: Set by --muon-paper. Not muon_paper, which would set the values once more, over flags after it.
GIVEN = "muon_paper_was_given"


class _Paper(argparse.Action):
    """Sets what --muon-paper stands for."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for key, value in PAPER.items():
            setattr(namespace, key, value)
        namespace.muon_use_nesterov = PAPER["muon_nesterov"]  # its name in 0.16.1
        setattr(namespace, GIVEN, True)


def add_megatron_arguments(original: Callable[..., Any], parser: Any) -> Any:
    return add_arguments(original(parser))


def check_config(original: Callable[..., Any], self: Any) -> Any:
    """OptimizerConfig's checks let only AdamW be precision-aware, and only Transformer Engine's: ours needs neither."""
    if not (asks_for_muon(self) and precision_aware(self)):
        return original(self)
    names = ("use_precision_aware_optimizer", "optimizer_cpu_offload", *PRECISION, "store_param_remainders")
    wanted = {name: getattr(self, name) for name in names}
    plain(self)
    try:
        return original(self)
    finally:
        for name, value in wanted.items():
            setattr(self, name, value)


def plain(config: Any) -> None:
    """Makes the copy of a config that of Megatron's ordinary optimizer: in fp32, on the device."""
    defaults = type(config).__dataclass_fields__
    for name in ("use_precision_aware_optimizer", "optimizer_cpu_offload", *PRECISION):
        setattr(config, name, defaults[name].default)
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = False  # set in a patched Megatron


def validate_args(original: Callable[..., Any], args: Any, *rest: Any, **kwargs: Any) -> Any:
    """Megatron's checks refuse or rewrite every optimizer but Adam and SGD: ours is checked as its AdamW.

    Raises:
        ValueError: for --muon-paper with Megatron's own Muon, which would train with these values in place of ours.
    """
    if not asks_for_muon(args):
        if "muon" in args.optimizer and getattr(args, GIVEN, False):
            distributed = "with" if args.use_distributed_optimizer else "without"
            raise ValueError(
                f"--muon-paper with --optimizer {args.optimizer} {distributed} --use-distributed-optimizer: Megatron's "
                "own Muon would train; allowed: --optimizer muon --use-distributed-optimizer, or no --muon-paper"
            )
        return original(args, *rest, **kwargs)
    # Megatron's wants Transformer Engine for QK-Clip. Ours has the logits of the local attention, too; and where it is
    # not installed, a plan is checked, or the model's construction fails.
    local = getattr(args, "transformer_impl", "") == "local" or find_spec("transformer_engine") is None
    clips_locally = getattr(args, "qk_clip", False) and local
    args.optimizer = "adam"
    if clips_locally:
        args.qk_clip = False
    try:
        return original(args, *rest, **kwargs)
    finally:
        if clips_locally:
            args.qk_clip = True
        if args.use_distributed_optimizer:  # which --freeze-all-layers turns off: then there is nothing to train
            args.optimizer = "muon"
