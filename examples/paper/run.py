"""Runs the paper's experiments; what has run already is not run again, what was interrupted goes on.

    python examples/paper/run.py --scale toy                        # 2 CPU cores: half an hour
    python examples/paper/run.py --scale small --data MY_TEXT       # your own text
    torchrun --nproc-per-node 8 examples/paper/run.py --scale paper --experiments scaling

Every run's config, seed, versions and metrics lie in OUT/results, its model in OUT/models; report.py has the pictures.
On one process several small runs go at the same time (--jobs), on GPUs too, of which NVIDIA's MPS lets them share one
without waiting for each other; under torchrun all ranks share each run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from experiments import EXPERIMENTS, SCALES, Lab
from tokenizers import Tokenizer
from tqdm import tqdm
from trainer import Run, data, train

_worker: dict[str, int] = {}


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=list(SCALES), default="toy", help="(default: %(default)s)")
    parser.add_argument("--experiments", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--data", type=Path, help="text file or folder (default: the source of Python's own library)")
    parser.add_argument("--shifted", type=Path, help="text to fine-tune on (default: the C++ headers of torch)")
    jobs = torch.cuda.device_count() or os.cpu_count()
    parser.add_argument(
        "--jobs", type=int, default=jobs, help="runs at a time, without torchrun (default: %(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the runs (searches: the shortest) and stop")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), help="(default: %(default)s)")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be at least 1")
    return args


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Tokenizes both texts with the first one's tokenizer; says what they are."""
    data.VOCAB_SIZE = SCALES[args.scale].vocab
    folder = args.out / "data" / str(data.VOCAB_SIZE)
    info = {"main": data.prepare(args.data, folder / "main")}
    shifted = folder / "shifted"
    source = args.shifted or Path(torch.__file__).parent / "include" / "c10"
    tokenizer = (folder / "main" / "tokenizer.json").read_text()
    texts = data.read_texts(data.find_files(source))
    stamp = hashlib.sha256("\0".join([tokenizer, *texts]).encode()).hexdigest()
    if not (shifted / "stamp").exists() or (shifted / "stamp").read_text() != stamp:
        parts = [data.tokenize(Tokenizer.from_str(tokenizer), part) for part in data.split(texts)]
        shifted.mkdir(parents=True, exist_ok=True)
        for part, tokens in zip(("train", "val"), parts):
            np.save(shifted / f"{part}.npy", tokens)
        name = str(args.shifted or "the C++ headers that come with torch")
        about = {"source": name, "train_tokens": len(parts[0]), "val_tokens": len(parts[1])}
        (shifted / "info.json").write_text(json.dumps(about))
        (shifted / "stamp").write_text(stamp)  # last: an interrupted preparation is not taken for a finished one
    return info | {"shifted": json.loads((shifted / "info.json").read_text())}


def planned(args: argparse.Namespace) -> dict[str, Run]:
    """All runs, if no search leaves its starting point."""
    runs: dict[str, Run] = {}

    def pretend(asked: Sequence[Run]) -> list[dict[str, Any]]:
        runs.update({run.name: run for run in asked})
        return [{"diverged": False, "points": [{"val_loss": place}]} for place in range(len(asked))]

    for name in args.experiments:
        EXPERIMENTS[name](Lab(SCALES[args.scale], pretend))
    return runs


class Progress:
    """The bar over all runs, in FLOPs: each run counts once, and a search that goes on makes it longer."""

    def __init__(self, total: float, disable: bool) -> None:
        self.bar = tqdm(total=total, unit="TFLOP", disable=disable, mininterval=0.5, smoothing=0)
        self.bar.bar_format = "all: {percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f} TFLOP [{elapsed}<{remaining}]"
        self.seen: set[str] = set()

    def count(self, run: Run) -> None:
        if run.name not in self.seen:
            self.seen.add(run.name)
            done = self.bar.n + run.flops / 1e12
            self.bar.total = max(self.bar.total or 0.0, done)
            self.bar.update(done - self.bar.n)


