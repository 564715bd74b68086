"""Trains the same small GPT under Megatron-Core with AdamW and with Muon: the script behind `make train-megatron`.

    python examples/megatron/compare.py            # TP 2 x DP 2, four processes on the CPU
    python examples/megatron/compare.py --moe      # four experts a layer, EP 2, DP 4

Data, table and picture are those of examples/llama, which trains under DeepSpeed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "llama"))
import data  # noqa: E402

_spec = importlib.util.spec_from_file_location("llama_compare", HERE.parent / "llama" / "compare.py")
llama = importlib.util.module_from_spec(_spec)  # its name is this file's, too
_spec.loader.exec_module(llama)

OPTIMIZERS = {"AdamW": "adam", "Muon": "muon"}


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="text file or folder (default: the source of Python's own library)")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.001, help="peak learning rate of both (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of both (default: %(default)s)")
    parser.add_argument("--nproc", type=int, default=4, help="processes to train with (default: %(default)s)")
    parser.add_argument("--tp", type=int, help="tensor parallel size (default: 2; 1 with --moe)")
    parser.add_argument("--moe", action="store_true", help="four experts a layer, over two expert parallel ranks")
    parser.add_argument("--out", type=Path, default=Path("runs/megatron"), help="output folder (default: %(default)s)")
    args = parser.parse_args()
    for name, least in (("steps", 1), ("nproc", 1), ("tp", 1), ("weight_decay", 0)):
        value = getattr(args, name)
        if value is not None and not least <= value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if not 0 < args.lr < float("inf"):
        raise ValueError(f"--lr {args.lr}: must be above 0")
    if importlib.util.find_spec("megatron") is None:
        raise ValueError("Megatron-Core is not installed: pip install megatron-core, or make train-megatron")
    args.tp = args.tp or (1 if args.moe else 2)
    if args.moe and args.tp > 1:
        raise ValueError(f"--tp {args.tp} with --moe: must be 1, Megatron's layers for the CPU cannot do both")
    if args.moe and args.nproc % 2:
        raise ValueError(f"--nproc {args.nproc} with --moe: must be even, two ranks share the experts")
    if args.tp not in (1, 2, 4):
        raise ValueError(f"--tp {args.tp}: must be 1, 2 or 4, it divides the model's heads and query groups")
    if args.nproc % args.tp or llama.BATCH_SIZE % (args.nproc // args.tp):
        raise ValueError(f"--nproc {args.nproc}: must be a multiple of --tp {args.tp}; the rest must divide 8")
    return args


def run(name: str, args: argparse.Namespace) -> list[dict]:
    """Trains with one optimizer in processes of their own; returns the metrics of each step."""
    out = args.out / name
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.nproc)]
    command += [str(HERE / "train.py"), "--optimizer", OPTIMIZERS[name], "--out", str(out)]
    command += ["--data", str(args.out / "data"), "--steps", str(args.steps), "--lr", str(args.lr)]
    command += ["--weight-decay", str(args.weight_decay), "--tp", str(args.tp)]
    command += ["--moe", "--ep", "2"] if args.moe else []
    code = subprocess.run(command, check=False, env={"OMP_NUM_THREADS": "1"} | os.environ).returncode
    if code:
        raise SystemExit(f"Training with {name} failed with return code {code}; what it printed is above.")
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    """Data, runs, picture, table."""
    began = time.perf_counter()
    args = parse_args()
    info = data.prepare(args.data, args.out / "data")
    print(f"Data: {info['source']}, {info['train_tokens']:,} tokens to train on, {info['val_tokens']:,} held out")
    runs = {name: run(name, args) for name in OPTIMIZERS}
    result = llama.summarize(runs, args, info)
    layout = f"EP 2 x DP {args.nproc}, MoE" if args.moe else f"TP {args.tp} x DP {args.nproc // args.tp}"
    llama.draw(runs, result, args.out / "loss.png", f"Small GPT, Megatron-Core, {layout}")
    text, markdown = llama.tables(result)
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    (args.out / "result.md").write_text(markdown)
    print(f"\n{text}\nPicture: {args.out / 'loss.png'}, {(time.perf_counter() - began) / 60:.1f} minutes in all")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # a setting that cannot work: its message says what to do, a traceback would hide it
        raise SystemExit(f"error: {error}") from None
