"""What would stop a job of many nodes is found before it, named with rank and node, and nothing waits for ever."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from muon_plugin.preflight import links
from muon_plugin.preflight.facts import source
from tests.support import ROOT
from tests.support.combinations import some
from tests.support.jobs import TIMEOUT, Job, environment, free_port
from tests.support.ranks import release

PREFLIGHT = ["-m", "muon_plugin.preflight"]


def problems(job: Job, rank: int = 0) -> list[str]:
    found = job.log(rank).splitlines()
    return [line.partition("problem: ")[2] for line in found if line.startswith("preflight: problem: ")]


def test_all_is_well_on_two_ranks_with_tp_2(tmp_path):
    job = Job(tmp_path, 2, [*PREFLIGHT, "--tp", "2", "--checkpoints", str(tmp_path / "checkpoints")])
    job.ends()
    assert job.codes == [0, 0], job.all_logs()
    assert job.log(1) == ""
    log = job.log(0)
    assert re.search(
        r"^1: node0 +0-1 .* 0\.1\.0 \(" + source()[0] + rf"\) .* {re.escape(torch.__version__)} ", log, re.M
    )
    assert re.search(r"^TP +1 x 2 +(\d+\.\d\d \([01]\) +){4}", log, re.M), log
    assert re.search(r"2 ranks, 1 node, \d+ s: all is well", log), log
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert f"{tmp_path / 'checkpoints'} was not there, and has been made" in log


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({2: {"MUON_WATCHDOG": "100"}}, "MUON_WATCHDOG"),
        ({rank: {"MUON_WATCHDOG": "soon"} for rank in range(4)}, "MUON_WATCHDOG='soon'; allowed: seconds"),
    ],
    ids=["differs", "bad"],
)
def test_a_watchdog_that_would_stop_the_start_is_found_before(tmp_path, own, told):
    job = Job(tmp_path, 4, PREFLIGHT, own=own)
    job.ends()
    assert set(job.codes) == {1}, job.all_logs()
    assert any(told in problem for problem in problems(job)), job.log(0)


def test_the_plan_must_be_of_this_job(tmp_path):
    shapes = tmp_path / "shapes.json"
    shapes.write_text('{"layers.*.up.weight": {"shape": [64, 32], "count": 2}}')
    for size, code in (("2", 1), ("1", 0)):
        job = Job(tmp_path, 2, [*PREFLIGHT, "--", "--shapes", str(shapes), f"--nodes={size}"])
        job.ends()
        assert job.codes == [code, code], job.all_logs()
        assert any("this job has 1 node of 2 ranks" in problem for problem in problems(job)) is (code == 1)
        assert ("2 ranks = 1 node x 2 GPUs" in job.log(0)) is (code == 0)


ANOTHER = "the plan has TP 2, PP 1, and preflight checks the groups of --tp 1 --pp 1; allowed: one layout"
PLANNED = "2 ranks = 1 node x 2 GPUs: TP 2, DP 1"
MEGATRON = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32"
MEGATRON += " --micro-batch-size 1 --optimizer muon --use-distributed-optimizer --muon-paper --lr 1e-3"
MEGATRON += " --vocab-size 128 --tokenizer-type NullTokenizer"


@pytest.mark.parametrize(
    ("own", "planned", "told"),
    some(
        [
            ([], ["--shapes", "FILE", "--tp", "2"], ANOTHER),
            ([], ["--", *MEGATRON.split(), "--tensor-model-parallel-size", "2"], ANOTHER),
            (["--tp", "2"], ["--hf", "FILE"], "--tp 2 --pp 1 --ep 1 with --hf; allowed: 1, since a Hugging Face model"),
            (["--tp", "2"], ["--", *MEGATRON.split(), "--tensor-model-parallel-size", "2"], PLANNED),
            (["--tp", "2"], ["--shapes", "FILE"], PLANNED),
        ],
        1,
    ),
)
def test_the_plan_is_of_the_layout_whose_groups_are_checked(tmp_path, own, planned, told):
    file = tmp_path / "file.json"
    file.write_text('{"layers.*.up.weight": {"shape": [64, 32], "count": 2, "tp": 0}}')
    arguments = [*PREFLIGHT, *own, "--", *(word.replace("FILE", str(file)) for word in planned)]
    apart = {rank: {"PYTHONPATH": environment(release("0.19.2"))["PYTHONPATH"]} for rank in (0, 1)}
    job = Job(tmp_path, 2, arguments, own=apart if "--" in planned else None)
    job.ends()
    good = told == PLANNED
    assert job.codes == [int(not good)] * 2, job.all_logs()
    assert told in (job.log(0) if good else " ".join(problems(job))), job.all_logs()


def test_an_argument_of_the_plan_without_its_number_is_a_problem(tmp_path):
    job = Job(tmp_path, 2, [*PREFLIGHT, "--", "--shapes", "shapes.json", "--nodes"])
    job.ends()
    assert job.codes == [1, 1], job.all_logs()
    assert any("argument --nodes: expected one argument" in problem for problem in problems(job)), job.log(0)


def test_all_is_well_under_torchrun_on_four_ranks_with_tp_2(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "4",
        "--master-port",
        str(free_port()),
    ]
    command += [*PREFLIGHT, "--tp", "2", "--checkpoints", str(tmp_path)]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT)
    assert run.returncode == 0, run.stdout + run.stderr
    for label, groups in (("TP", "2 x 2"), ("DP", "2 x 2"), ("DP x TP", "1 x 4")):
        assert re.search(rf"^{label} +{groups} +\d", run.stdout, re.M), run.stdout


def test_under_torchrun_rank_0_speaks_before_the_launcher_ends_all(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    run = subprocess.run(
        [*command, *PREFLIGHT, "--timeout", "0.01"], env=environment(), capture_output=True, text=True, timeout=TIMEOUT
    )
    assert run.returncode == 1
    assert "): no end within 0 s: versions and GPUs" in run.stdout, run.stdout + run.stderr
    assert "1 problem: the job must not start" in run.stdout


def test_another_source_of_the_plugin_on_one_rank_stops_the_job(tmp_path):
    copy = tmp_path / "other" / "muon_plugin"
    shutil.copytree(ROOT / "muon_plugin", copy, ignore=shutil.ignore_patterns("__pycache__"))
    with open(copy / "plan.py", "a") as file:
        file.write("# a line more\n")
    other = {2: {"PYTHONPATH": os.pathsep.join([str(tmp_path / "other"), environment()["PYTHONPATH"]])}}
    job = Job(tmp_path, 3, PREFLIGHT, own=other, at=dict.fromkeys(range(3), tmp_path))
    job.ends()
    assert job.codes == [1, 1, 1], job.all_logs()
    digest, folder = source()
    (problem,) = problems(job)
    assert problem.startswith(f"muon_plugin differs: 0.1.0 ({digest}) in {folder} on ranks 0-1 (node0); 0.1.0 ("), (
        problem
    )
    assert f" in {copy} on rank 2 (node1). Install the same on every node" in problem
    assert "1 problem: the job must not start" in job.log(0)


def test_a_folder_that_nodes_do_not_share_and_one_too_small_stop_the_job(tmp_path):
    """A relative folder, and nodes that run in different places: what is not mounted looks so."""
    nodes = {rank: tmp_path / f"node{rank}" for rank in range(3)}
    for node in nodes.values():
        node.mkdir()
    (nodes[1] / "checkpoints").mkdir()
    options = ["--checkpoints", "checkpoints", "--checkpoint-bytes", "9000T"]
    job = Job(tmp_path, 3, [*PREFLIGHT, *options], at=nodes, own={r: {"SLURMD_NODENAME": f"node{r}"} for r in nodes})
    job.ends()
    assert job.codes == [1, 1, 1], job.all_logs()
    unshared, absent, small = problems(job)
    unseen = f"rank 1 (node1): RuntimeError: {nodes[1]}/checkpoints does not have the file that rank 0 wrote into it: "
    assert unshared.startswith(unseen), unshared
    assert absent.startswith(f"rank 2 (node2): RuntimeError: {nodes[2]}/checkpoints is not there: mount the "), absent
    assert re.match(r"checkpoints has [\d.]+ .?B free on node0, a checkpoint needs 9.00 PB: make room, ", small), small


def test_ranks_that_do_not_come_are_named_and_one_that_cannot_reach_the_master_says_so(tmp_path):
    port = str(free_port())
    options = ["--rendezvous", "3", "--ranks-per-node", "2"]
    job = Job(tmp_path, 4, [*PREFLIGHT, *options], own={1: {"MASTER_PORT": port}}, ranks=[0, 1])
    job.ends()
    assert job.codes == [1, 1], job.all_logs()
    (missing,), (unreachable,) = problems(job), problems(job, 1)
    assert missing.startswith(
        "rank 1 (node 0 of 2, node0), ranks 2-3 (node 1 of 2) did not come within 3 s: see whether the launcher runs"
    ), missing
    assert unreachable.startswith(f"rank 1 (node0) cannot reach the master at 127.0.0.1:{port} within 3 s: "), (
        unreachable
    )


@pytest.mark.parametrize("what", some([signal.SIGSTOP, signal.SIGKILL], 1))
def test_a_rank_that_stops_answering_is_named(tmp_path, what):
    job = Job(tmp_path, 3, [*PREFLIGHT, "--timeout", "10"])
    until = time.monotonic() + TIMEOUT
    while "all 3 ranks are here" not in job.log(0) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(job.processes[2].pid, what)
    job.ends(0, 1)
    assert job.codes[:2] == [1, 1], job.all_logs()
    assert re.match(r"rank 2 \(node1\) did not answer within 10 s \(.*\): the process died or stands", problems(job)[0])


def test_a_check_that_stops_leaves_no_file(tmp_path):
    """Rank 2 is stopped while it waits for a folder that its node does not have, and rank 0 has written its file."""
    nodes = {rank: tmp_path / f"node{rank // 2}" for rank in range(3)}
    for node in set(nodes.values()):
        node.mkdir()
    shared = nodes[0] / "checkpoints"
    job = Job(tmp_path, 3, [*PREFLIGHT, "--timeout", "12", "--checkpoints", "checkpoints"], at=nodes)
    until = time.monotonic() + TIMEOUT
    while not list(shared.glob(".muon_plugin_preflight_*")) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(job.processes[2].pid, signal.SIGSTOP)
    job.ends(0, 1)
    assert job.codes[:2] == [1, 1], job.all_logs()
    # in the check in which it happened to be
    found = re.match(
        r"rank 2 \(node1\) did not answer within 12 s \(the (shared|checkpoints') folder\)", problems(job)[0]
    )
    assert found, job.log(0)
    assert list(shared.iterdir()) == []


def lied_to(rank: int, kind: str) -> bool:
    """Rank 1 sends as if it were rank 2; what rank 0 says of the numbers."""
    ranks, me = ([0, 1], 0) if rank == 0 else ([0, 2], 2)
    return links.exercise(kind, None, ranks, me, torch.device("cpu"))[0]


@pytest.mark.parametrize("kind", ["all_reduce", "reduce_scatter", "all_gather", "all_gather_object"])
def test_wrong_numbers_are_found(ranks, kind):
    assert ranks(2).run(lied_to, kind)[0] is False


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (2, 2), (8, 1), (1, 1)])
def test_every_rank_is_in_one_group_of_each_kind(tp, pp):
    groups = links.groups_of(8, tp, pp)
    assert all(sorted(rank for ranks in of_kind for rank in ranks) == list(range(8)) for of_kind in groups.values())
    assert "TP" not in groups or {len(ranks) for ranks in groups["TP"]} == {tp}
    assert max(len(ranks) for of_kind in groups.values() for ranks in of_kind) == 8


@pytest.mark.parametrize(
    ("arguments", "text"),
    some(
        [
            (["--tp", "3"], "--tp 3 x --pp 1 does not divide the 4 ranks of this job"),
            (["--tp", "0"], "'0' is not valid; allowed: a whole number from 1 on"),
            (["--checkpoint-bytes", "much"], "'much' is not valid; allowed: bytes, or with K, M, G, T"),
            (["--checkpoint", "x"], "unrecognized arguments: --checkpoint x"),
        ],
        2,
    ),
)
def test_arguments_that_cannot_be(arguments, text):
    where = environment(RANK="1", WORLD_SIZE="4")
    run = subprocess.run(
        [sys.executable, *PREFLIGHT, *arguments], env=where, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert run.returncode == 2
    assert text in run.stderr, run.stderr
