import os
import tempfile

import pytest
from ranks import Ranks

# DeepSpeed compiles kernels at first use. A build elsewhere that was killed leaves a lock on which all later ones wait.
os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp()


@pytest.fixture(scope="session")
def ranks():
    """`ranks(n)`: a pool of n processes, started at its first use."""
    pools: dict[int, Ranks] = {}

    def pool(size: int) -> Ranks:
        if size not in pools or not pools[size].alive:
            pools[size] = Ranks(size)
        return pools[size]

    yield pool
    for started in pools.values():
        started.close()
