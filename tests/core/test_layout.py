"""Shards and matrices cut each other right, whatever their strides: by brute force."""

from __future__ import annotations

import random

import pytest
import torch

from muon_plugin.core.layout import Matrix, Shard, Strided, common, pieces

pytestmark = pytest.mark.fast


def positions(s: Strided) -> list[int]:
    return [s.start + i * s.stride + j for i in range(s.count) for j in range(s.run)]


def draw() -> Strided:
    run, count = random.randint(1, 12), random.choice([1, 1, 2, 3, 5])
    return Strided(random.randint(0, 20), run, run + random.randint(0, 9) if count > 1 else 0, count)


def test_pieces_of_strided_shards_and_matrices():
    random.seed(0)
    overlaps = 0
    for _ in range(4000):
        a, b = draw(), draw()
        if random.random() < 0.5 and a.count > 1 and b.count > 1:
            b = Strided(b.start, min(b.run, a.stride), a.stride, b.count)
        found = [x for part in common(a, b) for x in positions(part)]
        assert len(found) == len(set(found))
        assert set(found) == set(positions(a)) & set(positions(b))
        # The shard's elements lie in a tensor one after the other, or with gaps of its own.
        gaps = random.random() < 0.5 and a.count > 1
        local = Strided(3, a.run, a.stride + 2, a.count) if gaps else Strided(3, a.numel)
        tensor, matrix = torch.zeros(200), torch.tensor([float(x) for x in positions(b)])
        tensor[positions(local)] = torch.tensor([float(x) for x in positions(a)])
        held = pieces([Matrix("m", "p", 1, b.numel, b)], [Shard("p", a, tensor, local)], {id(tensor): 0})
        for piece in held:
            overlaps += 1
            assert sum(block.inside.numel for block in piece.blocks) == len(found)
            for block in piece.blocks:
                assert (block.local.count, block.local.run) == (block.inside.count, block.inside.run)
                assert torch.equal(block.local.view(tensor), block.inside.view(matrix))
    assert overlaps > 1000
