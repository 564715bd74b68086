"""Everything public is documented where it is defined, and reachable by `help`."""

from __future__ import annotations

import doctest
import importlib
import inspect
import io
import pydoc
import re
from contextlib import redirect_stdout
from dataclasses import fields
from typing import Any

import pytest

import muon_plugin
from muon_plugin.core import muon
from muon_plugin.core.settings import Settings
from tests.support import ROOT
from tests.support.ranks import Ranks

PACKAGES = sorted(
    f"muon_plugin.{path.stem}"
    for path in (ROOT / "muon_plugin").iterdir()
    if (path / "__init__.py").exists() and path.name not in ("core", "kernels")
)
#: All that is public, but for the commands.
MODULES = [
    *("muon_plugin", "muon_plugin.moonlight", "muon_plugin.megatron.moonlight", "muon_plugin.megatron.on_cpu"),
    *(name for name in PACKAGES if name != "muon_plugin.preflight"),
]


def test_help_shows_what_is_public():
    told = pydoc.plain(pydoc.render_doc(muon_plugin))
    assert "class Muon(torch.optim.optimizer.Optimizer)" in told
    for name in ("register", "unregister", "largest_logits", "record_logits"):
        assert f"\n    {name}(" in told
    for module in PACKAGES:
        assert f"\n    {module.removeprefix('muon_plugin.')}" in told  # PACKAGE CONTENTS
    assert set(muon_plugin.__all__) <= set(dir(muon_plugin))


@pytest.mark.parametrize("name", [*MODULES, "muon_plugin.preflight"])
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


#: What docs/api.md has, and what a process without an engine and its launcher cannot show.
WITHOUT_EXAMPLE = {
    *("muon_plugin.unregister", "muon_plugin.deepspeed.register", "muon_plugin.deepspeed.unregister"),
    *("muon_plugin.megatron.register", "muon_plugin.megatron.unregister", "muon_plugin.megatron.on_cpu.install"),
    *("muon_plugin.megatron.moonlight.three_stages", "muon_plugin.watchdog.start", "muon_plugin.watchdog.stop"),
    "muon_plugin.metrics.AttentionLogits",  # of `attention_logits`
}


def in_the_reference() -> dict[str, Any]:
    """The functions and classes of docs/api.md by their names."""
    found = {}
    for name, options in re.findall(
        r"^::: (\S+)\n((?:    .*\n)*)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE
    ):
        members = re.findall(r"[\w]+", options.partition("members:")[2])
        holder = pydoc.locate(name)
        of_a_module = [f"{name}.{member}" for member in members if member != "false"]
        for path in of_a_module if inspect.ismodule(holder) else [name]:
            found[path] = pydoc.locate(path)
    return {path: value for path, value in found.items() if inspect.isclass(value) or inspect.isroutine(value)}


def test_what_is_public_is_in_the_reference():
    public = {f"{name}.{member}" for name in MODULES for member in importlib.import_module(name).__all__}
    found = {f"{value.__module__}.{value.__qualname__}" for value in in_the_reference().values()}
    for path in public:
        value = pydoc.locate(path)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert f"{value.__module__}.{value.__qualname__}" in found, path


def test_attributes_and_arguments_have_an_item_each():
    """mkdocstrings takes ``a, b: ...`` for one name."""
    for path, value in in_the_reference().items():
        members = [member for _, member in inspect.getmembers(value) if inspect.isroutine(member)]
        for documented in [value, *(members if inspect.isclass(value) else [])]:
            assert not re.search(r"^ {8}[*\w]+, [*\w, ]+: ", documented.__doc__ or "", re.MULTILINE), path


@pytest.mark.parametrize("path", sorted(in_the_reference()))
def test_examples_run(path):
    if path in WITHOUT_EXAMPLE:
        assert ">>>" not in (pydoc.locate(path).__doc__ or "")
        return
    processes = Ranks(1, group=False, clients=True)  # which have imported transformers
    try:
        attempted, failures = processes.run(examples, path)[0]
    finally:
        processes.close()
    assert attempted >= 2
    assert not failures, failures


def examples(rank: int, path: str) -> tuple[int, str]:
    (example,) = doctest.DocTestFinder(recurse=False).find(pydoc.locate(path), path, globs={})
    with redirect_stdout(io.StringIO()) as told:
        results = doctest.DocTestRunner(verbose=False).run(example)
    return results.attempted, told.getvalue()
