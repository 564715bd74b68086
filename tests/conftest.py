import os
import shutil

import pytest

from tests.support import ROOT, session
from tests.support.ranks import Ranks


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # not in the workers of pytest-xdist, which inherit the environment
        session.begin()
        # DeepSpeed compiles its AdamW at first use; `make test` does so at installation. A copy for each run, since a
        # start that is killed leaves a lock on which all later ones wait.
        extensions = session.folder() / "extensions"
        if (ROOT / ".venv" / "torch_extensions").exists():
            # without the lock that a build which was killed leaves behind, on which every later one waits
            shutil.copytree(ROOT / ".venv" / "torch_extensions", extensions, ignore=shutil.ignore_patterns("lock"))
        os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        session.end()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """With `--dist loadgroup`: tests that share what takes long to make stay in one worker; all others go anywhere."""
    for item in items:
        shared = sorted(name for name in ("runs", "out", "cluster", "patched") if name in item.fixturenames)
        if shared:
            parameter = item.callspec.params.get(shared[0], "") if hasattr(item, "callspec") else ""
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {parameter}"))


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
    """
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture(scope="session", params=["0.16.1", "0.19.2"])
def release(request):
    """Each Megatron-Core that must work."""
    return request.param
