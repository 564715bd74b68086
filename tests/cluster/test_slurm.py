"""Jobs on a real Slurm of two nodes: they start, survive and resume, and end in the bits of the undisturbed run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
import torch

from tests.support import ROOT, SUPPORT, slurm_cluster
from tests.support.combinations import FULL
from tests.support.jobs import environment
from tests.support.ranks import release

STEPS = 8
TIMEOUT = 900  # seconds; a job that hangs must end a test, not the suite
TRAINING = ["--steps", str(STEPS), "--eval-every", "100", *([] if FULL else ["--hidden", "64"])]
FITS = ["--nodes=2", "--gpus-per-node=1", "--time=30"]


def status(pid: int, field: str) -> str:
    return re.findall(rf"^{field}:\s*(\S+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[0]


@dataclass(frozen=True)
class Submitted:
    """A submitted job: what the tests ask of Slurm and of its output."""

    number: str
    out: Path
    environment: dict[str, str]

    def slurm(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60).stdout

    def field(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\S+)", self.slurm("scontrol", "show", "job", self.number))
        return found[1] if found else ""

    @property
    def restarts(self) -> int:
        return int(self.field("Restarts"))

    @property
    def printed(self) -> str:
        return self.out.read_text() if self.out.exists() else ""

    def logs(self, name: str = "train") -> str:
        return "".join(file.read_text() for file in sorted(self.out.parent.glob(f"**/logs/*/*/{name}-*.log")))

    def until(self, what: str, true: Callable[[], object]) -> None:
        """Waits for `true`; fails with the job's output if that does not come."""
        end = time.monotonic() + TIMEOUT
        for tried in count():
            if true():
                return
            # Slurm is asked less often than `true`: each question is a process of its own.
            ended = tried % 10 == 9 and self.field("JobState") in ("FAILED", "CANCELLED")
            if ended or time.monotonic() > end:
                pytest.fail(f"waited for {what}\n{self.slurm('squeue')}\n{self.printed}\n{self.logs()[-4000:]}")
            time.sleep(0.1)

    def ended(self, state: str = "COMPLETED") -> Submitted:
        end = time.monotonic() + TIMEOUT
        while self.field("JobState") in ("PENDING", "RUNNING", "COMPLETING") and time.monotonic() < end:
            time.sleep(0.5)
        told = f"{self.slurm('squeue')}\n{self.printed}\n{self.logs()[-4000:]}"
        assert self.field("JobState") == state, told
        return self

    def reaches(self, step: int, out: Path) -> None:
        lines = out / "metrics.jsonl"
        self.until(f"step {step}", lambda: lines.exists() and len(lines.read_text().splitlines()) >= step)

    def processes(self, *wanted: str) -> list[int]:
        """The job's processes whose environment holds all of `wanted`."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # ended meanwhile
                continue
            if {f"SLURM_JOB_ID={self.number}", *wanted} <= set(variables):
                found.append(int(folder.name))
        return found

    def workers(self, *ranks: int) -> list[int]:
        """The processes of these ranks, without those that they have started."""
        found = [pid for rank in ranks for pid in self.processes(f"RANK={rank}")]
        return [pid for pid in found if int(status(pid, "PPid")) not in found]


Submit = Callable[..., Submitted]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    why = slurm_cluster.missing()
    if why:
        pytest.skip(f"no Slurm here: {why}")
    folder = Path(tempfile.mkdtemp(prefix="slurm")) / "cluster"  # munge's socket wants a short name
    yield slurm_cluster.start(folder)
    slurm_cluster.stop(folder)


@contextmanager
def submitting(cluster: dict[str, str]) -> Iterator[Submit]:
    """`submit(script, *arguments, **environment)`: a job of examples/slurm; none outlives the context."""
    jobs: list[Submitted] = []

    def submit(
        script: str, *arguments: str, options: tuple[str, ...] = (), named: bool = True, **variables: str
    ) -> Submitted:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = environment(release("0.19.2")) | cluster | {"PATH": path, "PREFLIGHT": "0", "SAVE_EVERY": "2"} | variables
        out = Path(variables["OUTPUT"]) / "slurm.out"
        out.parent.mkdir(parents=True, exist_ok=True)
        command = ["sbatch", "--parsable", *FITS, *([f"--output={out}"] if named else []), *options]
        command.append(f"examples/slurm/{script}.sbatch")
        done = subprocess.run([*command, *arguments], env=own, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        jobs.append(Submitted(done.stdout.strip(), out, own))
        return jobs[-1]

    yield submit
    for job in jobs:
        job.slurm("scancel", job.number)
        job.until("the job to leave its nodes", lambda job=job: job.number not in job.slurm("squeue", "-h"))


@pytest.fixture
def submit(cluster) -> Iterator[Submit]:
    with submitting(cluster) as submit:
        yield submit


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Prepared data, a DeepSpeed JSON with a small batch, and the outputs that tests share."""
    folder = tmp_path_factory.mktemp("slurm")
    text = "".join(file.read_text() for file in sorted((ROOT / "tests").rglob("*.py")))
    (folder / "text.txt").write_text(text[:200_000])
    config = json.loads((ROOT / "examples" / "llama" / "zero1.json").read_text())
    (folder / "zero1.json").write_text(json.dumps(config | {"train_batch_size": 2}))
    prepare = ROOT / "examples" / "llama" / "data.py"
    subprocess.run([sys.executable, str(prepare), str(folder / "data"), str(folder / "text.txt")], check=True)
    return folder


