"""The contract under the engines on CUDA: a GPU a rank over NCCL where there are enough, else shared over gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.integers import IntegerModel, build, config, differing, train, trained, weights
from tests.support.megatron_model import Layout
from tests.support.megatron_model import trained as megatron_trained
from tests.support.ranks import Ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
RELEASE = "0.19.2"


@pytest.fixture(scope="module")
def gpus():
    pools: dict[tuple[int, str | None], Ranks] = {}

    def pool(size: int, megatron: str | None = None) -> Ranks:
        key = size, megatron
        if key not in pools or not pools[key].alive:
            pools[key] = Ranks(size, megatron, device="cuda")
        return pools[key]

    yield pool
    for started in pools.values():
        started.close()


@pytest.fixture(scope="module")
def reference(gpus):
    """One process, stage 0: by dtype."""
    return {dtype: gpus(1).run(trained, config(0, dtype))[0] for dtype in ("fp32", "bf16", "fp16")}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_zero_ends_in_the_same_bits(gpus, reference, dtype, stage, world):
    for gas in (1, 4):
        for rank, found in enumerate(gpus(world).run(trained, config(stage, dtype, gas))):
            assert differing(found, reference[dtype]) == [], f"rank {rank}, {gas} micro-batches"


class _Products(TorchDispatchMode):
    """On which devices matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.split(".")[0] in ("mm", "bmm", "addmm", "baddbmm"):
            self.devices.add(args[-1].device.type)
        return func(*args, **(kwargs or {}))


def offloaded(rank: int, settings: dict[str, Any]) -> tuple[Any, set[str], set[str]]:
    engine = build(rank, settings, IntegerModel())
    with _Products() as products:
        train(engine, rank, 10)
    states = engine.basic_optimizer.state.values()
    kept = {value.device.type for state in states for value in state.values() if isinstance(value, torch.Tensor)}
    found = weights(engine)
    engine.destroy()
    return found, products.devices, kept


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_momentum_stays_on_the_cpu_and_matrices_are_orthogonalized_on_the_gpu(gpus, reference, stage):
    """The CPU multiplies and adds as the GPU does, to the bit; its AdamW rounds otherwise than the GPU's."""
    settings = config(stage, "fp32", zero_optimization={"offload_optimizer": {"device": "cpu"}})
    ((found, products, kept),) = gpus(1).run(offloaded, settings)
    assert (products, kept) == ({"cuda"}, {"cpu"})
    far = {
        name: float((found[name] - wanted).norm() / wanted.norm())
        for name, wanted in reference["fp32"].items()
        if not torch.equal(found[name], wanted)
    }
    assert all(distance < 1e-5 for distance in far.values()), far


MEGATRONS = [
    (1, Layout("moe")),
    (2, Layout(tp=2)),
    (2, Layout()),
    (4, Layout(tp=2)),
    (2, Layout("moe", ep=2)),
    (4, Layout("moe", tp=2, ep=2)),
    (2, Layout(pp=2)),
]


@pytest.mark.parametrize(("world", "layout"), MEGATRONS)
def test_megatron_ends_in_the_same_bits(gpus, world, layout):
    alone = gpus(1, RELEASE).run(megatron_trained, Layout(layout.model))[0]
    for rank, found in enumerate(gpus(world, RELEASE).run(megatron_trained, layout)):
        assert differing(found, alone) == [], f"rank {rank}"