class Pool:
    """Trains runs in processes that stay; a run that two experiments ask for is trained once."""

    def __init__(self, args: argparse.Namespace, progress: Progress) -> None:
        self.progress = progress
        self.lock = threading.RLock()  # a run that is done already is counted at once, inside
        context = multiprocessing.get_context("spawn")
        threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
        self.processes = ProcessPoolExecutor(args.jobs, context, _begin, (context.Value("i", 0), threads))
        self.futures: dict[str, Future] = {}
        self.train = partial(_train, folder=args.out, micro_batch=SCALES[args.scale].micro_batch)

    def __call__(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        with self.lock:
            for run in runs:
                if run.name not in self.futures:
                    self.futures[run.name] = self.processes.submit(self.train, run)
                    self.futures[run.name].add_done_callback(lambda future, run=run: self._count(run))
        return [self.futures[run.name].result() for run in runs]

    def _count(self, run: Run) -> None:
        with self.lock:
            self.progress.count(run)


def _begin(counter: Any, threads: int) -> None:
    with counter.get_lock():
        counter.value += 1
        _worker["position"] = counter.value
        os.environ["LOCAL_RANK"] = str((counter.value - 1) % max(1, torch.cuda.device_count()))
    torch.set_num_threads(threads)
    quiet()


def _train(run: Run, folder: Path, micro_batch: int) -> dict[str, Any]:
    return train(run, folder, micro_batch, _worker.get("position", 1))


def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tqdm.set_lock(threading.RLock())  # its own is shared by processes, and is left behind by those that end


def gather(args: argparse.Namespace, texts: dict[str, Any]) -> None:
    """All results of the scale in one file, for the report."""
    results = [json.loads(file.read_text()) for file in sorted((args.out / "results").glob("*.json"))]
    scale = SCALES[args.scale]
    mine = [r for r in results if (r["config"]["vocab"], r["config"]["sequence"]) == (scale.vocab, scale.sequence)]
    lines = [json.dumps(line) for line in [{"scale": args.scale, "texts": texts}, *mine]]
    (args.out / f"{args.scale}.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Prepares the texts, trains, gathers."""
    args = parse_args()
    quiet()
    runs = planned(args)
    total = sum(run.flops for run in runs.values()) / 1e12
    if args.dry_run:
        for run in runs.values():
            print(f"{run.name:40} {run.steps:8,} steps of {run.batch} x {run.sequence}, {run.flops / 1e12:10.3f} TFLOP")
        print(f"{len(runs)} runs, {total:,.1f} TFLOP, if no search leaves its starting point")
        return
    together = "WORLD_SIZE" in os.environ
    if together:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    main_rank = not together or dist.get_rank() == 0
    texts = prepare(args) if main_rank else {}
    if together:
        dist.barrier()
    scale = SCALES[args.scale]
    progress = Progress(total, disable=not main_rank)
    if together:

        def one_by_one(asked: Sequence[Run]) -> list[dict[str, Any]]:
            found = []
            for run in asked:
                found.append(train(run, args.out, scale.micro_batch, position=1))
                progress.count(run)
            return found

        for name in args.experiments:
            EXPERIMENTS[name](Lab(scale, one_by_one, dist.get_world_size()))
    else:
        pool = Pool(args, progress)
        with ThreadPoolExecutor(len(args.experiments)) as threads:  # an experiment waits while the others' runs go on
            for done in [threads.submit(EXPERIMENTS[name], Lab(scale, pool)) for name in args.experiments]:
                done.result()
        pool.processes.shutdown()
    progress.bar.close()
    if main_rank:
        gather(args, texts)
        logged = args.out / f"{args.scale}.jsonl"
        print(
            f"{logged} is written; pictures: python examples/paper/report.py --logged {logged} --out {args.out}/report"
        )
    if together:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # a setting that cannot work: its message says what to do
        sys.exit(f"error: {error}")
