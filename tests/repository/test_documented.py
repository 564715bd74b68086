"""Everything public is documented where it is defined, and reachable by `help`."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pydoc
from dataclasses import fields

import pytest

import muon_plugin
from muon_plugin.core import muon
from muon_plugin.core.settings import Settings
from tests.support import ROOT

PACKAGES = sorted(
    f"muon_plugin.{path.stem}"
    for path in (ROOT / "muon_plugin").iterdir()
    if (path / "__init__.py").exists() and path.name not in ("core", "kernels")
)


def test_help_shows_what_is_public():
    told = pydoc.plain(pydoc.render_doc(muon_plugin))
    assert "class Muon(torch.optim.optimizer.Optimizer)" in told
    for name in ("register", "unregister", "largest_logits", "record_logits"):
        assert f"\n    {name}(" in told
    for module in PACKAGES:
        assert f"\n    {module.removeprefix('muon_plugin.')}" in told  # PACKAGE CONTENTS
    assert set(muon_plugin.__all__) <= set(dir(muon_plugin))


@pytest.mark.parametrize("name", ["muon_plugin", "muon_plugin.moonlight", *PACKAGES])
def test_everything_public_has_a_docstring(name):
    module = importlib.import_module(name)
    assert module.__doc__
    public = [getattr(module, member) for member in getattr(module, "__all__", ())]
    for found in public:
        if not (inspect.isclass(found) or inspect.isroutine(found)):
            continue
        assert found.__doc__, found
        members = inspect.getmembers(found, inspect.isfunction) if inspect.isclass(found) else []
        for key, member in members:
            if not key.startswith("_") and member.__module__.startswith("muon_plugin"):
                assert member.__doc__, f"{found.__name__}.{key}"


def test_muon_names_every_setting():
    described = muon.Muon.__doc__ or ""
    assert [field.name for field in fields(Settings) if f"``{field.name}``" not in described] == []


def test_the_example_of_muon_runs():
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(muon.Muon, "Muon", globs={})
    assert len(example.examples) >= 10
    results = doctest.DocTestRunner().run(example)
    assert results.attempted == len(example.examples)
    assert results.failed == 0
