"""A build from source is the release it was made of: only another release is called untested.

Megatron-Core 0.19 appends the commit of the git repository that it lies in: ``0.19.2+4e11d24``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from muon_plugin.core.hooks import release_of
from tests.support import ROOT
from tests.support.combinations import FULL
from tests.support.ranks import release

#: Registers as it is, where the warning is an error, and again as another release; prints both versions.
SCRIPT = """
import importlib, json, sys, warnings

import muon_plugin
engine, holder, changed, other = sys.argv[1:]
if engine == "megatron":
    from muon_plugin.megatron import on_cpu

    on_cpu.install()
holder = importlib.import_module(holder)
holder.__version__ = changed or holder.__version__
warnings.filterwarnings("error", message=".*was not tested")
muon_plugin.register(engine)
muon_plugin.unregister()
found, holder.__version__ = holder.__version__, other
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    muon_plugin.register(engine)
told = [str(warning.message) for warning in caught if "was not tested" in str(warning.message)]
print("found:", json.dumps({"version": found, "told": told}))
"""


def repository(folder: Path) -> str:
    """Makes a git repository with one commit, and gives the commit's short name."""

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "First")
    return git("rev-parse", "--short", "HEAD")


def registered(folder: Path, path: list[Path], *arguments: str) -> dict[str, Any]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    variables |= {"PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT])), "DS_ACCELERATOR": "cpu"}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout.rpartition("found: ")[2])
    return found


@pytest.mark.parametrize("version", ["0.16.1", "0.19.2"] if FULL else ["0.19.2"])
def test_megatron_in_a_git_repository_is_a_tested_release(tmp_path, version):
    commit = repository(tmp_path)
    other = f"0.18.0+{commit}"
    shutil.copytree(release(version) / "megatron", tmp_path / "megatron", ignore=shutil.ignore_patterns("__pycache__"))
    found = registered(tmp_path, [tmp_path], "megatron", "megatron.core.package_info", "", other)
    # 0.16.1 does not append the commit yet.
    assert found["version"] == (version if version == "0.16.1" else f"{version}+{commit}")
    assert len(found["told"]) == 1
    assert f"not tested with Megatron-Core {other} (tested: 0.16.1, 0.19.2)" in found["told"][0]


def test_deepspeed_built_from_source_is_a_tested_release(tmp_path):
    found = registered(tmp_path, [], "deepspeed", "deepspeed", "0.19.8+abc", "0.19.9+abc")
    assert found["version"] == "0.19.8+abc"
    assert len(found["told"]) == 1
    assert "not tested with DeepSpeed 0.19.9+abc (tested: 0.18.9, 0.19.8)" in found["told"][0]


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.19.2", "0.19.2"), ("0.19.2+4e11d24", "0.19.2"), ("0.19.2rc1+4e11d24", "0.19.2rc1"), ("0.19.20", "0.19.20")],
)
def test_the_release_is_what_stands_before_the_plus(version, expected):
    assert release_of(version) == expected
