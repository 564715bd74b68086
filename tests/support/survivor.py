"""One rank of a run that saves after every step and goes on from the last complete checkpoint.

DeepSpeed's rank 0 writes its file `latest` when its own part is saved, before it waits for the others: after a kill it
may name a checkpoint that lacks files. When `save_checkpoint` returns, all is there: that is what `complete` says.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

STEPS = 60


def main(rank: int, world: int, folder: Path, store: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    import deepspeed

    from tests.support.integers import build, config, train, weights

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine = build(rank, config(int(os.environ["STAGE"]), "bf16"))
    complete = folder / "complete"
    if complete.exists():
        engine.load_checkpoint(str(folder), tag=complete.read_text())
    (folder / f"ready{rank}").touch()
    for step in range(engine.global_steps, STEPS):
        train(engine, rank, 1, first=step)
        engine.save_checkpoint(str(folder))
        if rank == 0:
            (folder / "next").write_text(f"global_step{engine.global_steps}")
            (folder / "next").rename(complete)
    found = weights(engine)
    if rank == 0:
        torch.save(found, folder / "weights.pt")
    dist.barrier()
    os._exit(0)  # torch's gloo threads may abort a Python that ends within milliseconds of a collective


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
