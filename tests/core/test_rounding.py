"""Stochastic rounding to bf16: unbiased, of no layout, and what it is for."""

from __future__ import annotations

import numpy as np
import torch

from muon_plugin.core.rounding import FACTORS, SHIFTS, mixed, stochastic


def random(count: int = 4096) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def test_the_hash_is_that_of_unsigned_integers():
    bits = torch.randint(-(2**31), 2**31, (10_000,), generator=torch.Generator().manual_seed(0)).int()
    expected = bits.numpy().view(np.uint32).copy()
    for shift, factor in zip(SHIFTS, (*FACTORS, 1)):
        expected = (expected ^ (expected >> np.uint32(shift))) * np.uint32(factor)
    assert np.array_equal(mixed(bits).numpy().view(np.uint32), expected)


def test_it_is_one_of_two_neighbours_and_on_average_the_value():
    values = random()
    below = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)
    above = ((values.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
    steps = 4000
    up = torch.zeros_like(values)
    for step in range(steps):
        found = stochastic(values, step).float()
        assert bool(((found == below) | (found == above)).all())
        up += found == above
    share = (values - below) / (above - below)
    error = (up / steps - share) / (share * (1 - share) / steps).clamp_min(1e-12).sqrt()
    inner = (share > 0.01) & (share < 0.99)
    assert error[inner].square().mean().sqrt() < 1.1, "more than the deviation of so many throws"
    assert error[inner].abs().max() < 6


def test_what_bf16_has_stays_and_so_do_infinities_and_nan():
    exact = torch.cat([random().bfloat16().float(), torch.tensor([0.0, -0.0, float("inf"), -float("inf")])])
    nan = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int64).int().view(torch.float32)
    for step in range(50):
        assert torch.equal(stochastic(exact, step).view(torch.int16), exact.bfloat16().view(torch.int16))
        assert bool(stochastic(nan, step).isnan().all())


def test_the_bits_depend_on_the_value_and_the_step_alone():
    values = random()
    whole = stochastic(values, 7)
    assert torch.equal(whole, torch.cat([stochastic(part.contiguous(), 7) for part in values.split(777)]))
    assert torch.equal(whole.view(64, 64), stochastic(values.view(64, 64), 7))
    assert not torch.equal(whole, stochastic(values, 8))


def test_an_average_goes_where_the_nearest_stands_still():
    """By half a last place, 2**-8 of the value, each change of the nearest is lost."""
    size, mu = 20_000, 0.95
    generator, start = torch.Generator().manual_seed(0), torch.ones(size)
    nearest = kept = start.bfloat16()
    for step in range(400):
        gradient = 1.02 + 0.001 * torch.randn(size, generator=generator)
        nearest = nearest.float().lerp_(gradient, 1 - mu).bfloat16()
        kept = stochastic(kept.float().lerp_(gradient, 1 - mu), step)
    assert torch.equal(nearest.float(), start), "which is why"
    assert abs(float(kept.float().mean()) - 1.02) < 2e-4
