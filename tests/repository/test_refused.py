"""docs/refused.md says what the code refuses under DeepSpeed, and names tests that are there."""

from __future__ import annotations

import re

import pytest

from tests.support import ROOT
from tests.support.refused import engine


def rows() -> list[list[str]]:
    """The cells of the first table."""
    text = (ROOT / "docs" / "refused.md").read_text()
    table = text.split("|---|---|---|---|\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


def test_the_table_is_that_of_the_code(monkeypatch):
    import deepspeed

    from muon_plugin.deepspeed.refusals import refusals

    monkeypatch.setattr(deepspeed, "__version_major__", 0)
    monkeypatch.setattr(deepspeed, "__version_minor__", 18)  # which has one refusal more
    found = refusals(engine())
    assert [row[:2] for row in rows()] == [[f"`{refusal.setting}`", refusal.advice] for refusal in found]


def test_the_engine_of_this_test_has_them_set(monkeypatch):
    """So that a row is of a setting that is refused; other tests have those that exclude each other."""
    import deepspeed

    from muon_plugin.deepspeed.refusals import refusals

    monkeypatch.setattr(deepspeed, "__version_minor__", 18)
    assert [refusal.setting for refusal in refusals(engine()) if not refusal.is_set] == [
        "deepspeed.moe layers with zero_optimization.stage",  # without AutoEP
        "bf16.bf16_master_weights_and_grads without offload",
        "fp16.fp16_master_weights_and_grads without offload",
        "checkpoint.load_universal with zero_optimization.stage",
        "data_types.grad_accum_dtype with stage 1",
        "scheduler.params.cycle_momentum",  # of OneCycle
        "zero_optimization.offload_optimizer.device",  # in stage 3
    ]


NAMED = re.findall(
    r"\[(test_\w+)\]\(https://github.com/muon-plugin/muon_plugin/blob/main/([\w/.]+)\)",
    (ROOT / "docs" / "refused.md").read_text(),
)
assert NAMED


@pytest.mark.parametrize(("name", "file"), NAMED)
def test_the_tests_that_it_names_are_there(name, file):
    assert f"def {name}(" in (ROOT / file).read_text()
