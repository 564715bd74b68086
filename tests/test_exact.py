"""The contract: the same bits on every layout."""

from __future__ import annotations

import pytest
from integers import config, differing, trained


@pytest.fixture(scope="module")
def reference(ranks):
    """One process, stage 0: by dtype."""
    return {dtype: ranks(1).run(trained, config(0, dtype))[0] for dtype in ("fp32", "bf16", "fp16")}


@pytest.mark.parametrize("gas", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_ten_steps_end_in_the_same_bits(ranks, reference, dtype, stage, world, gas):
    for rank, found in enumerate(ranks(world).run(trained, config(stage, dtype, gas))):
        assert differing(found, reference[dtype]) == [], f"rank {rank}"
