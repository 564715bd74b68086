"""The command line: arguments, the plan, and what is printed of it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..command_line import Parser, positive, positive_number, split_at_dashes
from . import models, plot, tables
from .cost import Rates, plan_stages
from .counts import META
from .models import Model, Parallel
from .planned import Planned, Training

USAGE = """python -m muon_plugin.planner MODEL --nodes N --gpus-per-node N [OPTIONS]

MODEL is one of
  --megatron FILE       Megatron's arguments in a text file (or all of them after --); needs Megatron-LM 0.19
  --hf CONFIG           a Hugging Face config.json, or its folder, under DeepSpeed's ZeRO
  --shapes FILE         names and shapes in a JSON file, under DeepSpeed's ZeRO (docs/planner.md has the format)"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m muon_plugin.planner", usage=USAGE, allow_abbrev=False)
    for flag in ("--megatron", "--hf", "--shapes"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", metavar="JSON", help="DeepSpeed config of --hf or --shapes: Muon, ZeRO, dtypes")
    parser.add_argument("--nodes", type=positive, required=True)
    parser.add_argument("--gpus-per-node", type=positive, required=True)
    for size, help_text in (
        ("tp", "tensor"),
        ("pp", "pipeline"),
        ("ep", "expert"),
        ("cp", "context (or Ulysses'), which ZeRO shards over as over data"),
    ):
        parser.add_argument(
            f"--{size}", type=positive, help=f"{help_text} parallel size; what is left of the ranks is DP"
        )
    parser.add_argument(
        "--strict", action="store_true", help="an argument that Megatron does not know is an error, as at a job's start"
    )
    parser.add_argument("--checked", nargs=2, type=positive, help=argparse.SUPPRESS)  # TP, PP: the preflight's
    parser.add_argument("--zero-stage", type=int, help="0 to 3, in the place of the DeepSpeed config's; 1 without one")
    rates = Rates()
    for flag, text in (
        ("tflops", "of Newton-Schulz's bf16 products a rank, 1e12 a second"),
        ("gb-per-s", "network of a rank, each way, 1e9 bytes a second"),
        ("memory-gb-per-s", "memory of a rank, 1e9 bytes a second"),
        ("launch-us", "host time of a kernel, 1e-6 seconds"),
        ("batch-us", "latency of a collective or of messages posted together, 1e-6 seconds"),
    ):
        default = getattr(rates, flag.replace("-", "_"))
        parser.add_argument(f"--{flag}", type=positive_number, default=default, help=f"{text} (default {default:g})")
    parser.add_argument(
        "--gpu-memory-gb", type=positive_number, default=80, help="of a GPU, 1e9 bytes (default %(default)g)"
    )
    parser.add_argument("--tokens", type=positive_number, help="of a step over all ranks: with it, Muon's share of one")
    parser.add_argument("--tokens-per-s", type=positive_number, help="that a rank trains on with AdamW")
    parser.add_argument("--plot", metavar="PNG", help="draw the balance over ranks, and step times over DP sizes")
    parser.add_argument("--json", action="store_true", help="print JSON, with the counts of every rank")
    return parser


def run(arguments: Sequence[str]) -> Planned:
    """Plans what the arguments say, and draws the plot where they ask for it.

    Raises:
        ValueError: for a bad argument, with its value and what is allowed.
    """
    mine, rest = split_at_dashes(arguments)
    own = _parser().parse_args(mine)
    ranks = own.nodes * own.gpus_per_node
    model = _model(own, rest, ranks)
    sizes = model.sizes(ranks)
    checked = own.checked or [sizes["tp"], sizes["pp"]]
    if [sizes["tp"], sizes["pp"]] != checked:
        raise ValueError(
            f"the plan has TP {sizes['tp']}, PP {sizes['pp']}, and preflight checks the groups of --tp {checked[0]} "
            f"--pp {checked[1]}; allowed: one layout. Give the job's --tp and --pp before the --, no others after it"
        )
    if ranks % model.unit:
        raise ValueError(
            f"--nodes {own.nodes} x --gpus-per-node {own.gpus_per_node}: {ranks} ranks; allowed: a multiple of "
            f"{model.unit} ({', '.join(f'{key.upper()} {sizes[key]}' for key in ('tp', 'pp', 'ep', 'cp'))})"
        )
    if own.plot:
        plot.check(own.plot)
    if (own.tokens is None) is not (own.tokens_per_s is None):
        raise ValueError(
            f"--tokens {own.tokens} with --tokens-per-s {own.tokens_per_s}; allowed: both (tokens of a step over all "
            "ranks, and tokens a second that a rank trains on with AdamW), or none"
        )
    newton_schulz = model.newton_schulz.on(META)
    sweep = {
        n: plan_stages(model.stages(n), newton_schulz, model.scalars, model.state)
        for n in (_sweep(ranks, model.unit) if own.plot else [ranks])
    }
    rates = Rates(own.tflops, own.gb_per_s, own.memory_gb_per_s, own.launch_us, own.batch_us)
    planned = Planned(
        model,
        own.nodes,
        own.gpus_per_node,
        sweep[ranks],
        rates,
        sweep,
        own.json,
        own.gpu_memory_gb * 1e9,
        Training(own.tokens, own.tokens_per_s) if own.tokens else None,
    )
    if own.plot:
        plot.draw(planned, Path(own.plot))
    return planned


def _model(own: argparse.Namespace, rest: Sequence[str], ranks: int) -> Model:
    given = {"--megatron": own.megatron, "--hf": own.hf, "--shapes": own.shapes, "--": rest or None}
    named = [flag for flag, value in given.items() if value is not None]
    if len(named) != 1:
        how = f"the model is given by {' and '.join(named)}" if named else "no model is given"
        raise ValueError(f"{how}; allowed: one of {', '.join(given)}")
    parallel = Parallel(own.tp, own.pp, own.ep, own.cp)
    if own.strict and (own.hf is not None or own.shapes is not None):
        raise ValueError("--strict without Megatron's arguments; allowed: with --megatron, or arguments after --")
    if own.hf is None and own.shapes is None:
        for flag in ("deepspeed", "zero_stage"):
            if getattr(own, flag) is not None:
                name = flag.replace("_", "-")
                raise ValueError(
                    f"--{name} {getattr(own, flag)} with Megatron's arguments; allowed: with --hf or --shapes"
                )
        arguments = models.megatron_arguments(own.megatron) if own.megatron else rest
        return models.megatron(arguments, parallel, ranks, own.strict)
    config = models.read_json(own.deepspeed, "--deepspeed") if own.deepspeed else {}
    return models.deepspeed(config, own.hf, own.shapes, parallel, own.zero_stage)


def _sweep(ranks: int, unit: int) -> list[int]:
    """Numbers of ranks around the job's: halves and doubles of its DP."""
    found = {ranks, 2 * ranks, 4 * ranks}
    while ranks % 2 == 0 and (ranks := ranks // 2) % unit == 0 and len(found) < 7:
        found.add(ranks)
    return sorted(found)


def printed(planned: Planned) -> str:
    """The table, or JSON where it was asked for."""
    return json.dumps(tables.as_json(planned), indent=1) if planned.as_json else tables.text(planned)


def in_own_process(arguments: Sequence[str]) -> str:
    command: list[Any] = [sys.executable, "-W", "ignore", "-m", "muon_plugin.planner", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 2:
        raise ValueError(done.stderr.strip().splitlines()[-1].removeprefix("planner: "))
    if done.returncode:
        raise RuntimeError(f"the planner ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout.rstrip("\n")
