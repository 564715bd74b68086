"""The Triton kernel of symmetric products: against torch in the interpreter, and compiled for GPUs ahead of time."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.combinations import FULL
from tests.support.interpreted import interpreted, needs_triton, repair_bf16

pytestmark = needs_triton

#: Batch, m, k; tile and depth. One tile and several, the last of them full or not; a depth that divides k or does not.
CASES = [(1, 1, 1, 16, 16), (2, 16, 32, 16, 16), (2, 33, 91, 16, 32), (1, 128, 64, 128, 64), (2, 200, 130, 128, 64)]
CASES += [(3, 33, 91, 16, 32), (2, 91, 33, 32, 16), (1, 300, 128, 64, 32)] if FULL else []
DTYPES = ["float16", *(["bfloat16"] if FULL else [])]


def integers(largest: int, seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).double()


def differing(dtype: str) -> list[str]:
    """Where the kernel's bits are not those of the exact product, rounded once, in the interpreter.

    Sums of products of small integers are exact in fp32, in any order. In bf16 they are so small here that the results
    are exact too: the interpreter cuts where a GPU rounds.
    """
    from muon_plugin.kernels.symmetric_triton import Tiling, product

    repair_bf16()
    kind, found = getattr(torch, dtype), []
    largest = 3 if dtype == "float16" else 1
    for batch, m, k, tile, depth in CASES:
        tiling = Tiling(tile, depth, 4, 3)
        x, r, s = (integers(largest, i, batch, m, n) for i, n in enumerate((k, m, m)))
        power = r.tril() + r.tril(-1).mT  # its square is symmetric; C need not be a function of it here
        other = s.tril() + s.tril(-1).mT
        in_kind = [each.to(kind) for each in (x, power, other)]
        gram = product(in_kind[0], in_kind[0], alpha=0.25, tiling=tiling)
        wanted = {
            "X X^T": (gram, 0.25 * x @ x.mT),
            "C + A B": (product(in_kind[1], *in_kind[1:], -0.5, 0.5, tiling), 0.5 * power @ power - 0.5 * other),
            "one of the batch": (product(in_kind[0][-1], in_kind[0][-1], alpha=0.25, tiling=tiling), gram[-1]),
        }
        for name, (ours, exact) in wanted.items():
            assert dtype == "float16" or torch.equal(exact.to(kind).double(), exact.double())
            if count := int((ours != exact.to(kind)).sum()):
                found.append(f"{name}, {(batch, m, k, tile, depth)}: {count} elements")
    return found


def iteration() -> dict[str, Any]:
    """Newton-Schulz with our kernel: whether a batch has the bits of one at a time; its error and torch's."""
    from muon_plugin.core import products
    from muon_plugin.core.coefficients import coefficients_for
    from muon_plugin.core.orthogonalize import NewtonSchulz
    from muon_plugin.core.products import WIDENED, Symmetric
    from muon_plugin.kernels import symmetric_triton

    class OneAtATime(Symmetric):
        """torch's own product with X has other bits in a batch on CPUs."""

        def apply(self, polynomial: Tensor, x: Tensor, beta: float = 0.0) -> Tensor:
            if x.dim() == 3:
                return torch.stack([self.apply(p, one, beta) for p, one in zip(polynomial, x)])
            return WIDENED.apply(polynomial, x, beta)

    symmetric_triton.tiling_of = lambda device: symmetric_triton.Tiling(32, 32, 4, 3)
    products.TILES["triton"] = 32
    by_half = OneAtATime(80, (("triton", "of the interpreter"),), torch.device("cpu"))
    ours, torchs = (
        NewtonSchulz(coefficients_for(5, "simple"), "gram", dtype="fp16", products=p) for p in (by_half, WIDENED)
    )
    x = torch.randn(2, 80, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    together, alone = ours._together(x), torch.stack([ours._alone(one) for one in x])
    exact = x.double().mT / x.double().norm(dim=(1, 2), keepdim=True)
    for a, b, c in ours.coefficients:
        gram = exact @ exact.mT
        exact = a * exact + (b * gram + c * gram @ gram) @ exact
    exact = exact.mT
    errors = [float((found.double() - exact).norm() / exact.norm()) for found in (alone, torch.stack(list(torchs(x))))]
    taken = by_half.taken(64, 80), by_half.taken(64, 64)
    return {"taken": taken, "batch": torch.equal(together, alone), "errors": errors}


@functools.cache
def in_the_interpreter(dtype: str) -> dict[str, Any]:
    """All that one process finds: it takes longer to start than to compute."""
    found: dict[str, Any] = interpreted(of_all, dtype)
    return found


def of_all(dtype: str) -> dict[str, Any]:
    found = {"integers": differing(dtype), "normal": of_normal_numbers(dtype)}
    once = {"iteration": iteration(), "table": by_table(), "rounded": rounded()} if dtype == "float16" else {}
    return found | once


def by_table() -> list[int]:
    """Of momenta, weights and directions after a step by the kernels that go over a table of runs, how many bytes are
    not those of plain torch; for Nesterov or not, and both ways of torch's lerp."""
    from muon_plugin.core import elementwise

    device = torch.device("cpu")
    alone, table = elementwise._found_alone(device), elementwise._found_by_table(device)
    return [sum(a != b for a, b in zip(one, other)) for one, other in zip(alone, table)]


def rounded() -> list[int]:
    """Of momenta in bf16 and directions after a step by their kernel, how many bytes are not those of plain torch; with
    both ways of torch's lerp, and without Nesterov."""
    from muon_plugin.core import rounding

    device = torch.device("cpu")
    alone, ours = (rounding._found(device, way) for way in (rounding._alone, rounding._by_kernel))
    return [sum(a != b for a, b in zip(one, other, strict=True)) for one, other in zip(alone, ours, strict=True)]


def of_normal_numbers(dtype: str) -> dict[str, Any]:
    """Of matrices of normal numbers: whether a batch has the bits of one at a time, and the largest error."""
    from muon_plugin.kernels.symmetric_triton import Tiling, product

    repair_bf16()
    kind, tiling = getattr(torch, dtype), Tiling(64, 32, 4, 3)
    x = torch.randn(3, 150, 200, generator=torch.Generator().manual_seed(0)).to(kind)
    together = product(x, x, tiling=tiling)
    alone = torch.stack([product(one, one, tiling=tiling) for one in x])
    exact = x.double() @ x.double().mT
    error = ((together.double() - exact).abs() / (x.double().abs() @ x.double().abs().mT)).max()
    mirrored = all(torch.equal(together[:, i:, :i], together[:, :i, i:].mT) for i in (64, 128))
    return {"batch": torch.equal(together, alone), "mirrored": mirrored, "error": float(error)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_integers_have_the_bits_of_the_exact_product_rounded_once(dtype):
    assert in_the_interpreter(dtype)["integers"] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_has_the_bits_of_one_at_a_time(dtype):
    found = in_the_interpreter(dtype)["normal"]
    assert found["batch"]
    assert found["mirrored"]
    assert found["error"] < torch.finfo(getattr(torch, dtype)).eps


def test_newton_schulz_by_the_kernel_is_that_by_torch_up_to_rounding_in_any_batch():
    found = in_the_interpreter("float16")["iteration"]
    assert found["taken"] == ["triton", "triton"]
    assert found["batch"]
    ours, torchs = found["errors"]
    assert ours != torchs
    assert ours < 1.3 * torchs < 0.006, found


def test_directions_and_updates_by_a_table_of_runs_have_the_bits_of_plain_torch():
    assert in_the_interpreter("float16")["table"] == [0] * 12


def test_momenta_in_bf16_by_their_kernel_have_the_bits_of_plain_torch():
    assert in_the_interpreter("float16")["rounded"] == [0] * 6


@pytest.mark.parametrize("capability", [80, 90, 100] if FULL else [80])
def test_kernels_over_memory_compile_without_spills(capability):
    from benchmarks.kernels import GPUS, MOVING, compiled_moving

    gpu = next(gpu for gpu in GPUS if gpu.capability == capability)
    for name in MOVING:
        found = compiled_moving(gpu, name)
        assert found.spilled == 0, name
        assert found.shared <= gpu.shared, name


@pytest.mark.parametrize(
    ("dtype", "add", "whole"), [("fp16", True, True), *([("fp16", False, True), ("bf16", True, False)] if FULL else [])]
)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_it_compiles_for_each_gpu_to_tensor_core_instructions_without_spills(capability, dtype, add, whole):
    from benchmarks.kernels import GPUS, compiled_symmetric

    gpu = next(gpu for gpu in GPUS if gpu.capability == capability)
    found = compiled_symmetric(gpu, dtype, add, whole)
    assert found.products(gpu.instruction) > 0, "no tensor-core instruction"
    assert found.spilled == 0
    assert found.shared <= gpu.shared


def test_tiles_of_128_are_taken_wherever_they_fit():
    from muon_plugin.kernels.symmetric_triton import RESERVED, TILINGS, tiling_for

    bytes_of = {"A100": 166_912, "H100, B200": 232_448, "cards for desktops": 101_376}
    taken = {name: tiling_for(shared) for name, shared in bytes_of.items()}
    assert all(t.programs * (t.shared + RESERVED) <= bytes_of[name] for name, t in taken.items())
    assert taken == {"A100": TILINGS[1], "H100, B200": TILINGS[0], "cards for desktops": TILINGS[1]}
    assert {tiling.tile for tiling in taken.values()} == {128}
    assert tiling_for(49_152).tile == 64
    with pytest.raises(ValueError, match=r"a GPU with 1024 bytes.*allowed: \d+ or more"):
        tiling_for(1024)
