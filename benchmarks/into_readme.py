"""Puts the measured results into the README and the pages of docs: tables there are files under benchmarks/results/.

python benchmarks/into_readme.py                   # the tables
python benchmarks/into_readme.py --train runs/llama    # and first takes over what `make train` gave (or runs/megatron)
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("design", "fine-tuning", "paper", "performance")),
)
BLOCK = re.compile(r"(<!-- begin (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The text with each block between begin and end replaced by its file."""
    return BLOCK.sub(lambda found: found[1] + (ROOT / found[2]).read_text().strip() + "\n" + found[3], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--train", type=Path, help="output folder of `make train` or `make train-megatron` to take over"
    )
    options = parser.parse_args()
    if options.train:
        name = options.train.name
        shutil.copy(options.train / "result.md", ROOT / "benchmarks" / "results" / f"{name}.md")
        shutil.copy(options.train / "loss.png", ROOT / "docs" / f"{name}.png")
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
