"""Our Triton kernels compiled ahead of time for several GPUs, and the time that each is foretold to take.

    python benchmarks/kernels.py --out benchmarks/results/kernels.md

Needs Triton and no GPU: `triton.compile` makes the machine code for any of them, and `cuobjdump`, which comes with
Triton, reads how many registers it takes. A foretold time is no measurement: it is the larger of FLOPs over a rate and
bytes over a bandwidth, of which the table names both.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from muon_plugin.kernels.normalize_triton import TILE, normalize_kernel, squares_kernel
from muon_plugin.kernels.rounding_triton import average_kernel
from muon_plugin.kernels.symmetric_triton import Tiling, symmetric_kernel, tiling_for
from muon_plugin.kernels.table_triton import BLOCK, FIELDS, WARPS, apply_kernel, pack_kernel


@dataclass(frozen=True)
class GPU:
    """A kind of GPU, from its data sheet.

    Attributes:
        capability: 90 for compute capability 9.0.
        shared: bytes of shared memory that a program may have.
        processors: streaming multiprocessors.
        tflops, gb_per_s: peak of fp16 products with fp32 sums (dense), and of memory.
        instruction: what multiplies matrices, in PTX.
    """

    name: str
    capability: int
    shared: int
    processors: int
    tflops: float
    gb_per_s: float
    instruction: str


GPUS = (
    GPU("A100", 80, 166_912, 108, 312, 2039, "mma.sync"),
    GPU("H100", 90, 232_448, 132, 989, 3350, "wgmma.mma_async"),
    GPU("B200", 100, 232_448, 148, 2250, 8000, "tcgen05.mma"),
)
#: What of the peaks a kernel is taken to reach: the products of Newton-Schulz that were measured on an H100 reach 0.65.
OF_PRODUCTS, OF_MEMORY = 0.6, 0.75
#: Seconds until a kernel has started.
LAUNCH = 4e-6
#: ROWSxCOLSxBATCH of X in X X^T
SHAPES = ((1024, 1024, 32), (2048, 1408, 11), (1408, 2048, 64), (2048, 8192, 1), (4096, 4096, 1), (4096, 16384, 1))


@dataclass(frozen=True)
class Compiled:
    """What the machine code of a kernel takes.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread's registers that are kept in memory.
        shared: bytes of a program's shared memory.
        ptx: the code in text, before it is made the GPU's own.
    """

    registers: int
    spilled: int
    shared: int
    ptx: str

    def products(self, instruction: str) -> int:
        """How often the code multiplies matrices with this instruction."""
        return len(re.findall(rf"^\s*(?:@\S+\s+)?{re.escape(instruction)}\.", self.ptx, re.MULTILINE))


def compiled(
    kernel: Any, arguments: Mapping[str, str], constants: Mapping[str, Any], capability: int, **options: Any
) -> Compiled:
    """Compiles a Triton kernel for a GPU that need not be here.

    Args:
        kernel: a function under `triton.jit`.
        arguments: name -> type of those that are no constants, in Triton's words ("*fp16", "i32"). Pointers and
            integers are taken to be multiples of 16, as they mostly are.
        constants: the kernel's constants.
        capability: 90 for compute capability 9.0.
        options: such as num_warps and num_stages.
    """
    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    places = [list(kernel.arg_names).index(name) for name, kind in arguments.items() if kind[0] in "*i"]
    source = ASTSource(kernel, signature, dict(constants), {(at,): [["tt.divisibility", 16]] for at in places})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    usage = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout)}
    return Compiled(usage["REG"], usage["STACK"] + usage["LOCAL"], made.metadata.shared, made.asm["ptx"])


def compiled_symmetric(gpu: GPU, dtype: str, add: bool, whole: bool = True) -> Compiled:
    """The kernel of symmetric products as it runs on this GPU."""
    tiling = tiling_for(gpu.shared)
    arguments = dict.fromkeys(("a", "b", "c", "out"), f"*{dtype}")
    arguments |= {"m": "i32", "k": "i32", "alpha": "fp32", "beta": "fp32"}
    constants = {"TILE": tiling.tile, "DEPTH": tiling.depth, "WHOLE": whole, "ADD": add}
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages, "enable_fp_fusion": False}
    return compiled(symmetric_kernel, arguments, constants, gpu.capability, **options)


#: Kernels whose time is that of their bytes: what they are called, types of arguments, constants, bytes an element.
MOVING: dict[str, tuple[Any, dict[str, str], dict[str, Any], int]] = {
    "momentum, Nesterov, pack": (
        pack_kernel,
        {"blocks": "*i32", "runs": "*i64", "pointers": "*i64", "numbers": "*fp32", "flat": "*bf16"},
        {"AVERAGE": True, "NESTEROV": True, "FIELDS": FIELDS, "BLOCK": BLOCK},
        14,
    ),
    "scale, decay, apply": (
        apply_kernel,
        {
            "blocks": "*i32",
            "runs": "*i64",
            "scales": "*fp32",
            "pointers": "*i64",
            "numbers": "*fp32",
            "flat": "*bf16",
        },
        {"FIELDS": FIELDS, "BLOCK": BLOCK},
        10,
    ),
    "momentum in bf16": (
        average_kernel,
        {"momenta": "*bf16", "gradients": "*fp32", "numel": "i32", "weight": "fp32", "towards": "fp32", "seed": "i32"},
        {"NESTEROV": True, "BLOCK": BLOCK},
        12,
    ),
    "squares for norms": (
        squares_kernel,
        {"x": "*bf16", "sums": "*fp32", "numel": "i32", "parts": "i32", "blocks": "i32"},
        {"BLOCK": BLOCK},
        2,
    ),
    "normalize, of tall matrices": (
        normalize_kernel,
        {
            "x": "*bf16",
            "sums": "*fp32",
            "out": "*fp16",
            "rows": "i32",
            "cols": "i32",
            "parts": "i32",
            "eps": "fp32",
            "scale": "fp32",
        },
        {"TALL": True, "TILE": TILE, "PARTS": 512},
        4,
    ),
}
#: Elements for which their times are foretold: a rank's of Moonlight 16B at DP 64, EP 8.
ELEMENTS = 250_000_000


def compiled_moving(gpu: GPU, name: str) -> Compiled:
    """A kernel of MOVING as it runs on this GPU."""
    kernel, arguments, constants, _ = MOVING[name]
    return compiled(kernel, arguments, constants, gpu.capability, num_warps=WARPS, enable_fp_fusion=False)


def foretold(gpu: GPU, tiling: Tiling, rows: int, cols: int, batch: int, programs: int) -> float:
    """Seconds of the symmetric kernel for X X^T of a batch.

    Args:
        programs: how many run on one processor at a time.
    """
    tiles = math.ceil(rows / tiling.tile)
    work = batch * tiles * (tiles + 1) // 2
    waves = math.ceil(work / (gpu.processors * programs))
    flops = waves * gpu.processors * programs * 2 * tiling.tile**2 * cols
    moved = 2 * batch * (rows * cols + rows * rows)  # X is read from memory once: a wave reads its slices together
    return LAUNCH + max(flops / (OF_PRODUCTS * gpu.tflops * 1e12), moved / (OF_MEMORY * gpu.gb_per_s * 1e9))


def resident(gpu: GPU, tiling: Tiling, found: Compiled) -> int:
    """How many programs run on one processor at a time: by shared memory and by its 65,536 registers."""
    return max(1, min(gpu.shared // max(found.shared, 1), 65_536 // (32 * tiling.warps * found.registers)))


def report() -> str:
    """The tables, in Markdown."""
    rows = [
        "| kernel | GPU | tiles | registers | spilled | shared memory | instruction |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    times = ["| X | " + " | ".join(gpu.name for gpu in GPUS) + " |", "|---|" + "---:|" * len(GPUS)]
    programs = {}
    for dtype in ("fp16", "bf16"):
        for add in (False, True):
            for gpu in GPUS:
                tiling, found = tiling_for(gpu.shared), compiled_symmetric(gpu, dtype, add)
                programs.setdefault(gpu, resident(gpu, tiling, found))
                cut = f"{tiling.tile}x{tiling.tile}x{tiling.depth}, {tiling.warps} warps, {tiling.stages} stages"
                cells = [f"symmetric product{' + C' if add else ''}, {dtype}", f"{gpu.name} (sm_{gpu.capability})", cut]
                cells += [str(found.registers), str(found.spilled), f"{found.shared / 1024:.0f} KiB"]
                rows.append(f"| {' | '.join([*cells, f'{gpu.instruction} x {found.products(gpu.instruction)}'])} |")
    for name in MOVING:
        for gpu in GPUS:
            found = compiled_moving(gpu, name)
            cells = [name, f"{gpu.name} (sm_{gpu.capability})", f"{WARPS} warps", str(found.registers)]
            rows.append(f"| {' | '.join([*cells, str(found.spilled), f'{found.shared / 1024:.1f} KiB', ''])} |")
    for m, k, batch in SHAPES:
        cells = [f"{m}x{k}" + (f", batch of {batch}" if batch > 1 else "")]
        for gpu in GPUS:
            seconds = foretold(gpu, tiling_for(gpu.shared), m, k, batch, programs[gpu])
            cells.append(f"{seconds * 1e3:.3f} ms")
        times.append(f"| {' | '.join(cells)} |")
    moving = ["| kernel | bytes an element | " + " | ".join(gpu.name for gpu in GPUS) + " |"]
    moving.append("|---|---:|" + "---:|" * len(GPUS))
    for name, (*_, each) in MOVING.items():
        seconds = [LAUNCH + each * ELEMENTS / (OF_MEMORY * gpu.gb_per_s * 1e9) for gpu in GPUS]
        moving.append(f"| {name} | {each} | {' | '.join(f'{s * 1e3:.2f} ms' for s in seconds)} |")
    return "\n".join(
        [
            "# Our Triton kernels, compiled ahead of time",
            "",
            f"Written by `benchmarks/kernels.py`; triton {triton.__version__}. Nothing was run on a GPU.",
            "",
            *rows,
            "",
            f"Foretold times of X X^T, one kernel: FLOPs of the computed tiles, rounded up to what all processors "
            f"compute at a time, at {OF_PRODUCTS:.0%} of the peak, or bytes at {OF_MEMORY:.0%} of the memory's, "
            f"whichever takes longer, and {LAUNCH * 1e6:.0f} µs for the launch.",
            "",
            *times,
            "",
            f"Of the kernels whose time is that of their bytes, for {ELEMENTS / 1e6:.0f} million elements:",
            "",
            *moving,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    out = parser.parse_args().out
    text = report()
    print(text)
    if out is not None:
        out.write_text(text)


if __name__ == "__main__":
    main()
