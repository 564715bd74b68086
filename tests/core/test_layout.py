"""Shards and matrices cut each other right, whatever their strides: by brute force."""

from __future__ import annotations

import random

import pytest
import torch

from muon_plugin.core.layout import Block, Matrix, Partition, Shard, Strided, common, cut_shards, pieces

pytestmark = pytest.mark.fast


def positions(s: Strided) -> list[int]:
    return [s.start + i * s.stride + j for i in range(s.count) for j in range(s.run)]


def draw() -> Strided:
    run, count = random.randint(1, 12), random.choice([1, 1, 2, 3, 5])
    # A single run may have any stride: it comes from a parameter of which a rank holds one run.
    stride = run + random.randint(0, 9) if count > 1 else random.choice([0, random.randint(1, 20)])
    return Strided(random.randint(0, 20), run, stride, count)


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


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dim", [None, 0, 1, 2])
def test_a_partition_is_what_torch_chunks(dim, size, parts):
    shape = [n * 24 if d == dim else n for d, n in enumerate((2, 3, 5))]
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    partition = Partition.of("w", shape, dim, size, parts)
    for rank in range(size):
        if dim is None:
            expected = whole
        else:
            expected = torch.cat([part.chunk(size, dim)[rank] for part in whole.chunk(parts, dim)], dim)
        held = torch.full((expected.numel(),), -1.0)
        for block in partition.in_whole(rank, Block(Strided(0, held.numel()), Strided(0, held.numel()))):
            block.local.view(held).copy_(block.inside.view(whole.view(-1)))
        assert torch.equal(held.view(expected.shape), expected)


def test_a_dimension_that_the_tp_ranks_cannot_share_evenly_is_refused():
    with pytest.raises(ValueError, match=r"dimension 0 of \[6, 4\] is not 2 x 2 equal parts"):
        Partition.of("w", (6, 4), 0, size=2, parts=2)


def test_the_worked_example_of_the_module():
    partition = Partition.of("w", (4, 6), dim=1, size=2)
    assert partition.ranks[1] == (Block(Strided(0, 3, 3, 4), Strided(3, 3, 6, 4)),)
    tensor = torch.empty(8)
    shards = cut_shards(partition, 1, Shard.of_range("w", 2, 8, tensor))
    assert [s.where for s in shards] == [Strided(5, 1), Strided(9, 3, 6, 2), Strided(21, 1)]
    assert [positions(s.local) for s in shards] == [[0], [1, 2, 3, 4, 5, 6], [7]]
    matrices = [Matrix(f"w[{i}]", "w", 2, 6, Strided(12 * i, 12)) for i in range(2)]
    upper, lower = pieces(matrices, shards, {id(tensor): 0})
    assert [x for inside in upper.inside for x in positions(inside)] == [5, 9, 10, 11]
    assert [x for inside in lower.inside for x in positions(inside)] == [3, 4, 5, 9]


@pytest.mark.parametrize(("dim", "stride"), [(-1, 1), (2, 1), (0, 3)])
def test_a_clients_mark_that_does_not_fit_the_parameter_is_refused(dim, stride):
    from muon_plugin.deepspeed.tensor_parallel import _partition

    p = torch.nn.Parameter(torch.zeros(4, 6))
    p.tensor_model_parallel, p.partition_dim, p.partition_stride = True, dim, stride
    with pytest.raises(ValueError, match=rf"w \[4, 6\] is marked .*partition_dim={dim} and partition_stride={stride}"):
        _partition("w", p, 2)
