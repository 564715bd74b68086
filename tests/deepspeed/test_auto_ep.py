"""AutoEP on a small model of every family that it has a preset for."""

from __future__ import annotations

import pytest

from tests.support.auto_ep_presets import PRESETS, trained
from tests.support.combinations import FULL
from tests.support.integers import config, differing

CASES = [(preset, stage) for preset in PRESETS for stage in (0, 1, 2, 3)]


@pytest.mark.parametrize(("preset", "stage"), CASES if FULL else [("mixtral", 1), ("deepseek_v3", 3)])
def test_every_preset_ends_in_the_same_bits_and_trains(ranks, preset, stage):
    """On two EP ranks as on one; then with the model's own forward."""
    alone, wanted, count = ranks.alone(trained, config(0, "bf16"), preset, 1, apart="presets")
    seen = set()
    for found, losses, experts in ranks(2, apart="presets").run(trained, config(stage, "bf16"), preset, 2):
        seen |= set(found)
        assert differing(found, {name: alone[name] for name in found}) == []
        assert losses == pytest.approx(wanted, rel=1e-3)
        assert experts == count // 2
    assert seen == set(alone)
    assert count % (3 * 4) == 0  # gate, up and down of four experts
