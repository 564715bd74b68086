"""What the README and the documentation say is what is true."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import fields

import pytest

from muon_plugin.core.settings import Settings
from tests.support import ROOT

REPOSITORY = "https://github.com/muon-plugin/muon_plugin/"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_tables_are_those_that_were_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from into_readme import PAGES, filled

    for page in PAGES:
        assert filled(page.read_text()) == page.read_text(), page
    sys.modules.pop("into_readme")


def test_every_setting_is_in_the_table_with_its_default():
    rows = {}
    for line in (ROOT / "docs" / "settings.md").read_text().splitlines():
        if line.startswith("| `"):
            names, defaults = (re.findall(r"`([^`]+)`", cell) for cell in line.split(" | ")[:2])
            rows |= dict(zip(names, defaults))
    for setting in fields(Settings):
        default = getattr(Settings(), setting.name)
        expected = "`lr`" if setting.name in ("muon_lr", "adam_lr") else json.dumps(default)
        if setting.name not in ("muon_lr", "adam_lr"):
            assert json.dumps(json.loads(rows[setting.name])) == expected, setting.name
        else:
            assert rows[setting.name] == "lr"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if file := re.fullmatch(REPOSITORY + r"(?:blob|tree)/main/(.+)", target):
            assert (ROOT / file[1]).exists(), target
        else:
            assert target.startswith(("http", "mailto:", "#")) or (page.parent / target).exists(), target
