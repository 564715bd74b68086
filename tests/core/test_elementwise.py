"""Directions and updates of many parts at once: the bits of one part after the other."""

from __future__ import annotations

import pytest
import torch

from muon_plugin.core import elementwise
from muon_plugin.core.elementwise import Run, Source, Target, apply, average, pack, same_bits_together
from muon_plugin.core.layout import Strided

pytestmark = pytest.mark.fast

#: (local, at) of runs: long and short, side by side and with others in between, strided in the tensor, in the buffer.
PLACES = [
    (Strided(0, 700), Strided(0, 700)),
    (Strided(700, 5), Strided(700, 5)),
    (Strided(705, 4, 16, 30), Strided(705, 4, 4, 30)),
    (Strided(1300, 10, 20, 10), Strided(900, 10, 20, 10)),
    (Strided(1700, 333), Strided(1200, 333)),
]
COLUMNS = Run(5, 1, Strided(0, 10, 20, 10), Strided(1600, 10, 20, 10))


def runs() -> list[Run]:
    return [*(Run(i, i % 2, local, at) for i, (local, at) in enumerate(PLACES)), COLUMNS]


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2048, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("large", "portion"), [(1, 2**25), (200, 500), (2**20, 2**25)])
def test_directions_of_parts_taken_together_have_the_same_bits(monkeypatch, nesterov, large, portion):
    monkeypatch.setattr(elementwise, "LARGE", large)
    monkeypatch.setattr(elementwise, "PORTION", portion)
    found = []
    for together in (False, True):
        momenta, gradients, flat = [drawn(0), drawn(1)], [drawn(2), drawn(3)], torch.zeros(2048, dtype=torch.bfloat16)
        parts = [Strided(0, 2048), Strided(0, 3, 8, 100)]
        average([(p.view(m), p.view(g), 0.05) for p, m, g in zip(parts, momenta, gradients)], together)
        sources = [Source(g, m, 0.95) if nesterov else Source(m) for g, m in zip(gradients, momenta)]
        pack(runs(), sources, flat, together)
        found.append([*momenta, flat])
    assert all(torch.equal(a, b) for a, b in zip(*found))
    expected = drawn(0).lerp(drawn(2), 0.05)
    assert torch.equal(found[0][0], expected)
    direction = drawn(2).lerp(expected, 0.95) if nesterov else expected
    assert torch.equal(found[1][2][:700], direction[:700].bfloat16())
    assert not found[1][2][2000:].any()


def test_a_tensor_without_a_gradient_has_zeros_for_directions():
    flat = torch.ones(2048, dtype=torch.bfloat16)
    pack(runs(), [Source(drawn(0)), None], flat, True)
    assert torch.equal(flat[:700], drawn(0)[:700].bfloat16())
    assert not flat[700:705].any()
    assert flat[2000:].all()


@pytest.mark.parametrize("one_scale", [True, False])
@pytest.mark.parametrize("portion", [500, 2**25])
def test_updates_of_parts_taken_together_have_the_same_bits(monkeypatch, one_scale, portion):
    monkeypatch.setattr(elementwise, "PORTION", portion)
    scales = [0.2] * 6 if one_scale else [0.2, 6.4, 0.7, 1.0, 3.3, 0.1]
    update, found = drawn(4, torch.bfloat16), []
    for together in (False, True):
        weights, told = [drawn(5), drawn(6)], {}
        targets = [Target(weights[0], 3e-3, 0.999), Target(weights[1], 0.1, 1.0)]
        apply(runs(), targets, update, scales, None, lambda run, u, to=told: to.update({run: u.clone()}), together)
        found.append((weights, told))
    (alone, told_alone), (at_once, told_at_once) = found
    assert all(torch.equal(a, b) for a, b in zip(alone, at_once))
    assert list(told_alone) == list(told_at_once) == runs()
    assert all(torch.equal(told_alone[run], told_at_once[run]) for run in runs())
    expected = (drawn(5) * 0.999).add(update.float() * scales[0], alpha=-3e-3)
    assert torch.equal(at_once[0][:700], expected[:700])


@pytest.mark.parametrize("together", [True, False])
def test_a_tensor_without_a_target_and_a_normalized_update(together):
    update, weights, factor = drawn(4, torch.bfloat16), drawn(5), torch.tensor(1.7)
    factors = dict.fromkeys(range(6), factor)
    apply(runs(), [Target(weights, 3e-3, 0.999), None], update, [0.2] * 6, factors, together=together)
    expected = (drawn(5) * 0.999).add(update.float() * 0.2 * factor, alpha=-3e-3)
    assert torch.equal(weights[:700], expected[:700])
    assert torch.equal(weights[2033:], drawn(5)[2033:])


def test_a_device_that_rounds_differently_is_found_and_told(monkeypatch):
    cpu = torch.device("cpu")
    same_bits_together.cache_clear()
    assert same_bits_together(cpu)
    for name in ("_foreach_lerp_", "_foreach_lerp", "_foreach_add_"):
        original = getattr(torch, name)

        def rounded(tensors, *args, original=original, **kwargs):
            made = original(tensors, *args, **kwargs)
            (made or tensors)[0].mul_(1 + 2**-8)
            return made

        same_bits_together.cache_clear()
        with monkeypatch.context() as patched:
            patched.setattr(torch, name, rounded)
            with pytest.warns(UserWarning, match="round differently on cpu than its single ones"):
                assert not same_bits_together(cpu)
    same_bits_together.cache_clear()
