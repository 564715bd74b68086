"""A rank that dies, hangs or runs other code than the rest is named and its job ends; a healthy job is left alone."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from muon_plugin import Muon
from muon_plugin.watchdog.heartbeats import Heartbeats
from muon_plugin.watchdog.verdict import CUT_OFF, FAILED, FINISHED, GONE, Standing, cause_of, judge
from tests.support import SUPPORT
from tests.support.combinations import FULL
from tests.support.forks import INSTALLED, Engine
from tests.support.jobs import Job, environment, free_port
from tests.support.ranks import RankError, release

SCRIPT = str(SUPPORT / "watched.py")
SECONDS = 5.0
#: Where a broken connection is to end the job: a slow machine must not reach the limit before it, and a rank that
#: ends keeps the store for 3 heartbeats, 6 s, in which the others must read why.
PATIENT = {"MUON_WATCHDOG": "90"}
ENDED_BY_WATCHDOG = 75


def watched(folder: Path, world: int, *arguments: str, engine: Engine = INSTALLED, **shared: str) -> Job:
    limits = {"MUON_WATCHDOG": f"{SECONDS:g}", "TORCH_FR_DUMP_TEMP_FILE": str(folder / "trace")}
    return Job(folder, world, [SCRIPT, *arguments], engine=engine, **(limits | shared))


def said(job: Job, rank: int) -> list[str]:
    """What the watchdog printed there."""
    lines = job.log(rank).splitlines()
    return [line.removeprefix("muon_plugin watchdog: ") for line in lines if line.startswith("muon_plugin watchdog")]


def test_a_rank_that_sleeps_while_the_others_exchange_is_named_with_its_stack(tmp_path):
    job = watched(tmp_path, 3, "alone", "sleeps", "1", "outside")
    job.ends()
    assert job.codes == [ENDED_BY_WATCHDOG] * 3, job.all_logs()
    for rank in range(3):
        text = said(job, rank)[0]
        assert text.startswith(
            'rank 1 of 3 (node0) held up the others before step 3, phase "forward and backward", '
        ), text
        assert "in happens, for" in text
        assert re.search(r'rank 2 \(node1\) waits in step 3, phase "exchange with rank \d", .* for \d+ s', text), text
    assert "time.sleep(100)" in job.log(1)  # the stack of the one to blame
    assert (tmp_path / "trace2").stat().st_size > 0  # torch's flight recorder


def test_only_the_ranks_that_train_a_model_together_are_compared_and_ended(tmp_path):
    """The other half of the world trains another model, is steps behind and longer in one phase, and goes on."""
    job = watched(tmp_path, 4, "halves", "sleeps", "3", "outside", GO=str(tmp_path / "go"))
    for rank in (2, 3):
        job.processes[rank].wait(timeout=120)
    (tmp_path / "go").touch()
    job.ends()
    assert job.codes == [0, 0, ENDED_BY_WATCHDOG, ENDED_BY_WATCHDOG], job.all_logs()
    assert said(job, 0) == said(job, 1) == []
    for rank in (2, 3):
        text = said(job, rank)[0]
        assert text.startswith('rank 3 of 4 (node1) held up the others before step 3, phase "forward'), text
        assert "rank 0" not in text
        assert "rank 1 " not in text


def test_a_rank_killed_within_a_step_is_named_by_those_whose_connection_breaks(tmp_path):
    job = watched(tmp_path, 3, "alone", "killed", "1", "exchange", **PATIENT)
    job.ends()
    assert job.codes == [1, -signal.SIGKILL, 1], job.all_logs()
    for rank in (0, 2):
        assert said(job, rank)[0].startswith(
            f"why rank {rank} failed: rank 1 of 3 (node0) died: its process no longer exists; its last heartbeat"
        ), job.all_logs()


def test_a_rank_that_raises_is_named_with_its_error(tmp_path):
    job = watched(tmp_path, 2, "alone", "raises", "1", "outside", **PATIENT)
    job.ends()
    assert job.codes == [1, 1], job.all_logs()
    assert said(job, 0)[0].startswith(
        'why rank 0 failed: rank 1 of 2 (node0) failed first, before step 3, phase "forward and backward": '
        "ValueError: no more data on this rank"
    ), job.all_logs()
    assert said(job, 1) == []  # its traceback says it


@pytest.mark.parametrize("others", ["stay", "leave"])
def test_a_rank_that_runs_one_step_more_is_told_that_the_others_do_not(tmp_path, others):
    job = watched(
        tmp_path, 2, "alone", "one step more", "1", f"the others {others}", **(PATIENT if others == "leave" else {})
    )
    job.ends()
    text = said(job, 1)[0]
    if others == "stay":
        assert job.codes == [ENDED_BY_WATCHDOG] * 2, job.all_logs()
        assert text.startswith('rank 0 of 2 (node0) held up the others before step 7, phase "forward and'), text
        assert 'rank 1 (node0) waits in step 7, phase "exchange with rank 0"' in text
    else:
        assert job.codes == [0, 1], job.all_logs()
        assert text.startswith("why rank 1 failed: rank 0 of 2 (node0) finished training after step 6"), text


def test_a_frozen_host_of_the_store_is_named(tmp_path):
    job = watched(tmp_path, 2, "alone", "frozen", "0", "outside")
    job.ends(1)
    assert job.codes[1] == ENDED_BY_WATCHDOG, job.all_logs()
    assert re.match(
        r"no response for \d+ s from the store at 127.0.0.1:\d+, hosted by rank 0 \(node0\); ", said(job, 1)[0]
    )
    assert 'rank 1 (node0) hangs in step 3, phase "exchange with rank 0"' in said(job, 1)[0]


def test_long_pauses_of_all_ranks_and_a_late_end_are_no_alarm(tmp_path):
    """And the store of the process group is a file here, so that rank 0 opens one for the watchdog and leaves first."""
    store = str(tmp_path / "store")
    job = watched(tmp_path, 2, "alone", "all pause", "1", "outside", FILE_STORE=store, PAUSE=f"{2.5 * SECONDS:g}")
    job.ends()
    assert job.codes == [0, 0], job.all_logs()
    assert said(job, 0) == said(job, 1) == []
    assert all("done" in job.log(rank) for rank in (0, 1))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def variables(pid: int) -> list[str]:
    """Its environment; nothing of a process that has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return []


