"""The oldest torch that is promised, and the newest that was at hand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from tests.support import ROOT
from tests.support.combinations import FULL
from tests.support.jobs import environment
from tests.support.ranks import release
from tests.support.torch_releases import needs_muon

OLDEST, NEWEST = "2.6.0", "2.14.1"
#: What a run of pytest tells the processes that it starts.
OF_THIS_RUN = re.compile(r"FULL|PYTEST_.*|TORCH_EXTENSIONS_DIR")


def loaded(rank: int) -> str:
    return torch.__version__


@pytest.mark.fast
@pytest.mark.parametrize("megatron", [None, "0.19.2"])
def test_ranks_have_the_torch_of_the_tests(ranks, megatron):
    assert ranks(1, megatron).run(loaded) == [torch.__version__]


def test_the_oldest_is_the_one_that_is_promised():
    assert f'"torch>={OLDEST.removesuffix(".0")}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.skipif(not FULL, reason="FULL=1")
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_the_core_and_one_path_through_each_engine(version, tmp_path):
    """The tests of `make test-fast`, in a pytest that finds this torch before the environment's."""
    variables = environment(release(version, "torch-releases"))
    variables = {name: value for name, value in variables.items() if not OF_THIS_RUN.fullmatch(name)}
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-m", "fast", "-p", "no:cacheprovider", f"--junitxml={report}", "tests"]
    log = tmp_path / "log"
    with log.open("w") as out:
        ran = subprocess.run(command, cwd=ROOT, env=variables, stdout=out, stderr=out, timeout=1500, check=False)
    assert ran.returncode == 0, log.read_text()[-5000:]
    check(report, version)


def check(report: Path, version: str) -> None:
    """That these tests ran with this torch, and that none was skipped but for want of `torch.optim.Muon`."""
    suite = ElementTree.parse(report).getroot()[0]
    assert [p.get("value") for p in suite.iter("property") if p.get("name") == "torch"] == [version]
    reasons = {skipped.get("message") for skipped in suite.iter("skipped")}
    expected = {needs_muon.kwargs["reason"]} if tuple(map(int, version.split(".")[:2])) < (2, 9) else set()
    assert reasons == expected
    ran = {case.get("classname").split(".")[1] for case in suite.iter("testcase") if case.find("skipped") is None}
    assert ran >= {"core", "deepspeed", "megatron"}
