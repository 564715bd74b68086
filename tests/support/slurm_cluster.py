"""A real Slurm of two nodes on this machine: one slurmctld, one slurmd a node, munge, all in one folder.

    python tests/support/slurm_cluster.py start   # prints the line to run in your shell; then sbatch, srun, squeue work
    python tests/support/slurm_cluster.py stop

Needs slurmctld, slurmd, sbatch and munged (`apt-get install slurmctld slurmd slurm-client munge`); `install` does that
as root; the cluster itself is any user's. node1 and node2 are this machine twice, so their names do not resolve:
MASTER_ADDR=127.0.0.1. Each has one CPU and, in Slurm's books only, one GPU: a job of `--gpus-per-node=1` fits.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge"]
PROGRAMS = ["slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged"]
NODES = ["node1", "node2"]
DEFAULT = Path(tempfile.gettempdir()) / "two-node-slurm"
DAEMONS = ["node1", "node2", "slurmctld", "munged"]  # in the order in which they stop

CONF = """\
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job may start again when its credential has expired: 120 s unless set.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0
MpiDefault=none
# Job scripts take ports from the job's number: two clusters on one machine must not share them.
FirstJobId={first}
ReturnToService=2
KillWait=5
SlurmdTimeout=10
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 Gres=gpu:1
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 Gres=gpu:1
PartitionName=both Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can start here, or None."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"  # Debian's users do not have it on their PATH
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)}: not installed (apt-get install {' '.join(PACKAGES)})"
    return None


def install() -> None:
    """Installs Slurm by apt where that is possible and needed; says nothing where it is not."""
    if missing() is None or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        subprocess.run(["apt-get", "-qq", *command], env=environment, capture_output=True, check=False)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def start(folder: Path) -> dict[str, str]:
    """Starts the cluster in `folder` and waits until both nodes are idle; the environment its clients need.

    Raises:
        RuntimeError: if Slurm is not installed, or a daemon does not come up in 60 s.
    """
    if missing():
        raise RuntimeError(str(missing()))
    stop(folder)
    (folder / "state").mkdir(parents=True)
    conf, user, ports = folder / "slurm.conf", pwd.getpwuid(os.getuid()).pw_name, free_ports(3)
    conf.write_text(
        CONF.format(folder=folder, host=socket.gethostname(), user=user, ports=ports, first=secrets.randbelow(9000) + 1)
    )
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")  # counted, never opened
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    environment = os.environ | {"SLURM_CONF": str(conf), "MASTER_ADDR": "127.0.0.1"}
    munged = ["munged", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munged += [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"]
    for command in (munged, ["slurmctld"]):
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=30)
    for node in NODES:
        start_node(node, environment)
    until = time.monotonic() + 60
    command = ["sinfo", "-h", "-N", "-o", "%T"]
    while subprocess.run(command, env=environment, capture_output=True, text=True).stdout.split() != ["idle"] * 2:
        if time.monotonic() > until:
            logs = "\n".join(file.read_text()[-1500:] for file in folder.glob("*.log"))
            stop(folder)
            raise RuntimeError(f"the nodes did not become idle in 60 s:\n{logs}")
        time.sleep(0.2)
    return {"SLURM_CONF": str(conf), "MASTER_ADDR": "127.0.0.1"}


def start_node(node: str, environment: dict[str, str]) -> None:
    """Starts one node, or brings it back after it was lost."""
    subprocess.run(["slurmd", "-N", node], env=environment, check=True, capture_output=True, timeout=30)


def stop(folder: Path) -> None:
    """Ends all jobs and daemons of the cluster in `folder`, and removes the folder."""
    if (folder / "slurmctld.pid").exists():
        environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        subprocess.run(
            ["scancel", "--user", pwd.getpwuid(os.getuid()).pw_name], env=environment, capture_output=True, timeout=60
        )
        until = time.monotonic() + 20
        while subprocess.run(["squeue", "-h"], env=environment, capture_output=True).stdout.strip():
            if time.monotonic() > until:
                break
            time.sleep(0.2)
    ending = []
    for name in DAEMONS:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            ending.append(int((folder / f"{name}.pid").read_text()))
            os.kill(ending[-1], signal.SIGTERM)
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in ending) and time.monotonic() < until:
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    arguments = sys.argv[1:]
    if arguments == ["install"]:
        install()
    elif arguments[:1] == ["start"] and len(arguments) <= 2:
        variables = start(Path(*arguments[1:] or [DEFAULT]).absolute())
        print("Two nodes are idle. In the shell from which you submit jobs:\n")
        print("    export " + " ".join(f"{name}={value}" for name, value in variables.items()))
    elif arguments[:1] == ["stop"] and len(arguments) <= 2:
        stop(Path(*arguments[1:] or [DEFAULT]).absolute())
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
