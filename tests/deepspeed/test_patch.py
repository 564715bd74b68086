"""The patch, applied to the release it names, does what register() does."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.support import ROOT
from tests.support.combinations import some
from tests.support.deepspeed_runs import resume, save, weights_alone
from tests.support.integers import config, differing, trained

STAGES = some([1, 3, 0], 1)


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """A patched copy of the installed release."""
    folder = tmp_path_factory.mktemp("patched")
    shutil.copytree(find_spec("deepspeed").submodule_search_locations[0], folder / "deepspeed")
    diff = ROOT / "patches" / "deepspeed-0.19.8.patch"
    subprocess.run(["patch", "-p1", "--forward", "-i", str(diff)], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return str(folder)


@pytest.fixture(scope="module")
def registered(ranks):
    """What `register` ends in, by stage and who makes the optimizer; before the patched processes start."""
    return {stage: ranks(2).run(trained, config(stage, "bf16")) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_a_patched_tree_ends_in_the_same_bits(ranks, registered, patched, stage):
    found = ranks(2, deepspeed=patched).run(without_register, config(stage, "bf16"), patched)
    for ours, theirs in zip(found, registered[stage]):
        assert differing(ours, theirs) == []


def without_register(rank: int, settings: dict[str, Any], folder: str) -> dict[str, Tensor]:
    """As `trained`, in a DeepSpeed of one's own that is patched."""
    import deepspeed

    import muon_plugin

    assert Path(deepspeed.__file__).parent == Path(folder) / "deepspeed"
    register, muon_plugin.register = muon_plugin.register, lambda: None
    try:
        return trained(rank, settings)
    finally:
        muon_plugin.register = register


def test_a_patched_tree_loads_universal_checkpoints(ranks, registered, patched, tmp_path):
    ranks(2).run(save, config(1, "bf16"), tmp_path, 3)
    whole = ranks.alone(trained, config(1, "bf16"), 5)
    found = ranks(2, deepspeed=patched).run(resumed_without_register, config(3, "bf16"), tmp_path)[0]
    assert differing(found, whole) == []


def resumed_without_register(rank: int, settings: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    import muon_plugin

    register, muon_plugin.register = muon_plugin.register, lambda: None
    try:
        return resume(rank, settings, folder, 3, 2)
    finally:
        muon_plugin.register = register


def test_a_patched_tree_loads_the_weights_of_the_tag_that_was_asked_for(ranks, registered, patched, tmp_path):
    for _, *loads in ranks(2, deepspeed=patched).run(loaded_without_register, config(3, "bf16"), tmp_path):
        for saved, loaded, _ in loads:
            assert differing(saved, loaded) == []


def loaded_without_register(rank: int, settings: dict[str, Any], folder: Path) -> list[Any]:
    import muon_plugin

    register, muon_plugin.register = muon_plugin.register, lambda: None
    try:
        return weights_alone(rank, settings, folder)
    finally:
        muon_plugin.register = register


def test_a_patched_tree_is_not_hooked_twice(ranks, registered, patched):
    for ours, theirs in zip(ranks(2, deepspeed=patched).run(registered_too, config(1, "bf16")), registered[1]):
        assert differing(ours, theirs) == []


def registered_too(rank: int, settings: dict[str, Any]) -> dict[str, Tensor]:
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine

    import muon_plugin

    own = deepspeed.set_optimizer_flags, DeepSpeedEngine._configure_optimizer
    muon_plugin.register("deepspeed")
    assert (deepspeed.set_optimizer_flags, DeepSpeedEngine._configure_optimizer) == own
    found = trained(rank, settings)
    muon_plugin.unregister()
    return found
