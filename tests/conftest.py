import os
import tempfile

import pytest
from ranks import Ranks

# DeepSpeed compiles kernels at first use. A build elsewhere that was killed leaves a lock on which all later ones wait.
os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp()


@pytest.fixture(scope="session")
def ranks():
    """`ranks(n)`: a pool of n processes, started at its first use.

    `ranks(n, "0.19.2")`: with that Megatron-Core; `ranks(n, deepspeed="0.18.9")`: with that DeepSpeed;
    `ranks(n, apart="pipeline")`: for tests whose process groups DeepSpeed keeps for good.
    """
    pools: dict[tuple[int, str | None, str | None, str | None], Ranks] = {}

    def pool(size: int, megatron: str | None = None, deepspeed: str | None = None, apart: str | None = None) -> Ranks:
        key = size, megatron, deepspeed, apart
        for other in [k for k in pools if k[1:] != key[1:]]:  # tests of one engine stand together: memory for one
            pools.pop(other).close()
        if key not in pools or not pools[key].alive:
            pools[key] = Ranks(size, megatron, deepspeed)
        return pools[key]

    yield pool
    for started in pools.values():
        started.close()


@pytest.fixture(scope="session", params=["0.16.1", "0.19.2"])
def release(request):
    """Each Megatron-Core that must work; all tests of one before those of the next, since pools take long to start."""
    return request.param
