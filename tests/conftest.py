import os
import re
import shutil

import pytest
import torch

from tests.support import ROOT, session, torch_releases
from tests.support.ranks import Ranks


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # not in the workers of pytest-xdist, which inherit the environment
        session.begin()
        # Workers and the processes of their tests share the cores: threads that wait for each other while others
        # compute cost several times what they save.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # Megatron and DeepSpeed's Muon mark functions with torch.compile, which takes ten seconds in each process.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        # DeepSpeed compiles its AdamW at first use; `make test` does so at installation. A copy for each run, since a
        # start that is killed leaves a lock on which all later ones wait.
        extensions = session.folder() / "extensions"
        if torch_releases.extensions().exists():
            # without the lock that a build which was killed leaves behind, on which every later one waits
            shutil.copytree(torch_releases.extensions(), extensions, ignore=shutil.ignore_patterns("lock"))
        os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        session.end()


#: Files whose module-scoped fixtures take long to make.
SHARED = {
    f"tests/{name}"
    for name in (
        "cluster/test_slurm.py",
        "paper/test_paper.py",
        "deepspeed/test_patch.py",
        "kernels/test_symmetric_triton.py",
    )
}
#: The same, with one fixture for each first parameter.
SHARED_BY_PARAMETER = {f"tests/{name}" for name in ("deepspeed/test_clients.py", "megatron/test_patches.py")}


@pytest.hookimpl(optionalhook=True)  # there is no such hook without pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """With `--dist loadgroup`: tests that share a fixture above run in one worker; all others go anywhere.

    Marks of the kind `xdist_group` would say the same, but pytest-xdist 3.8 loses them under pytest 9.2, in silence.
    """
    from xdist.scheduler import LoadScopeScheduling

    if gone := [file for file in SHARED | SHARED_BY_PARAMETER if not (ROOT / file).exists()]:
        raise pytest.UsageError(f"tests/conftest.py knows {gone}, which is not there")

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            if file in SHARED:
                return file
            if file in SHARED_BY_PARAMETER:
                return file + re.split(r"-|\]$", test.partition("[")[2])[0]
            return nodeid

    return Scheduling(config, log) if config.getvalue("dist") == "loadgroup" else None


class Pools:
    """Pools of ranks for the tests; those of other engines than the last one asked for are closed."""

    def __init__(self) -> None:
        self._pools: dict[tuple[int, str | None, str | None, str | None], Ranks] = {}

    def __call__(
        self, size: int, megatron: str | None = None, deepspeed: str | None = None, apart: str | None = None
    ) -> Ranks:
        key = size, megatron, deepspeed, apart
        for other in [k for k in self._pools if k[1:] != key[1:]]:
            self._pools.pop(other).close()
        if key not in self._pools or not self._pools[key].alive:
            self._pools[key] = Ranks(size, megatron, deepspeed)
        return self._pools[key]

    def alone(self, function, *args, megatron=None, deepspeed=None, apart=None):
        """What `function(0, *args)` returns in one process; computed once in a run of the tests, for all workers."""
        key = repr((function.__module__, function.__qualname__, args, megatron, deepspeed))
        return session.once(key, lambda: self(1, megatron, deepspeed, apart).run(function, *args)[0])

    def forked(self, function, *args, megatron=None, **kwargs):
        """`function(0, *args, **kwargs)` in a process of its own without process groups, which ends with it."""
        process = Ranks(1, megatron, group=False)
        try:
            return process.run(function, *args, **kwargs)[0]
        finally:
            process.close()

    def clients(self, size, function, *args, **kwargs):
        """`function(rank, *args, **kwargs)` on `size` processes that have imported TRL, PEFT, Lightning ..., and end.

        Hugging Face's libraries keep much of a run's state in the process.
        """
        processes = Ranks(size, clients=True)
        try:
            return processes.run(function, *args, **kwargs)
        finally:
            processes.close()

    def close(self) -> None:
        for started in self._pools.values():
            started.close()


@pytest.fixture(scope="session")
def ranks():
    """`ranks(n)`: a pool of n processes, forked at its first use from one that has imported the engine.

    `ranks(n, "0.19.2")`: with that Megatron-Core; `ranks(n, deepspeed="0.18.9")`: with that DeepSpeed;
    `ranks(n, apart="pipeline")`: for tests whose process groups DeepSpeed keeps for good.
    `ranks.alone(function, *arguments)`: what one process returns, computed once for all tests of a run.
    `ranks.forked(function, *arguments)`: in a process of its own, without process groups.
    `ranks.clients(n, function, *arguments)`: on n processes of their own that have imported TRL, PEFT, Lightning, ...
    """
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture(scope="session", autouse=True)
def told_in_the_report(record_testsuite_property):
    """With `--junitxml`: the torch that the tests ran with."""
    record_testsuite_property("torch", torch.__version__.partition("+")[0])


@pytest.fixture(scope="session", params=["0.16.1", "0.19.2"])
def release(request):
    """Each Megatron-Core that must work."""
    return request.param
