"""The forge's files: workflows call targets that the Makefile has, and every file means the same repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import muon_plugin
from tests.support import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
CALL = re.compile(r"\bmake ([\w ./-]+)")


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def targets_called(workflow: dict[str, Any]) -> set[str]:
    scripts = [step["run"] for step in steps(workflow) if "run" in step]
    return {target for script in scripts for call in CALL.findall(script) for target in call.split()}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_targets_that_exist(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["name"]
    assert workflow["permissions"] == {"contents": "read"}  # what a job needs beyond, it says itself
    assert targets_called(workflow)
    assert targets_called(workflow) <= TARGETS
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"]
        needed = job.get("needs", [])
        assert set([needed] if isinstance(needed, str) else needed) <= set(workflow["jobs"])
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step)
        assert "@" in step.get("uses", "@")  # a version of every action


def test_every_change_is_linted_tested_and_built():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert "pull_request" in workflow[True]  # YAML 1.1 reads the key `on` as a truth value
    assert targets_called(workflow) >= {"lint", "test", "wheel", "docs"}


def test_only_the_job_that_publishes_gets_an_identity_and_no_job_a_stored_token():
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]
    assert set(jobs["publish"]["needs"]) == {"test", "build"}
    assert all("run" not in step for step in jobs["publish"]["steps"])  # nothing of the repository runs with it
    assert "secrets." not in text


@pytest.mark.parametrize("path", [p for p in FORMS if p.name != "config.yml"], ids=lambda path: path.stem)
def test_issue_forms_have_what_the_forge_requires(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"]
    assert form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert fields
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)


def urls(path: Path) -> set[str]:
    """The repositories of this project's name that a file names."""
    return set(re.findall(r"https://(?!pypi)[\w.]+/[\w.-]+/muon_plugin(?![\w-])", path.read_text()))


def test_every_file_names_the_same_repository():
    pyproject = ROOT / "pyproject.toml"
    (repository,) = urls(pyproject)
    files = [*ROOT.glob("*.md"), *ROOT.glob("*.cff"), *ROOT.glob("docs/*.md"), *FORMS, *WORKFLOWS]
    found = {path.name: urls(path) for path in files if urls(path)}
    assert {"CITATION.cff", "SECURITY.md", "config.yml"} <= set(found)
    assert all(names == {repository} for names in found.values()), found


def test_the_citation_is_of_this_version_and_license():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == muon_plugin.__version__
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text()
    (paper,) = citation["references"]
    assert paper["url"] in (ROOT / "README.md").read_text()
