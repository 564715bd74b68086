"""Hooks are installed all or not at all, and removed whatever happened in between."""

from __future__ import annotations

import importlib
import sys
import types
import warnings

import pytest

from muon_plugin import registration
from muon_plugin.core.hooks import Hook, Hooks

pytestmark = pytest.mark.fast


def engine() -> tuple[types.SimpleNamespace, list[Hook]]:
    """An engine of two functions, and the hooks that double what they return."""
    holder = types.SimpleNamespace(one=lambda x: x + 1, two=lambda x: x + 2, __name__="engine")
    hooks = [Hook(holder, name, ["x"], lambda original, x: 2 * original(x)) for name in ("one", "two")]
    return holder, hooks


def test_an_untested_release_with_warnings_as_errors_is_not_hooked_at_all():
    holder, functions = engine()
    hooks = Hooks("Engine", ["1.0"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="was not tested with Engine"):
            hooks.install("1.1", functions)
    assert not hooks.installed
    assert (holder.one(1), holder.two(1)) == (2, 3)
    hooks.install("1.0", functions)
    assert (holder.one(1), holder.two(1)) == (4, 6)
    hooks.remove()
    assert (holder.one(1), holder.two(1)) == (2, 3)


def test_where_any_release_will_do_none_is_called_untested_and_no_error_calls_it_tested():
    holder, functions = engine()
    hooks = Hooks("Library", ())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hooks.install("1.1", functions)
    hooks.remove()
    holder.one = lambda y: y
    with pytest.raises(RuntimeError, match=r"unsupported Library 1\.1: .* Use another release, or a newer muon_plugin"):
        hooks.install("1.1", functions)


def test_another_signature_leaves_everything_as_it_was():
    holder, functions = engine()
    holder.two = lambda x, y: x + y
    with pytest.raises(RuntimeError, match=r"engine\.two has \['x', 'y'\], expected \['x'\]"):
        Hooks("Engine", ["1.0"]).install("1.0", functions)
    assert holder.one(1) == 2


def test_a_function_that_was_imported_before_is_wrapped_under_whatever_name_it_was_imported(monkeypatch):
    library, client = types.ModuleType("library"), types.ModuleType("client")
    library.one = original = lambda x: x + 1
    client.one = client.renamed = client.again = original
    client.other = lambda x: x + 1
    for module in (library, client):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    hooks = Hooks("Engine", ["1.0"])
    hooks.install("1.0", [Hook(library, "one", ["x"], lambda original, x: 2 * original(x))])
    assert [library.one(1), client.one(1), client.renamed(1), client.again(1), client.other(1)] == [4, 4, 4, 4, 2]
    client.late = library.one
    hooks.remove()
    assert library.one is client.one is client.renamed is client.again is client.late is original


def test_unregister_restores_the_other_engine_if_one_fails(monkeypatch):
    restored = []

    def module(name: str, package: str | None = None) -> types.SimpleNamespace:
        def unregister() -> None:
            restored.append(name)
            raise RuntimeError(f"{name} fails")

        return types.SimpleNamespace(unregister=unregister)

    monkeypatch.setattr(registration.importlib, "import_module", module)
    with pytest.raises(RuntimeError, match="fails"):
        registration.unregister()
    assert sorted(restored) == [".deepspeed", ".megatron"]


def test_importing_autoregister_registers_the_engines_that_are_installed(monkeypatch):
    calls = []
    monkeypatch.setattr(registration, "register", lambda *engines: calls.append(engines))
    monkeypatch.delitem(sys.modules, "muon_plugin.autoregister", raising=False)
    importlib.import_module("muon_plugin.autoregister")
    monkeypatch.delitem(sys.modules, "muon_plugin.autoregister")
    assert calls == [()]