@pytest.mark.parametrize("dead", [0, 1] if FULL else [0])
def test_under_torchrun_a_rank_killed_on_one_node_ends_the_other_node_in_time(tmp_path, dead):
    """The other node stands without an error, as with NCCL; the store goes with node 0's launcher."""
    port = str(free_port())
    nodes = []
    for node in (0, 1):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        command += ["--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", port]
        command += [SCRIPT, "alone", "killed", str(dead), "outside"]
        own = environment(
            MUON_WATCHDOG=f"{SECONDS:g}", SLURMD_NODENAME=f"node{node}", TORCH_FR_DUMP_TEMP_FILE=str(tmp_path / "trace")
        )
        with open(tmp_path / f"node{node}", "w") as log:
            nodes.append(subprocess.Popen(command, env=own, stdout=log, stderr=log))
    other = 1 - dead
    started = time.monotonic()  # how long two launchers take to start is the machine's matter
    while "dies now" not in (tmp_path / f"node{dead}").read_text():
        assert time.monotonic() - started < 180, (tmp_path / f"node{dead}").read_text()
        time.sleep(0.1)
    died = time.monotonic()
    while any(f"RANK={other}" in variables(pid) for pid in children(nodes[other].pid)):
        time.sleep(0.1)  # not for its launcher, whose own end takes as long as the machine lets it
        assert time.monotonic() - died < 3 * SECONDS + 10
    nodes[dead].wait(timeout=180)
    code = nodes[other].wait(timeout=180)
    log = (tmp_path / f"node{other}").read_text()
    assert code != 0
    told = re.search(
        rf"muon_plugin watchdog: .*rank {dead} of 2 \(node{dead}\) died: its process no longer exists; "
        r"its last heartbeat came (\d+) s ago",
        log,
    )
    assert told, log
    assert int(told[1]) <= 3 * SECONDS, log
    assert "before step 3" in log
    assert f"exitcode  : {ENDED_BY_WATCHDOG}" in log  # as torchrun reports it


def test_under_zero_1_a_killed_rank_is_named(tmp_path):
    job = watched(tmp_path, 2, "deepspeed", "killed", "1", "exchange", **PATIENT)
    job.ends()
    assert job.codes == [1, -signal.SIGKILL], job.all_logs()
    assert said(job, 0)[0].startswith("why rank 0 failed: rank 1 of 2 (node0) died: "), job.all_logs()


def test_under_zero_1_a_rank_outside_the_others_collective_is_named_after_the_longer_limit(tmp_path):
    """DeepSpeed's gradient norm comes before Muon: all are outside, where an evaluation could be as long."""
    job = watched(tmp_path, 2, "deepspeed", "sleeps", "1", "outside", MUON_WATCHDOG="4,12")
    job.ends()
    assert job.codes == [ENDED_BY_WATCHDOG] * 2, job.all_logs()
    text = said(job, 0)[0]
    assert text.startswith('rank 1 of 2 (node0) held up the others before step 3, phase "forward and backward", '), text
    assert int(re.search(r"for (\d+) s", text)[1]) >= 12, text


def test_under_megatron_a_killed_rank_is_named(tmp_path):
    engine = Engine(megatron=str(release("0.19.2")))
    job = watched(tmp_path, 2, "megatron", "killed", "1", "exchange", engine=engine, **PATIENT)
    job.ends()
    assert job.codes == [1, -signal.SIGKILL], job.all_logs()
    assert said(job, 0)[0].startswith("why rank 0 failed: rank 1 of 2 (node0) died: "), job.all_logs()


def at(rank: int, step: int, outside: bool, seconds: float, **more: object) -> Standing:
    phase = "forward and backward" if outside else "exchange"
    return replace(Standing(rank, f"node{rank // 2}", step, phase, outside, seconds), **more)


