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
    """

    engine: str
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
            # Modules that imported the function by name before now get the wrapper too.
            others = [m for m in list(sys.modules.values()) if getattr(m, "__dict__", {}).get(hook.name) is original]
            for holder in {id(h): h for h in (hook.holder, *others)}.values():
                setattr(holder, hook.name, wrapper)
                self._undo.append(functools.partial(setattr, holder, hook.name, original))

    def remove(self) -> None:
        """Gives every holder the original back."""
        while self._undo:
            self._undo.pop()()


def _wrapped(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        return ours(original, *args, **kwargs)

    return function
