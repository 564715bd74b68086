"""The code blocks of the documentation, fenced or indented."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from textwrap import dedent

from tests.support import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "configs/README.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
#: A paragraph of four spaces after one of these belongs to it, and is no code: tabs, admonitions, list items.
HOLDS_INDENTED = re.compile(r"===|!!!|\?\?\?|[-*] |\d+\. ")


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        page: the file, from the repository's root.
        line: of its first line of code, from 1.
        language: as the fence says it; of an indented block as `_guessed`.
        text: the code, without indentation.
    """

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def blocks(language: str | None = None) -> list[Block]:
    """All blocks, or those in one language, page by page."""
    found = [block for page in PAGES for block in of_page(str(page.relative_to(ROOT)), page.read_text())]
    return [block for block in found if language in (None, block.language)]


def of_page(page: str, text: str) -> Iterator[Block]:
    lines = text.splitlines()
    number, outer = 0, ""
    while number < len(lines):
        line = lines[number]
        if fence := re.match(r" *```(\w*)", line):
            end = next(n for n in range(number + 1, len(lines)) if lines[n].strip() == "```")
            yield Block(page, number + 2, fence[1], dedent("\n".join(lines[number + 1 : end])))
            number = end + 1
            continue
        if line[:1].strip():
            outer = line
        if line.startswith("    ") and not lines[number - 1].strip() and not HOLDS_INDENTED.match(outer):
            end = number
            while end < len(lines) and (not lines[end] or lines[end].startswith("    ")):
                end += 1
            code = dedent("\n".join(lines[number:end])).rstrip()
            yield Block(page, number + 1, _guessed(code), code)
            number = end
            continue
        number += 1


def _guessed(code: str) -> str:
    if code.startswith("{"):
        return "json"
    return "text" if code.startswith("muon_plugin planner ---") else "bash"
