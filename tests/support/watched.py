"""One rank of a run under the watchdog that goes wrong as its arguments say: `watched.py ENGINE WHAT RANK WHEN`.

ENGINE: "alone", "halves", "deepspeed" or "megatron". WHAT happens to that rank WHEN: "outside" the optimizer, after two
steps, or in a phase of the third step.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from muon_plugin import Muon, watchdog
from muon_plugin.core import phases

STEPS = 6


def alone(rank: int, group: Any = None) -> tuple[Callable[[], Any], Callable[[], Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8))
    optimizer = Muon(model.named_parameters(), lr=0.01, process_group=group)

    def backward() -> None:
        for number, p in enumerate(model.parameters()):
            p.grad = torch.ones(p.shape) * number
        time.sleep(0.2)  # some heartbeats a step

    return backward, optimizer.step


def halves(rank: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A model on each half of the world; the first half pauses after its first step, until the file GO exists."""
    world = dist.get_world_size()
    groups = [dist.new_group(list(half)) for half in (range(world // 2), range(world // 2, world))]
    backward, step = alone(rank, groups[rank // (world // 2)])

    def late() -> None:
        while rank < world // 2 and phases.current.step == 1 and not os.path.exists(os.environ["GO"]):
            time.sleep(0.1)
        backward()

    return late, step


def deepspeed(rank: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    import deepspeed as engine_module

    from tests.support.integers import build, config

    engine_module.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine = build(rank, config(1, "bf16"))

    def backward() -> None:
        engine.backward(engine(engine.global_steps, 0, rank, dist.get_world_size(), 1))

    return backward, engine.step


def megatron(rank: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    from tests.support.megatron_model import Layout, build, optimizer_for, set_gradients

    layout = Layout(tp=2)
    chunks = build(layout)
    optimizer = optimizer_for(chunks, layout)
    return lambda: set_gradients(chunks, layout, phases.current.step), optimizer.step


def happens(what: str) -> None:
    if what == "killed":
        print("dies now", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "raises":
        raise ValueError("no more data on this rank")
    elif what == "sleeps":
        time.sleep(100)


def main(engine: str, what: str, which: int, when: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    store = os.environ.get("FILE_STORE")
    where = f"file://{store}" if store else None
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    backward, step = globals()[engine](rank)
    mine = rank == which
    while not (watchdog.watchdog._running and watchdog.watchdog._running.hearts.published):
        time.sleep(0.05)  # else all is over before the others know of this rank
    dist.barrier()

    def listener(_: str, entered: str) -> None:
        if mine and entered == when and phases.current.step == 3:
            happens(what)

    with phases.heard(listener):
        for number in range(STEPS + (what == "one step more" and mine)):
            backward()
            if number == 2 and when == "outside":
                if mine:
                    happens(what)
                elif what == "killed":
                    time.sleep(100)  # as one that waits for its GPU
                if what == "all pause":
                    time.sleep(float(os.environ["PAUSE"]))
            step()
    if what == "all pause" and mine:  # and one has much to do in the end
        time.sleep(float(os.environ["PAUSE"]))
    if what == "one step more" and when == "the others stay":
        time.sleep(100)
    print(f"rank {rank} done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
