"""Python's garbage collector, which a start does without.

The plan of a large model is millions of small objects, of which none is garbage. Python would go through all of them
again and again while they become more, which is a third of the time.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def without_collector(function: Function) -> Function:
    """The function, during which cycles of objects are not looked for."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not gc.isenabled():
            return function(*args, **kwargs)
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            gc.enable()

    return wrapped  # type: ignore[return-value]
