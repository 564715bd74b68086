"""Wrapping an engine's functions: in one visible place per engine, checked against its release, and undone."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


def release_of(version: str) -> str:
    """The release without its local part, the commit or the build: ``0.19.2`` of ``0.19.2+4e11d24`` (PEP 440)."""
    return version.partition("+")[0]


@dataclass(frozen=True)
class Hook:
    """A function to wrap.

    Attributes:
        holder: the module or class that it belongs to.
        name: its name there.
        parameters: the names of its parameters: another signature means another engine.
        ours: called instead, with the original first, then its arguments.
    """

    holder: Any
    name: str
    parameters: Sequence[str]
    ours: Callable[..., Any]


@dataclass
class Hooks:
    """The wrapped functions of one engine.

    Attributes:
        engine: its name.
        tested: its releases that the project's tests run with; none where any will do that has the functions.
    """

    engine: str
    tested: Sequence[str]
    _wrapped: list[tuple[Hook, Any, Any]] = field(default_factory=list)  # with the original and the wrapper

    @property
    def installed(self) -> bool:
        return bool(self._wrapped)

    def install(self, version: str, hooks: Sequence[Hook]) -> None:
        """Wraps all of them, or none, and warns if this release was not tested.

        Args:
            version: of the engine, as it gives it: ``0.19.2``, or ``0.19.2+4e11d24`` for a build from source.
            hooks: functions to wrap.

        Raises:
            RuntimeError: if any has another signature than expected, with what was found.
        """
        for hook in hooks:
            function = getattr(hook.holder, hook.name, None)
            found = list(inspect.signature(function).parameters) if function else "nothing of that name"
            if found != list(hook.parameters):
                which = f"a release that was tested ({', '.join(self.tested)})" if self.tested else "another release"
                raise RuntimeError(
                    f"unsupported {self.engine} {version}: {hook.holder.__name__}.{hook.name} has {found}, expected "
                    f"{list(hook.parameters)}. Use {which}, or a newer muon_plugin"
                )
        if self.tested and release_of(version) not in self.tested:
            warnings.warn(
                f"muon_plugin was not tested with {self.engine} {version} (tested: {', '.join(self.tested)}). Where "
                "its shards lie is checked at start all the same",
                stacklevel=3,
            )
        for hook in hooks:
            original = getattr(hook.holder, hook.name)
            wrapper = _wrapped(original, hook.ours)
            _replace(hook, original, wrapper)
            self._wrapped.append((hook, original, wrapper))

    def remove(self) -> None:
        """Gives every holder the original back, modules that have imported the wrapper since among them."""
        while self._wrapped:
            hook, original, wrapper = self._wrapped.pop()
            _replace(hook, wrapper, original)


def _replace(hook: Hook, old: Any, new: Any) -> None:
    """Sets the function in its holder, and in all modules that have imported the old one, under whatever name.

    Clients rename it: verl imports ``get_megatron_optimizer as get_megatron_optimizer_native``.
    """
    setattr(hook.holder, hook.name, new)
    for module in list(sys.modules.values()) if inspect.ismodule(hook.holder) else ():
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is old:
                setattr(module, name, new)


def _wrapped(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        return ours(original, *args, **kwargs)

    return function
