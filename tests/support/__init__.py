"""What the tests share: ranks, models, jobs, scripts. No test file imports from another test file."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
