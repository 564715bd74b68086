"""Markdown of the parts' reports."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("\n", " ") for cell in line) + " |" for line in lines)


def title(text: str, on: dict[str, Any]) -> str:
    """A heading, and on what it was run."""
    versions = [f"{key} {value}" for key, value in on.items() if key not in ("device", "gpus", "size")]
    device = f"{on.get('gpus') or ''} x {on.get('device')}" if on.get("gpus", 0) > 1 else on.get("device")
    tiny = "; tiny sizes, which show that the code runs and nothing else" if on.get("size") == "tiny" else ""
    return f"# {text}\n\n{datetime.now(timezone.utc).date()}, {device}; {', '.join(versions)}{tiny}."


def failures(found: dict[str, Any]) -> str:
    """What has no result, for the end of a report."""
    rows = [
        [name, one.state, one.value.get("error", "").replace("|", "/")[:300]]
        for name, one in found.items()
        if one.state != "passed"
    ]
    return f"\n\nWithout a result:\n\n{table(['case', '', 'why'], rows)}" if rows else ""
