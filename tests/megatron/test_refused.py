"""docs/refused-megatron.md says what the code refuses, and names a test for each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from muon_plugin.megatron.refusals import check_supported, refusals

ROOT = Path(__file__).parents[2]
CONFIG = SimpleNamespace(use_precision_aware_optimizer=False, optimizer_cpu_offload=False)
DDP = SimpleNamespace(use_distributed_optimizer=True)


def rows(heading: str) -> Iterator[list[str]]:
    """The cells of the table under a heading."""
    text = (ROOT / "docs/refused-megatron.md").read_text()
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    for line in lines:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def test_the_settings_are_those_of_the_code():
    found = [(setting.strip("`"), advice) for setting, _, advice, _ in rows("Settings")]
    assert found == [(refusal.setting, refusal.advice) for refusal in refusals(CONFIG, DDP)]


def test_the_errors_are_in_the_code():
    code = "".join(path.read_text() for path in (ROOT / "muon_plugin/megatron").glob("*.py"))
    code = re.sub(r'"\s*f?"', "", code)  # a message over several lines
    found = [what.strip("`") for what, *_ in rows("Models and combinations")]
    assert len(found) > 5
    assert [what for what in found if what not in code] == []


@pytest.mark.parametrize("heading", ["Settings", "Models and combinations"])
def test_the_tests_are_there(heading):
    for *_, tests in rows(heading):
        for name in re.findall(r"`(.*?)`", tests):
            assert (ROOT / "tests" / name).is_file(), name


@pytest.mark.parametrize("field", ["main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"])
def test_dtypes_are_looked_at_where_they_matter(field):
    config = SimpleNamespace(**{**vars(CONFIG), field: torch.float16})
    check_supported(config, DDP)
    config.use_precision_aware_optimizer = True
    with pytest.raises(ValueError, match=f"^--{field.replace('_', '-')}='fp16' is not supported.*supported: fp32"):
        check_supported(config, DDP)
