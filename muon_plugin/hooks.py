"""Wrapping an engine's functions: in one visible place per engine, checked against its release, and undone."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


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
        engine: its name and release, for messages.
        rebind: a package whose modules may have imported a wrapped function by name; they get the wrapper too.
    """

    engine: str
    rebind: str | None = None
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def install(self, hooks: Sequence[Hook], tested: Sequence[str]) -> None:
        """Wraps all of them, or none.

        Raises:
            RuntimeError: if any is not as it is known, with what was found.
        """
        for hook in hooks:
            function = getattr(hook.holder, hook.name, None)
            found = list(inspect.signature(function).parameters) if function else "nothing of that name"
            if found != list(hook.parameters):
                raise RuntimeError(
                    f"{self.engine} is not as muon_plugin knows it: {hook.holder.__name__}.{hook.name} has {found}, "
                    f"not {list(hook.parameters)}. Use a release that was tested ({', '.join(tested)}), or a newer "
                    "muon_plugin"
                )
        for hook in hooks:
            original = getattr(hook.holder, hook.name)
            wrapper = _wrapped(original, hook.ours)
            for holder in (hook.holder, *self._others(hook.name, original)):
                setattr(holder, hook.name, wrapper)
                self._undo.append(functools.partial(setattr, holder, hook.name, original))

    def _others(self, name: str, original: Any) -> list[Any]:
        """Modules of `rebind`, and the running script, that hold the same function under its name."""
        if self.rebind is None:
            return []
        inside = [m for path, m in sys.modules.items() if path == "__main__" or path.startswith(self.rebind)]
        return [module for module in inside if vars(module).get(name) is original]

    def remove(self) -> None:
        """Gives every holder the original back."""
        while self._undo:
            self._undo.pop()()


def _wrapped(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        return ours(original, *args, **kwargs)

    return function
