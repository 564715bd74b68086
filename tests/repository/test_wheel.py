"""What is published: the wheel's metadata, its extras, and its commands in an environment of its own."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from email.message import Message
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import muon_plugin
from tests.support import ROOT
from tests.support.combinations import FULL

COMMANDS = ("muon_plugin", "muon_plugin.planner", "muon_plugin.preflight", "muon_plugin.metrics")
#: What a user has anyway who plans or measures a model of an engine, and what the package itself requires.
GIVEN = {"torch", "deepspeed", "megatron"}


def python(*arguments: str, at: Path, executable: Path | str = sys.executable) -> str:
    """What `python ARGUMENTS` prints, without the paths that the tests' own processes get."""
    command = [str(executable), *arguments]
    ran = subprocess.run(command, cwd=at, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, (command, ran.stdout + ran.stderr)
    return ran.stdout


def wheel(folder: Path) -> Path:
    """Built from a copy, since a build writes beside its sources."""
    source = folder / "source"
    shutil.copytree(ROOT / "muon_plugin", source / "muon_plugin", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    quiet = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-index")
    python("-m", "pip", "wheel", *quiet, "--no-build-isolation", "--wheel-dir", str(folder), ".", at=source)
    return next(folder.glob("*.whl"))


def metadata_of(path: Path) -> Message:
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_string(archive.read(name).decode())


def test_the_metadata_say_what_a_package_index_shows(tmp_path):
    path = wheel(tmp_path)
    found = metadata_of(path)
    assert found["Name"] == "muon_plugin"
    assert found["Version"] == muon_plugin.__version__
    assert found["License-Expression"] == "Apache-2.0"
    urls = dict(entry.split(", ", 1) for entry in found.get_all("Project-URL"))
    assert set(urls) == {"Repository", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith(urls["Repository"]) for url in urls.values())
    assert found["Description-Content-Type"] == "text/markdown"
    description = found.get_payload()
    readme = (ROOT / "README.md").read_text()
    targets = re.findall(r"\]\(([^)]+)\)", description)
    assert len(targets) == len(re.findall(r"\]\(([^)]+)\)", readme))
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    assert f"{urls['Repository']}/blob/v{muon_plugin.__version__}/CHANGELOG.md" in targets
    with zipfile.ZipFile(path) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "muon_plugin").rglob("*.py")}
    assert packed == sources | {"muon_plugin/py.typed", "muon_plugin/pictures.mplstyle"}


@pytest.mark.skipif(not FULL, reason="FULL=1")
def test_the_wheel_works_where_only_what_it_requires_is_installed(tmp_path):
    environment = tmp_path / "environment"
    python("-m", "venv", "--without-pip", str(environment), at=tmp_path)
    own = environment / "bin" / "python"
    packages = next(environment.glob("lib/python*/site-packages"))
    path = wheel(tmp_path)
    quiet = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-index")
    python("-m", "pip", "--python", str(own), "install", *quiet, str(path), at=tmp_path)
    needed = {Requirement(text).name for text in metadata_of(path).get_all("Requires-Dist") if "extra ==" not in text}
    assert needed == {"torch"}
    for name in closure({*needed, "numpy"}):
        for file in tops(name):
            (packages / file.name).symlink_to(file)
    told = python(
        "-c", "import muon_plugin; print(muon_plugin.__file__, muon_plugin.Muon)", at=tmp_path, executable=own
    )
    assert told.startswith(str(packages))
    for command in COMMANDS:
        assert f"python -m {command} " in python("-m", command, "--help", at=tmp_path, executable=own)


def closure(names: set[str]) -> set[str]:
    """The distributions of this environment that `names` require, with these."""
    found: set[str] = set()
    while names:
        found |= names
        wanted = [Requirement(text) for name in names for text in metadata.requires(name) or ()]
        names = {r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})} - found
    return found


def tops(name: str) -> set[Path]:
    """The files and folders of a distribution directly in site-packages."""
    distribution = metadata.distribution(name)
    first = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
    return {Path(str(distribution.locate_file(part))) for part in first}


@pytest.mark.parametrize("package", ["planner", "metrics"])
def test_the_extra_of_a_command_is_all_that_it_imports(package):
    declared = re.search(rf"^{package} = \[(.+)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    extra = {Requirement(text).name for text in ast.literal_eval(f"[{declared}]")}
    imported = {top for path in (ROOT / "muon_plugin" / package).glob("*.py") for top in imports(path)}
    assert imported - set(sys.stdlib_module_names) - GIVEN == extra


def imports(path: Path) -> set[str]:
    """The first parts of the modules that a file imports by their whole names."""
    tree = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in tree if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in names}
