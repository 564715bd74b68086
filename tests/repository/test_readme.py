"""What the README says is what is true."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import fields

from muon_plugin.core.settings import Settings
from tests.support import ROOT

README = (ROOT / "README.md").read_text()


def test_the_tables_are_those_that_were_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from into_readme import PAGES, filled

    for page in PAGES:
        assert filled(page.read_text()) == page.read_text(), page
    sys.modules.pop("into_readme")


def test_every_setting_is_in_the_table_with_its_default():
    rows = {}
    for line in README.splitlines():
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


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