def inputs(folder: Path) -> dict[str, str]:
    """What the jobs of DeepSpeed read."""
    return {"CONFIG": str(folder / "zero1.json"), "DATA": str(folder / "data")}


def deepspeed_state(out: Path) -> dict[str, torch.Tensor]:
    """Weights, masters and momentum after the last step."""
    files = sorted((out / "checkpoint" / f"global_step{STEPS}").glob("*.pt"))
    assert len(files) == 3
    return {f"{f.name}.{k}": v for f in files for k, v in tensors(torch.load(f, weights_only=False)).items()}


def megatron_state(out: Path) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, object] = {}
    reader = FileSystemReader(out / "checkpoint" / str(STEPS))
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return tensors(state)


def tensors(value: object, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested checkpoint, by path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {path: t for key, inner in items for path, t in tensors(inner, f"{name}.{key}").items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    assert sum(t.numel() for t in one.values()) > 10_000_000  # weights, masters, momentum
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def asked_to_stop(job: Submitted, *ask: str) -> None:
    """`ask` makes Slurm send its signal; the workers rest until it is theirs, so that steps are left to do."""
    workers = job.workers(0, 1)
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    job.slurm(*ask)
    bit = 1 << (signal.SIGUSR1 - 1)
    job.until("the signal", lambda: all(bit & int(status(pid, "ShdPnd"), 16) for pid in workers))
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    job.until("the requeue", lambda: "requeued: saved and stopped" in job.printed)
    assert "stopped by SIGUSR1: saved after step" in job.logs()


@pytest.fixture(scope="module")
def sweep(cluster, folder) -> Path:
    """An array of tasks for two learning rates: the first is the undisturbed run for tests below, the last too many."""
    variables = {"LRS": "0.001 0.002", "OUTPUT": str(folder / "sweep"), **inputs(folder)}
    with submitting(cluster) as submit:
        job = submit("deepspeed", *TRAINING, options=(f"--array={'0-2' if FULL else '0,2'}",), **variables)
        for task, state in enumerate(["COMPLETED", "COMPLETED", "FAILED"]):
            if task != 1 or FULL:
                Submitted(f"{job.number}_{task}", job.out, job.environment).ended(state)
    return folder / "sweep"


def test_an_array_sweeps_learning_rates(sweep):
    assert "array task 2: LRS='0.001 0.002' has 2 learning rates" in (sweep / "slurm.out").read_text()
    assert not FULL or differing(*(deepspeed_state(sweep / f"lr_{lr}") for lr in ("0.001", "0.002")))


def test_a_sweep_is_one_table(sweep, tmp_path):
    lines = (sweep / "lr_0.001" / "metrics.jsonl").read_text().splitlines()
    for rate, its in (("lr_3e-4", lines), ("lr_1e-2", lines[:5]), ("lr_0.002", [])):
        (tmp_path / rate).mkdir()
        (tmp_path / rate / "metrics.jsonl").write_text("\n".join([*its, '{"step": 6']))
    command = [sys.executable, "examples/slurm/sweep.py"]
    printed = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    last, fifth = json.loads(lines[-1]), json.loads(lines[4])
    assert [line.split() for line in printed.splitlines()[1:]] == [
        ["0.0003", "8", f"{last['loss']:.4f}", f"{last['val_loss']:.4f}"],
        ["0.002", "0", "-", "-"],
        ["0.01", "5", f"{fifth['loss']:.4f}", "-"],
    ]
    none = subprocess.run([*command, str(tmp_path / "lr_3e-4")], cwd=ROOT, capture_output=True, text=True)
    assert (none.returncode, "no folder lr_RATE in it; allowed: the OUTPUT of" in none.stderr) == (1, True)


def test_each_task_of_an_array_has_an_output_that_is_named_by_it(submit, tmp_path):
    (tmp_path / "short.sh").write_text("exit 0")
    variables = {"CONFIG": str(tmp_path / "short.sh"), "OUTPUT": str(tmp_path / "out"), "LRS": "1 2", "REPO": str(ROOT)}
    job = submit("megatron", options=("--array=0-1", f"--chdir={tmp_path}"), named=False, **variables)
    for task in (0, 1):
        Submitted(f"{job.number}_{task}", job.out, job.environment).ended()
        assert f"job {job.number}_{task}, start 1" in (tmp_path / f"slurm-{job.number}_{task}.out").read_text()


@pytest.mark.skipif(
    not FULL, reason="FULL=1; a bug and a signal below requeue by the same script, test_survival.py resumes"
)
def test_deepspeed_survives_a_killed_rank_and_the_time_limit(submit, sweep, folder):
    out = folder / "deepspeed"
    job = submit("deepspeed", *TRAINING, OUTPUT=str(out), LR="0.001", **inputs(folder))
    job.reaches(3, out)
    os.kill(*job.workers(1), signal.SIGKILL)
    job.until("the requeue", lambda: "requeued: failed with exit code" in job.printed)
    job.until("the second start", lambda: "start 2" in job.printed)
    job.reaches(5, out)
    asked_to_stop(job, "scontrol", "update", f"JobId={job.number}", "EndTime=now+2minutes")  # Slurm then warns
    job.slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")
    assert job.ended().restarts == 2
    resumed = [int(step) for step in re.findall(r"goes on from \S+/global_step(\d+)", job.logs())]
    assert len(resumed) == 2
    assert 2 <= resumed[0] < resumed[1] < STEPS
    assert differing(deepspeed_state(out), deepspeed_state(sweep / "lr_0.001")) == []
    assert len(list((out / "checkpoint").glob("global_step*"))) == 2  # older ones are removed


@pytest.mark.skipif(not FULL, reason="FULL=1; DeepSpeed's job is stopped and goes on by the same script")
def test_megatron_survives_a_cancelled_step_and_the_signal(submit, folder):
    variables = {"TRAIN": "examples/megatron/train.py", "DATA": str(folder / "data")}
    whole = submit("megatron", *TRAINING, "--tp=1", OUTPUT=str(folder / "whole"), PREFLIGHT="1", **variables).ended()
    assert "all is well" in whole.logs("preflight")
    assert whole.restarts == 0
    out = folder / "megatron"
    job = submit("megatron", *TRAINING, "--tp=1", OUTPUT=str(out), **variables)
    job.reaches(3, out)
    job.slurm("scancel", f"{job.number}.0")
    job.until("the requeue", lambda: "requeued: failed with exit code" in job.printed)
    job.until("the second start", lambda: "start 2" in job.printed)
    job.reaches(5, out)
    asked_to_stop(job, "scancel", "--batch", "--signal=USR1", job.number)  # by hand what Slurm does before the limit
    assert job.ended().restarts == 2
    resumed = [int(step) for step in re.findall(r"goes on from \S+/checkpoint/(\d+)", job.logs())]
    assert len(resumed) == 2
    assert 2 <= resumed[0] < resumed[1] < STEPS
    assert differing(megatron_state(out), megatron_state(folder / "whole")) == []


@pytest.mark.skipif(not FULL, reason="FULL=1; the tests above requeue and resume after other faults")
def test_the_deepspeed_launcher_survives_a_lost_node(submit, sweep, folder):
    """`deepspeed --launcher slurm` with its hostfile; then a node is gone, and Slurm itself requeues the job."""
    out = folder / "launcher"
    job = submit("deepspeed_launcher", *TRAINING, OUTPUT=str(out), LR="0.001", **inputs(folder))
    job.reaches(3, out)
    daemon = Path(job.environment["SLURM_CONF"]).with_name("node2.pid")
    lost = [int(daemon.read_text()), *job.processes("SLURMD_NODENAME=node2")]
    for pid in lost:
        os.kill(pid, signal.SIGKILL)
    job.until("the requeue", lambda: job.restarts == 1)
    slurm_cluster.start_node("node2", job.environment)
    job.ended()
    assert (out / "hostfile").read_text().split() == ["node1", "slots=1", "node2", "slots=1"]
    assert re.search(r"goes on from \S+/global_step[2-8]", job.logs())
    assert differing(deepspeed_state(out), deepspeed_state(sweep / "lr_0.001")) == []


BUG = """
echo the reason
said={folder}/said$SLURM_RESTART_COUNT
touch $said.$SLURMD_NODENAME
until [[ -e $said.node1 && -e $said.node2 ]]; do sleep 0.1; done
exit 3
"""


def test_a_bug_is_not_requeued_for_ever_and_a_cancelled_job_not_at_all(submit, tmp_path):
    # The first node that fails ends the other one: each waits until both have printed.
    (tmp_path / "bug.sh").write_text(BUG.format(folder=tmp_path))
    (tmp_path / "long.sh").write_text("touch $CHECKPOINT_PATH; sleep 100")
    bug = submit("megatron", CONFIG=str(tmp_path / "bug.sh"), OUTPUT=str(tmp_path / "bug"), MAX_FAILURES="2")
    long = submit("megatron", CONFIG=str(tmp_path / "long.sh"), OUTPUT=str(tmp_path / "long"))
    long.until("its start", (tmp_path / "long" / "checkpoint").exists)
    long.slurm("scancel", long.number)
    long.ended("CANCELLED")
    bug.ended("FAILED")
    assert bug.printed.count("the reason") == 4  # on two nodes, twice
    assert "2 times in a row without a new checkpoint: not requeued" in bug.printed
    assert (bug.restarts, long.restarts) == (1, 0)


HANG = """
exec torchrun --nnodes 2 --node-rank $SLURM_NODEID --nproc-per-node 1 --master-addr $MASTER_ADDR \
    --master-port $MASTER_PORT {watched} alone sleeps 1 outside
"""


@pytest.mark.skipif(not FULL, reason="FULL=1; a minute on two nodes; what is told: tests/preflight, tests/watchdog")
def test_the_jobs_output_has_preflights_table_and_ends_in_the_watchdogs_verdict(submit, tmp_path):
    (tmp_path / "hang.sh").write_text(HANG.format(watched=SUPPORT / "watched.py"))
    variables = {"CONFIG": str(tmp_path / "hang.sh"), "OUTPUT": str(tmp_path / "out"), "MUON_WATCHDOG": "8"}
    variables |= {"PREFLIGHT": "1", "PREFLIGHT_ARGS": "--rendezvous 200 --timeout 200", "MAX_FAILURES": "1"}
    job = submit("megatron", **variables).ended("FAILED")
    for line in (
        r"nodes +ranks .*\n-+\n2: node\d, node\d +0-1 ",
        r"DP +1 x 2 .*\n(preflight: .*\n)*preflight: 2 ranks, 2 nodes, \d+ s: all is well$",
    ):
        assert re.search(f"^{line}", job.printed, re.M), job.printed
    told = job.printed.splitlines()
    held = 'rank 1 of 2 (node2) held up the others before step 3, phase "forward and backward", '
    assert f"muon_plugin watchdog: {held}" in told[-1]
    assert "exits with code" not in told[-1]
    assert job.field("ExitCode") == "75:0"  # which sacct shows, too


DRAINED = """
touch $OUTPUT/started.$SLURMD_NODENAME
until [[ -e $OUTPUT/drained ]]; do sleep 0.1; done
exit 3
"""


def test_a_drained_node_that_keeps_a_job_pending_is_named(submit, tmp_path):
    """In the output of a job that is requeued; docs/many_nodes.md has these questions to Slurm for any job."""
    (tmp_path / "fails.sh").write_text(DRAINED)
    out = tmp_path / "out"
    job = submit("megatron", CONFIG=str(tmp_path / "fails.sh"), OUTPUT=str(out))
    job.until("both nodes", lambda: all((out / f"started.node{number}").exists() for number in (1, 2)))
    job.slurm("scontrol", "update", "NodeName=node2", "State=DRAIN", "Reason=a broken fan")
    try:
        (out / "drained").touch()
        why = ("squeue", "-h", "-j", job.number, "-o", "%T %R")
        job.until(
            "Slurm's reason", lambda: job.slurm(*why).startswith("PENDING (Nodes required for job are DOWN, DRAI")
        )
        assert "drained or down, so that the next start may have to wait: node2: a broken fan\n" in job.printed
        assert re.search(r"^a broken fan .* node2$", job.slurm("sinfo", "-R"), re.M)
    finally:
        job.slurm("scontrol", "update", "NodeName=node2", "State=RESUME")


PRETRAIN = """
import os, shlex, signal, sys, pathlib
out = pathlib.Path(os.environ["OUTPUT"])
def handler(*_):
    (out / f"saved{os.environ['RANK']}").touch()
    raise SystemExit(0)
starts = out / f"arguments{os.environ['RANK']}"
signal.signal(signal.SIGTERM, handler)
starts.write_text(shlex.join(sys.argv[1:]))
while True:
    signal.pause()
"""


def test_megatrons_own_flags_and_signal_reach_pretrain_gpt(submit, tmp_path):
    """Megatron's loop needs GPUs; what is tested is what its ranks are given: arguments and SIGTERM."""
    (tmp_path / "pretrain_gpt.py").write_text(PRETRAIN)
    # Quoted as in a shell, as the planner reads the same file.
    quoted = "--moe-layer-freq '([0]*1+[1]*2)' --wandb-exp-name 'run #2'"
    (tmp_path / "arguments").write_text(f"--optimizer muon  # a comment\n{quoted}\n--use-distributed-optimizer\n")
    out = tmp_path / "out"
    variables = {"TRAIN": str(tmp_path / "pretrain_gpt.py"), "CONFIG": str(tmp_path / "arguments"), "DATA": "some/data"}
    job = submit("megatron", "--seed", "7", OUTPUT=str(out), **variables)
    job.until("both ranks", lambda: all((out / f"arguments{rank}").exists() for rank in (0, 1)))
    job.slurm("scancel", "--batch", "--signal=USR1", job.number)
    job.until("the requeue", lambda: job.restarts == 1)
    assert all((out / f"saved{rank}").exists() for rank in (0, 1))
    given = (out / "arguments1").read_text()
    assert re.fullmatch(
        f"--optimizer muon {re.escape(quoted)} --use-distributed-optimizer --data-path some/data "
        r"--save (\S+)/checkpoint --load \1/checkpoint --save-interval 2 --exit-signal-handler "
        r"--exit-duration-in-mins 2\d --seed 7",
        given,
    )


def test_llama3_8b_starts_with_these_flags_in_a_container(submit, tmp_path):
    """The launch script as it is, on both nodes: Megatron's parser takes every argument, and the plan is printed."""
    program = tmp_path / "bin" / "apptainer"  # runs what follows the image, and keeps what it was asked
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\necho "$*" > {tmp_path}/asked.$SLURMD_NODENAME\nshift 7\nexec "$@"\n')
    program.chmod(0o755)
    (tmp_path / "env.sh").write_text("export DRY_RUN=1\n")
    variables = {"CONTAINER": "image.sif", "CONTAINER_MOUNTS": "/data:/data", "ENV_SH": str(tmp_path / "env.sh")}
    variables |= {"OUTPUT": str(tmp_path / "out"), "LR": "2e-4", "MAX_FAILURES": "1"}
    variables["PATH"] = f"{program.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = submit("megatron", "--tensor-model-parallel-size", "2", **variables).ended()
    assert job.logs().count("Newton-Schulz: ") == 2
    asked = (tmp_path / "asked.node2").read_text()
    mounts = f"{ROOT}:{ROOT},{tmp_path}/out:{tmp_path}/out,/data:/data"
    assert asked.startswith(f"exec --nv --bind {mounts} --pwd {ROOT} image.sif bash {ROOT}/examples/slurm/node.sh")


ON_NODE2 = """
if [[ $SLURMD_NODENAME == node2 ]]; then
    export PATH={folder}/bin:$PATH GLOO_SOCKET_IFNAME=no_such_interface
fi
"""
ELSEWHERE = """#!/bin/bash
shared={shared} other={other}
cd {folder}
exec {torchrun} "${{@/$shared/$other}}"
"""


@pytest.mark.skipif(not FULL, reason="FULL=1; the same faults under torchrun: tests/preflight")
def test_the_preflight_stops_a_job_whose_node_is_not_fit(submit, tmp_path):
    """Another version, a folder that is not the shared one, a peer out of reach: each is told, none is requeued."""
    shutil.copytree(ROOT / "muon_plugin", tmp_path / "other" / "muon_plugin")
    with open(tmp_path / "other" / "muon_plugin" / "core" / "plan.py", "a") as file:
        file.write("# an older version\n")
    (tmp_path / "env.sh").write_text(ON_NODE2.format(folder=tmp_path))
    torchrun, out = Path(sys.executable).parent / "torchrun", tmp_path / "shared"
    program = tmp_path / "bin" / "torchrun"
    program.parent.mkdir()
    program.write_text(
        ELSEWHERE.format(torchrun=torchrun, shared=out, other=tmp_path / "local", folder=tmp_path / "other")
    )
    program.chmod(0o755)
    variables = {"PREFLIGHT": "1", "PREFLIGHT_ARGS": "--timeout 120", "ENV_SH": str(tmp_path / "env.sh")}
    job = submit("deepspeed", OUTPUT=str(out), **variables).ended("FAILED")
    assert job.restarts == 0
    # torchrun sorts nodes by name: which of these two, that have one, is first is a matter of chance
    missing = "(local is not there|shared does not have the file that rank 0 wrote).*: mount the shared file system"
    link = "Unable to find address for: no_such_interface"
    for told in ("muon_plugin differs", missing, link, "the preflight failed: not started, not requeued"):
        assert re.search(told, job.printed), f"{told}\n{job.printed}"
    assert not (out / "checkpoint").exists()
