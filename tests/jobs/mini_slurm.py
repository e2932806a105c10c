"""A real Slurm in one folder, for tests: munged, slurmctld and several slurmd of this machine.

Nothing outside the folder is touched, no root is needed and no service of the system is used: keys, ports, logs
and the spool are the cluster's own. All nodes are 127.0.0.1 under names (n1, n2, ...) that do not resolve, as
they may not on a real cluster. With a `Network` (network.py) each node is a machine of its own, and so is the head.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

from network import Network

HEAD = "head"
"""The machine of slurmctld, where jobs are submitted."""

_SBIN = ("/usr/sbin", "/sbin", "/usr/local/sbin")
_NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel")
_ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacct", "sacctmgr")
FINISHED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}


def missing(accounting: bool = False) -> str:
    """Why there can be no Slurm here, or none with accounting; "" if there can be."""
    lacking = [name for name in (*_NEEDED, *(_ACCOUNTING if accounting else ())) if _program(name) is None]
    if not lacking:
        return ""
    packages = "slurm-wlm munge" + (" slurmdbd mariadb-server" if accounting else "")
    return f"{', '.join(lacking)} not found (Debian: apt-get install {packages})"


class MiniSlurm:
    """A cluster of `nodes` nodes with `cpus` cores and `gpus` devices each. A context manager.

    Slurm allocates the devices as it would GPUs, and there is nothing behind them.

    With `network` the nodes and HEAD are its machines.

    With `accounting` jobs are recorded in a database, and only the user's account, `project`, may submit some.

    Attributes:
        environment: what a process needs in its environment to be a client of this cluster.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 4,
        cpus: int = 4,
        gpus: int = 2,
        accounting: bool = False,
        network: Network | None = None,
    ) -> None:
        self.folder = folder.resolve()
        self.nodes = [f"n{number + 1}" for number in range(nodes)]
        self._cpus, self._gpus, self._accounting, self._network = cpus, gpus, accounting, network
        self._conf = self.folder / "slurm.conf"
        path = os.pathsep.join([os.environ["PATH"], *_SBIN])
        self.environment = {"SLURM_CONF": str(self._conf), "PATH": path}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> MiniSlurm:
        for name in ("state", "log", "munge", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge").chmod(0o755)  # munged wants its socket to be within everyone's reach
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._conf.write_text(self._configuration())
        for number in range(self._gpus):
            (self.folder / f"gpu{number}").symlink_to("/dev/null")  # a device it must be
        devices = f"{self.folder}/gpu[0-{self._gpus - 1}]"
        self._conf.with_name("gres.conf").write_text(f"NodeName=n[1-{len(self.nodes)}] Name=gpu File={devices}\n")
        try:
            self._start_daemons()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, *command: str, check: bool = True) -> str:
        """What a command that talks to the cluster prints."""
        done = subprocess.run(
            [*self.enter(HEAD), *command], env=os.environ | self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0 or not check, f"{command} ended with {done.returncode}: {done.stderr}"
        return done.stdout

    def enter(self, machine: str) -> list[str]:
        """Words before a command that is to run on a node or HEAD."""
        return self._network.enter(machine) if self._network else []

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of `scontrol show job`; none if the controller of a busy machine does not answer."""
        said = self.run("scontrol", "-o", "show", "job", job_id, check=False)
        return {"JobState": "unknown"} | dict(re.findall(r"(\S+?)=(\S*)", said))

    def wait(self, job_id: str, seconds: float) -> dict[str, str]:
        """Waits until a job has ended; its fields."""
        deadline = time.monotonic() + seconds
        while (job := self.job(job_id))["JobState"] not in FINISHED:
            assert time.monotonic() < deadline, f"job {job_id} is still {job['JobState']} after {seconds} s: {job}"
            time.sleep(0.2)
        return job

    def stop(self) -> None:
        """Ends all jobs, and then the daemons."""
        if any(
            any(str(word).endswith("/slurmd") for word in daemon.args) and daemon.poll() is None
            for daemon in self._daemons
        ):
            self.run("scancel", "--user", getpass.getuser(), check=False)
            deadline = time.monotonic() + 20
            while self.run("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.1)
        for daemon in reversed(self._daemons):  # those on machines of a network end with these
            daemon.terminate()
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def _start_daemons(self) -> None:
        munge = self.folder / "munge"
        munge_files = (f"--{kind}-file={munge / kind}" for kind in ("key", "pid", "log", "seed"))
        self._start("munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *munge_files)
        self._until(lambda: (munge / "socket").exists(), "munged does not answer")
        if self._accounting:
            self._start_accounting()
        self._start("slurmctld", "-D", "-i", machine=HEAD)
        for node in self.nodes:
            self._start("slurmd", "-D", "-N", node, log=f"slurmd-{node}", machine=node)
        self._until(self._idle, "the nodes do not become idle")

    def _start_accounting(self) -> None:
        user, database = getpass.getuser(), self.folder / "database"
        plain = ("--no-defaults", f"--datadir={database}", f"--user={user}")
        subprocess.run(
            [_program("mariadb-install-db"), *plain, "--skip-test-db", "--auth-root-authentication-method=normal"],
            check=True,
            capture_output=True,
        )
        place = self.folder / "mariadb"
        self._start("mariadbd", *plain, f"--socket={place}", "--skip-networking", f"--pid-file={place}.pid")
        self._until(place.exists, "mariadbd does not answer")
        (port,) = _free_ports(1)
        lines = f"""
            AuthType=auth/munge
            AuthInfo=socket={self.folder}/munge/socket
            DbdHost=localhost
            DbdAddr=127.0.0.1
            DbdPort={port}
            SlurmUser={user}
            PidFile={self.folder}/slurmdbd.pid
            StorageType=accounting_storage/mysql
            StorageUser=root
            StorageLoc=slurm_acct_db
            StorageHost=localhost
            """
        conf = self._conf.with_name("slurmdbd.conf")
        conf.write_text("\n".join(line.strip() for line in lines.split("\n") if line.strip()) + "\n")
        conf.chmod(0o600)
        settings = self._conf.read_text().replace(
            "AccountingStorageType=accounting_storage/none",
            "AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageEnforce=associations\n"
            f"AccountingStorageHost=127.0.0.1\nAccountingStoragePort={port}\n"
            f"AccountingStoragePass={self.folder}/munge/socket",
        )
        self._conf.write_text(settings)
        self._start("slurmdbd", "-D", environment={"MYSQL_UNIX_PORT": str(place)})
        self._until(lambda: _listens(port), "slurmdbd does not answer")
        self._sacctmgr("add", "cluster", "mini")
        self._sacctmgr("add", "account", "project", "Cluster=mini")
        self._sacctmgr("add", "user", user, "Account=project", "Cluster=mini")

    def _sacctmgr(self, *arguments: str) -> str:
        return self.run("sacctmgr", "--immediate", *arguments)

    def _idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--partition=batch", "--format=%T", check=False).split()
        return states == ["idle"] * len(self.nodes)

    def _until(self, holds, what: str, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            ended = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            assert not ended and time.monotonic() < deadline, f"{what}; ended: {ended}; see {self.folder / 'log'}"
            time.sleep(0.05)

    def _start(
        self,
        name: str,
        *arguments: str,
        log: str = "",
        machine: str = "",
        environment: dict[str, str] | None = None,
    ) -> None:
        with (self.folder / "log" / (log or name)).open("wb") as output:
            self._daemons.append(
                subprocess.Popen(
                    [*(self.enter(machine) if machine else ()), _program(name), *arguments],
                    env=os.environ | self.environment | (environment or {}),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _configuration(self) -> str:
        user, folder = getpass.getuser(), self.folder
        host = HEAD if self._network else socket.gethostname().split(".")[0]
        controller, *ports = _free_ports(1 + len(self.nodes))
        # cred_expire is also how long a requeued job waits; its default is two minutes.
        lines = f"""
            ClusterName=mini
            SlurmctldHost={host}({self.address(HEAD)})
            SlurmctldPort={controller}
            SlurmUser={user}
            SlurmdUser={user}
            AuthType=auth/munge
            CredType=cred/munge
            AuthInfo=socket={folder}/munge/socket,cred_expire=5
            StateSaveLocation={folder}/state
            SlurmdSpoolDir={folder}/spool/%n
            SlurmctldPidFile={folder}/slurmctld.pid
            SlurmdPidFile={folder}/slurmd-%n.pid
            SlurmctldDebug=info
            SlurmdDebug=info
            SlurmdParameters=config_overrides
            ProctrackType=proctrack/linuxproc
            TaskPlugin=task/none
            MpiDefault=none
            SwitchType=switch/none
            JobAcctGatherType=jobacct_gather/none
            AccountingStorageType=accounting_storage/none
            GresTypes=gpu
            SelectType=select/cons_tres
            SelectTypeParameters=CR_Core
            SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=10000,batch_sched_delay=0
            ReturnToService=1
            JobRequeue=1
            PreemptType=preempt/partition_prio
            PreemptMode=REQUEUE
            KillWait=30
            MinJobAge=3600
            MessageTimeout=30
            CompleteWait=0
            SlurmdTimeout={10 if self._network else 300}
        """.split("\n")
        lines += [
            f"NodeName={node} NodeHostname={node if self._network else host} NodeAddr={self.address(node)} Port={port} "
            f"CPUs={self._cpus} CoresPerSocket={self._cpus} RealMemory=16000 Gres=gpu:{self._gpus} State=UNKNOWN"
            for node, port in zip(self.nodes, ports, strict=True)
        ]
        # jobs of `urgent` take nodes from those of `batch`
        common = "Nodes=ALL MaxTime=INFINITE State=UP"
        lines.append(f"PartitionName=batch {common} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60")
        lines.append(f"PartitionName=urgent {common} PriorityTier=9 PreemptMode=OFF")
        return "\n".join(line.strip() for line in lines) + "\n"

    def address(self, machine: str) -> str:
        return self._network.addresses[machine] if self._network else "127.0.0.1"


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *_SBIN]))


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for candidate in sockets:
        candidate.bind(("127.0.0.1", 0))
    ports = [candidate.getsockname()[1] for candidate in sockets]
    for candidate in sockets:
        candidate.close()
    return ports
