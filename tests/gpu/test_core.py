"""The core on a GPU, in about a minute; without one on the CPU alone, on smaller matrices.

Random matrices are drawn on the CPU, so that every device gets the same ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from muon_plugin import Muon
from muon_plugin.core import adamw
from muon_plugin.core.call import Call
from muon_plugin.core.elementwise import by_table_on
from muon_plugin.core.groups import Host
from muon_plugin.core.layout import Shard
from muon_plugin.core.rounding import by_kernel_on
from muon_plugin.core.settings import Settings
from tests.support.ranks import Ranks
from tests.support.torch_releases import needs_muon

#: Large enough for a GPU's usual kernels; CPUs without bf16 instructions multiply it at a GFLOP/s.
LARGE = (256, 704) if torch.cuda.is_available() else (64, 176)
#: Odd ones, three that share a shape, tall and wide ones.
SHAPES = {
    "embed.weight": (57, 40),
    "odd.weight": (33, 91),
    "one.weight": LARGE,
    "two.weight": LARGE,
    "three.weight": LARGE,
    "tall.weight": (120, 40),
    "square.weight": (64, 64),
    "norm.weight": (91,),
    "bias": (33,),
}
STEPS = 10
SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
#: Those that are here, or the one that benchmarks/gpu.py names.
DEVICES = os.environ.get("GPU_TESTS_DEVICE", "cpu cuda" if torch.cuda.is_available() else "cpu").split()


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def _gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _sized(shape: tuple[int, int], device: torch.device) -> tuple[int, ...]:
    """Smaller on the CPU, where a product in bf16 may take a thousand times as long."""
    return shape if device.type == "cuda" else tuple(max(2, size // 16) for size in shape)


def _ill_conditioned(seed: int, rows: int, cols: int) -> Tensor:
    """Singular values from 1 to 1e-4: the small ones are what bf16 loses first."""
    u, _, vh = torch.linalg.svd(_gaussian(seed, rows, cols).double(), full_matrices=False)
    return (u * torch.logspace(0, -4, min(rows, cols), dtype=torch.float64) @ vh).float()


def _polynomial(matrix: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """The iteration in float64."""
    x = matrix.double() / matrix.double().norm()
    x = x.mT if x.shape[0] > x.shape[1] else x
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float(((found.double() - wanted).norm() / wanted.norm()).detach())


@pytest.mark.parametrize("shape", [(512, 512), (384, 1536), (1100, 300)])
@pytest.mark.parametrize("draw", [_gaussian, _ill_conditioned])
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_newton_schulz_is_as_accurate_as_on_the_cpu(device, method, draw, shape):
    newton_schulz = replace(Settings().newton_schulz, method=method)
    matrix = draw(3, *_sized(shape, device)).bfloat16()
    exact = _polynomial(matrix, newton_schulz.coefficients)
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)

    def errors(on: torch.device) -> dict[str, float]:
        found = newton_schulz(matrix[None].to(on, copy=True))[0].cpu()
        spread = (torch.linalg.svdvals(found.double()) - 1).square().mean().sqrt()
        polar = _relative(found, u @ vh)
        return {"polynomial": _relative(found, exact), "polar factor": polar, "singular values": float(spread)}

    here, there = errors(torch.device("cpu")), errors(device)
    assert all(there[name] <= 1.5 * here[name] for name in here), f"on the CPU {here}, on the GPU {there}"


@pytest.mark.parametrize(
    "shape", [(33, 91), (91, 33), (257, 1023), (1023, 257), (512, 512), (256, 1024), (2048, 1408)], ids=str
)
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_a_matrix_does_not_depend_on_its_batch(device, method, shape):
    newton_schulz = replace(Settings().newton_schulz, method=method)
    six = _gaussian(5, 6, *_sized(shape, device)).bfloat16().to(device)

    def in_batches_of(size: int) -> Tensor:
        return torch.stack([x for i in range(0, 6, size) for x in newton_schulz(six[i : i + size].clone())])

    alone = in_batches_of(1)
    assert torch.equal(alone, in_batches_of(1)), "not even the same call twice gives the same bits"
    differing = {size: int((in_batches_of(size) != alone).sum()) for size in (3, 6)}
    assert not any(differing.values()), f"elements of {alone.numel()} that differ from batches of 1, by batch size"


def test_offloaded_momentum_lies_in_pinned_cpu_memory_and_changes_no_bit(device):
    found = {}
    for offload in (False, True):
        parameters = _parameters(device)
        muon = Muon(parameters.items(), offload=offload, **SETTINGS)
        for step in range(STEPS):
            _set_gradients(parameters, step)
            muon.step()
        momenta = [state["momentum_buffer"] for state in muon.state.values() if "momentum_buffer" in state]
        assert {(momentum.device.type, momentum.is_pinned()) for momentum in momenta} == {
            ("cpu", device.type == "cuda") if offload else (device.type, False)
        }
        found[offload] = {name: p.detach().cpu() for name, p in parameters.items()}
    assert not _differing(found[True], found[False])


def test_on_a_gpu_the_kernels_over_memory_have_torchs_bits_and_are_taken(device):
    assert by_table_on(device) is by_kernel_on(device) is (device.type == "cuda")


def test_the_adamw_of_auto_gives_the_same_bits_wherever_a_shard_is_cut(device):
    size, cuts = 200_003, 20
    inner = 1 + torch.randperm(size - 1, generator=torch.Generator().manual_seed(1))[:cuts]
    places = [0, *sorted(inner.tolist()), size]
    start = _gaussian(0, size).to(device)
    gradients = [(_gaussian(1 + step, size) * 0.1).to(device) for step in range(5)]

    def steps(first: int, last: int) -> list[Tensor]:
        p = nn.Parameter(start[first:last].clone())
        group = {"params": [p], "lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        optimizer, _ = adamw.build([group], "auto")
        optimizer.state[p] = adamw.new_state(optimizer, p)
        for gradient in gradients:
            p.grad = gradient[first:last].clone()
            optimizer.step()
        return [p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]]

    whole = steps(0, size)
    parts = [steps(first, last) for first, last in pairwise(places)]
    assert not torch.equal(whole[0], start), "no step was taken"
    differing = [int((torch.cat(cut) != uncut).sum()) for cut, uncut in zip(zip(*parts), whole)]
    assert differing == [0, 0, 0], f"differing elements of the parameter and of AdamW's two averages: {differing}"


def _parameters(device: torch.device) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(_gaussian(i, *shape).to(device)) for i, (name, shape) in enumerate(SHAPES.items())}


def _set_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    """The same on every rank and device; not of the weights, so that a difference does not feed on itself."""
    for i, p in enumerate(parameters.values()):
        p.grad = _gaussian(1000 * (step + 1) + i, *p.shape).to(p.device)


@needs_muon
def test_ten_steps_are_those_of_torch_s_muon_and_adamw(device):
    ours, theirs, start = (_parameters(device) for _ in range(3))
    muon = Muon(ours.items(), ns_method="standard", **SETTINGS)
    matrices = {matrix.parameter for matrix in muon.routing.matrices}
    rest = [p for name, p in theirs.items() if name not in matrices]
    both = [
        torch.optim.Muon([theirs[name] for name in matrices], adjust_lr_fn="match_rms_adamw", **SETTINGS),
        torch.optim.AdamW(rest, lr=0.02, weight_decay=0.1, betas=(0.9, 0.95)),
    ]
    for step in range(STEPS):
        _set_gradients(ours, step)
        _set_gradients(theirs, step)
        muon.step()
        for optimizer in both:
            optimizer.step()
    errors = {name: _relative(ours[name] - p, (theirs[name] - p).double()) for name, p in start.items()}
    wrong = {name: error for name, error in errors.items() if not error < (1e-5 if name in matrices else 1e-4)}
    assert not wrong, f"relative differences of the changes: {wrong}"
    assert len(matrices) == 6


def _replicas(rank: int, size: int, device: torch.device) -> dict[str, Tensor]:
    """Every rank holds everything, as under DDP: the weights after the last step."""
    parameters = _parameters(device)
    muon = Muon(parameters.items(), process_group=dist.group.WORLD if size > 1 else None, **SETTINGS)
    assert size == 1 or all(muon.plans[0].bytes_sent), "a rank has nothing to send"
    for step in range(STEPS):
        _set_gradients(parameters, step)
        muon.step()
    return {name: p.detach().cpu() for name, p in parameters.items()}


def _halves(rank: int, size: int, device: torch.device) -> dict[str, Tensor]:
    """Each group's parameters one after the other in a flat tensor, of which a rank holds its part, as under ZeRO-1."""
    whole = _parameters(device)
    muon = Muon(whole.items(), host=Host(), **SETTINGS)
    names = {p: name for name, p in whole.items()}
    parts, calls, all_shards = [], [], []
    for group in muon.param_groups:
        flat = torch.cat([p.detach().view(-1) for p in group["params"]])
        length = -(-flat.numel() // size)
        part = flat[rank * length : (rank + 1) * length].clone()
        shards = _shards([(names[p], p.numel()) for p in group["params"]], rank * length, part)
        calls.append(Call(len(calls), (part,), tuple(shards)))
        all_shards += shards
        parts.append(part)
        group["params"] = [part]
    muon.attach(calls)
    assert size == 1 or all(muon.plans[0].bytes_sent), "a rank has nothing to send"
    for step in range(STEPS):
        _set_gradients(whole, step)
        for part in parts:
            part.grad = torch.zeros_like(part)
        for shard in all_shards:
            shard.local.view(shard.tensor.grad).copy_(shard.where.view(whole[shard.parameter].grad.view(-1)))
        muon.step()
    return {shard.parameter: shard.local.view(shard.tensor).flatten().cpu() for shard in all_shards}


def _shards(sizes: list[tuple[str, int]], begin: int, part: Tensor) -> list[Shard]:
    """What of each parameter lies in `part`, which starts at `begin` of the parameters laid end to end."""
    found, at = [], 0
    for name, size in sizes:
        first, last = max(at, begin), min(at + size, begin + part.numel())
        if first < last:
            found.append(Shard.of_range(name, first - at, last - first, part, first - begin))
        at += size
    return found


def _run(size: int, work: Callable[..., Any], device: torch.device) -> list[dict[str, Tensor]]:
    """`work` on `size` processes that share the device, or have one each: what each returns."""
    processes = Ranks(size, device=device.type)
    try:
        return processes.run(work, size, device)
    finally:
        processes.close()


@pytest.fixture(scope="module")
def alone(device: torch.device) -> dict[str, Tensor]:
    """The weights that one process ends in."""
    return _run(1, _replicas, device)[0]


def _differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, int]:
    """Parameter -> how many of its elements differ in any bit."""
    counts = {name: int((found[name].view(-1) != wanted[name].view(-1)).sum()) for name in wanted}
    return {name: count for name, count in counts.items() if count}


def test_two_processes_with_replicas_end_in_the_bits_of_one(device, alone):
    for rank, found in enumerate(_run(2, _replicas, device)):
        assert not _differing(found, alone), f"rank {rank}"


def test_two_processes_with_half_of_everything_end_in_the_bits_of_one(device, alone):
    halves = _run(2, _halves, device)
    found = {name: torch.cat([half[name] for half in halves if name in half]) for name in alone}
    assert not _differing(found, alone)
    assert any(name in halves[0] and name in halves[1] for name in alone), "no parameter was cut"