@pytest.mark.parametrize(
    ("me", "others"),
    [
        (at(0, 5, True, 700), [at(1, 5, True, 700), at(2, 5, True, 700)]),  # all evaluate
        (at(0, 5, True, 700), [at(1, 5, True, 700, silent=650)]),  # Python stands still there, in one long call of C
        (at(0, 5, False, 59), [at(1, 4, True, 500)]),  # not yet
        (at(0, 5, False, 700), [at(1, 4, True, 5)]),  # slow, but it comes
        (at(0, 5, False, 700), [at(1, 5, False, 5)]),  # a long round, but it moves
        (at(0, 5, True, 9000), [at(1, 5, True, 0, life=FINISHED)]),  # saves what it has, at the end
        (at(0, 6, True, 9000), [at(1, 5, True, 0, life=FINISHED)]),
        (at(0, 50, True, 700), [at(1, 0, True, 900)]),  # a rank without a matrix counts no steps
        (at(0, 5, True, 3700), [at(1, 5, True, 10)]),  # it has just got there
    ],
)
def test_no_reason_to_end_the_job(me, others):
    assert judge(me, others, 4, 60, 3600) is None


@pytest.mark.parametrize(
    ("me", "others", "blamed"),
    [
        (at(0, 5, False, 61), [at(1, 4, True, 70), at(2, 5, False, 61)], (1,)),
        (at(0, 5, True, 61), [at(1, 5, False, 70)], (1,)),  # a GPU's queue lets the host run ahead
        (at(0, 5, False, 70), [at(1, 5, True, 61)], (0,)),
        (at(0, 5, False, 70), [at(1, 4, True, 0, life=FINISHED)], (1,)),
        (at(0, 5, True, 61), [at(1, 5, True, 61, life=GONE), at(2, 5, True, 1)], (1,)),
        (at(0, 5, True, 61), [at(1, 4, False, 61, life=CUT_OFF)], (1,)),
        (at(0, 5, True, 61), [at(1, 5, True, 9, life=FAILED, order=2), at(2, 5, True, 9, life=FAILED, order=1)], (2,)),
        (at(0, 5, False, 61), [at(1, 5, False, 61)], ()),  # the network
        (at(0, 5, True, 3601), [at(1, 5, True, 3601)], ()),
        (at(0, 5, True, 3601, waits=True), [at(1, 5, True, 3601), at(2, 5, True, 3601, waits=True)], (1,)),
    ],
)
def test_a_reason_to_end_the_job_and_who_is_to_blame(me, others, blamed):
    verdict = judge(me, others, 4, 60, 3600)
    assert verdict is not None
    assert verdict.blamed == blamed
    assert all(f"rank {rank} of 4 (node{rank // 2}) " in verdict.text for rank in blamed), verdict.text


class Late:
    """A store in which a key comes after some looks; and an event that notes how long it was waited for."""

    def __init__(self, looks: int) -> None:
        self.looks, self.pauses = looks, []

    def check(self, keys: list[str]) -> bool:
        return len(self.pauses) == self.looks

    def wait(self, seconds: float) -> bool:
        self.pauses.append(seconds)
        return False


def test_the_first_heartbeat_does_not_wait_a_whole_beat():
    """A rank that died before it was the only one that nobody could name."""
    late, hearts = Late(7), Heartbeats.__new__(Heartbeats)
    hearts.beat = 2.0
    assert hearts._comes(late, "ready", late)
    assert late.pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0]


def test_one_error_on_all_ranks_is_nobodys_fault():
    mine, other = at(0, 5, True, 0, life=FAILED, order=2, error="E: a"), at(1, 5, True, 0, life=FAILED, order=1)
    assert cause_of(mine, [replace(other, error="E: a")], 2) is None
    assert cause_of(mine, [replace(other, error="E: b")], 2).text.startswith("rank 1 of 2 (node0) failed first, ")


@pytest.mark.parametrize("value", ["0", "-1", "soon", "60,30", "1,2,3", "nan", "inf", "60,"])
def test_a_limit_that_is_none_is_refused_on_every_rank(ranks, value):
    with pytest.raises(RankError) as caught:
        ranks(2).run(built, (value, value))
    assert {error[0] for error in caught.value.errors} == {"ValueError"}
    assert all(f"MUON_WATCHDOG={value!r}; allowed: seconds" in error[1] for error in caught.value.errors)


def test_limits_that_differ_are_refused_on_every_rank(ranks):
    with pytest.raises(RankError) as caught:
        ranks(2).run(built, ("60", ""))
    assert all("the ranks disagree about MUON_WATCHDOG: rank 0 has '60', rank 1 has ''" in error[1]
               for error in caught.value.errors)  # fmt: skip


def built(rank: int, values: tuple[str, ...]) -> None:
    os.environ["MUON_WATCHDOG"] = values[rank]
    try:
        Muon(torch.nn.Linear(4, 4).named_parameters(), process_group=None)
    finally:
        del os.environ["MUON_WATCHDOG"]
