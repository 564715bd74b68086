"""What one step costs one rank in kernels, bytes, messages and memory: budgets, and that what runs is counted."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from benchmarks.counts import CASES, counted
from muon_plugin.core.coefficients import coefficients_for
from muon_plugin.core.layout import Partition
from muon_plugin.core.orthogonalize import NewtonSchulz
from muon_plugin.core.plan import make_plan
from muon_plugin.core.routing import route
from muon_plugin.planner.calls import Zero, zero_calls
from muon_plugin.planner.cost import index_of
from muon_plugin.planner.counts import META, Counter, Counts, as_rank, count

#: The most of each that a step may cost: kernels, bytes of elementwise traffic an element, messages, collective calls,
#: messages in a batch, MiB of extra memory.
BUDGETS = {
    "GPT 24 x 1024, ZeRO-1, DP 8": (150, 40, 0, 0, 0, 170),
    "Llama 8B, ZeRO-3, DP 64": (300, 40, 0, 16, 0, 860),
    "Moonlight 16B, Megatron, DP 64, EP 8": (400, 40, 64, 6, 4, 350),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_stays_within_its_budget(name):
    found = counted(CASES[name])
    memory = found.peak / 2**20
    costs = found.kernels, found.bytes_each, found.messages, found.collectives, found.batch, memory
    assert all(cost <= most for cost, most in zip(costs, BUDGETS[name])), costs


@pytest.mark.fast  # for the oldest torch, which has less on meta
@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("scalars", [0, 2])
def test_every_rank_sends_what_the_plan_says(stage, scalars):
    newton_schulz = NewtonSchulz(coefficients_for(5, "simple"))
    shapes = {f"layers.{i}.w": (24 + 8 * i, 64 - 8 * i) for i in range(5)}
    parameters = [Partition.of(name, shape) for name, shape in shapes.items()]
    (call,) = zero_calls("all", parameters, route(shapes).matrices, Zero(stage), 6)
    plan = make_plan(call.matrices, index_of(call), newton_schulz.flops, scalars)
    found = [count(call, plan, rank, newton_schulz, scalars) for rank in range(6)]
    assert tuple(of.sent for of in found) == plan.bytes_sent
    assert sum(of.held for of in found) == sum(m.numel for m in call.matrices) * (6 if stage == 0 else 1)
    assert not dist.is_initialized()


def test_a_momentum_in_bf16_costs_one_kernel_a_tensor_and_18_bytes_an_element_before_newton_schulz():
    """It and the gradient are read and written once, and the direction is packed; fp32 is packed in the same pass."""
    newton_schulz = NewtonSchulz(coefficients_for(5, "simple"))
    shapes = {f"layers.{i}.w": (32, 64) for i in range(5)}
    parameters = [Partition.of(name, shape) for name, shape in shapes.items()]
    (call,) = zero_calls("all", parameters, route(shapes).matrices, Zero(1), 1)
    plan = make_plan(call.matrices, index_of(call), newton_schulz.flops)
    in_bf16, in_fp32 = (count(call, plan, 0, newton_schulz, momentum=kind) for kind in (torch.bfloat16, torch.float32))
    assert in_bf16.kernels - in_fp32.kernels == 1
    assert in_bf16.elementwise - in_fp32.elementwise == (12 + 6 - 14) * in_fp32.held


def operations(*sizes: int) -> Counts:
    tensors = [torch.empty(size, device=META) for size in sizes]
    with Counter() as counter:
        torch._foreach_mul_(tensors, 2.0)
    return counter.counts


def test_multi_tensor_operations_count_as_often_as_torch_launches_them():
    chunk = 65536
    assert operations(*[10] * 110).kernels == 1
    assert operations(*[10] * 111).kernels == 2
    assert operations(320 * chunk).kernels == 1
    assert operations(320 * chunk + 1).kernels == 2
    assert operations(*[2 * chunk] * 110, 101 * chunk).kernels == 2  # full of tensors before it is full of chunks
    assert operations(1000).elementwise == 8 * 1000
    parts = [torch.empty(8, 4, device=META)[:, :2] for _ in range(3)]  # torch's fast path wants dense tensors
    with Counter() as counter:
        torch._foreach_mul_(parts, 2.0)
    assert counter.counts.kernels == 3


def test_what_is_read_and_written_is_counted_once():
    a, b = torch.empty(100, 10, device=META), torch.empty(100, 10, device=META, dtype=torch.bfloat16)
    with Counter() as counter:
        b.copy_(a)  # 6 bytes an element
        a.mul_(torch.empty((), device=META))  # 8, and 4 bytes for the scalar
        a.view(-1)[5:].t()
        (a @ a.mT).add_(1)  # the product is no elementwise traffic; the sum is 8 bytes an element of 100 x 100
    found = counter.counts
    assert found.elementwise == 6 * 1000 + 8 * 1000 + 4 + 8 * 10_000
    assert (found.kernels, found.views, found.allocations) == (4, 4, 2)
    assert found.peak == 4 + 4 * 10_000 - 4  # the scalar was gone when the product came


def test_messages_that_are_posted_together_are_one_call():
    with as_rank(1, 4), Counter() as counter:
        x = torch.empty(8, device=META)
        for _ in range(2):
            peers = [dist.P2POp(op, x, peer) for peer in (0, 3) for op in (dist.irecv, dist.isend)]
            dist.batch_isend_irecv(peers)
            x = x + 1
        dist.all_to_all_single(torch.empty_like(x), x)
        dist.broadcast(x, 1)
        dist.broadcast(x, 0)
    found = counter.counts
    assert (found.messages, found.collectives, found.batch) == (8, 5, 4)
    assert found.sent == 4 * 32 + 3 * 8 + 3 * 32


def test_a_process_with_process_groups_is_not_taken():
    with as_rank(0, 2), pytest.raises(RuntimeError, match=r"torch.distributed runs here \(fake\)"), as_rank(0, 2):
        pass
