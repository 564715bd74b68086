"""Checks a launch line of Megatron and prints Muon's plan: no GPU, no processes, no data.

    python -m muon_plugin.megatron.dry_run --world-size 64 -- --num-layers 32 ... --optimizer muon ...

Every argument goes through the installed Megatron's own parser and checks (`on_meta`), as on rank 0 of that many. Exit
code 2 for arguments that would not start. `python -m muon_plugin.planner` tells more of the plan, with times.
"""

from __future__ import annotations

import argparse
import sys
import time

from ..planner.cost import plan_stages
from ..planner.models import Parallel, megatron
from ..report import si


def main() -> None:
    began = time.perf_counter()
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, required=True, help="ranks of the job: nodes x GPUs")
    own = parser.parse_args(arguments[:cut])
    if own.world_size < 1:
        parser.error(f"--world-size {own.world_size}: allowed: 1 or more (nodes x GPUs a node)")
    try:
        model = megatron(arguments[cut + 1 :], Parallel(), own.world_size)
        stages = plan_stages(model.stages(own.world_size), model.newton_schulz.flops, model.scalars)
    except ValueError as error:
        print(f"dry run: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print("\n".join([model.settings, *(f"plan: {note}" for note in model.notes)]))
    for of_stage in stages:
        parameters = [p for load in of_stage.loads for p in load.call.parameters]
        matrices = [m for load in of_stage.loads for m in load.call.matrices]
        numbers = ", ".join(map(str, of_stage.stage.numbers))
        print(
            f"stage {numbers}: {len(parameters)} parameters, {len({m.parameter for m in matrices})} of them for Muon, "
            f"{len(matrices)} matrices"
        )
        for load in of_stage.loads:
            kind = load.call.label.split()[0]
            balance = max(load.flops) / max(load.mean, 1)
            print(
                f"  {kind}: {load.call.ranks} ranks share them; Newton-Schulz {si(load.total)}FLOP a step, the busiest "
                f"rank {balance:.2f} of the mean\n"
                f"  {kind}: {si(sum(load.sent))}B sent a step, {si(max(load.sent))}B by the busiest rank; state at "
                f"most {si(max(load.state))}B a rank (AdamW: {si(max(load.adamw_state))}B)"
            )
    print(f"dry run: the arguments are good ({time.perf_counter() - began:.0f} s)")


if __name__ == "__main__":
    main()
