"""The long description: README.md with absolute links, since package indexes cannot follow relative ones.

Everything else is in pyproject.toml.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?!https?://|#)(?P<target>[^)]+)\)")


def long_description() -> str:
    """README.md with links to the files of the release's tag."""
    repository = re.search(r'^Repository = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    version = re.search(r'^__version__ = "(.+)"$', (ROOT / "muon_plugin/__init__.py").read_text(), re.MULTILINE)[1]

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link["image"] else "blob"
        return f"{link['image']}[{link['text']}]({repository}/{kind}/v{version}/{link['target']})"

    return LINK.sub(absolute, (ROOT / "README.md").read_text())


setup(long_description=long_description(), long_description_content_type="text/markdown")
