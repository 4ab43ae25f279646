"""A Slurm cluster of one node on this machine: munged, slurmctld and slurmd on loopback, all ended on exit."""

import contextlib
import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
PACKAGES = ("slurm-wlm", "munge")
SERVER_PATHS = "/usr/sbin:/usr/local/sbin"  # not on every user's PATH
INSTALL = "MASKWISE_TESTS_INSTALL"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"}

# proctrack/linuxproc and task/none need no cgroups; cred_expire is also the wait of a requeued job (else two minutes)
CONFIGURATION = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MinJobAge=86400
FirstJobId={job}
ReturnToService=2
MailProg=/bin/true
KillWait=600
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


class Refused(Exception):
    """No Slurm here; the message gives the reason."""


def install() -> None:
    """Install Slurm and munge from Debian where they are missing; raises Refused with the reason if that fails.

    Only root installs, only by apt-get, and not with MASKWISE_TESTS_INSTALL=0. Downloads may take a minute.
    """
    path = f"{os.environ['PATH']}:{SERVER_PATHS}"
    missing = [daemon for daemon in DAEMONS if shutil.which(daemon, path=path) is None]
    if not missing:
        return
    if os.environ.get(INSTALL) == "0":
        raise Refused(f"{missing[0]} is missing and {INSTALL}=0")
    if os.geteuid() != 0:
        raise Refused(f"{missing[0]} is missing and only root installs packages")
    if shutil.which("apt-get") is None:
        raise Refused(f"{missing[0]} is missing and there is no apt-get")
    wanted = ("install", "--yes", "--no-install-recommends", *PACKAGES)
    if _apt_get(60, "--download-only", *wanted):  # the package lists are missing or old
        _apt_get(60, "update")
        reason = _apt_get(60, "--download-only", *wanted)
        if reason:
            raise Refused(reason)
    reason = _apt_get(300, "--no-download", *wanted)  # a longer limit, since dpkg is better not interrupted
    if reason:
        raise Refused(reason)


def _apt_get(seconds: float, *arguments: str) -> str:
    """Run apt-get; returns the reason of a failure, or nothing."""
    quick = ("-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=15", "-o", "DPkg::Lock::Timeout=10")
    try:
        done = subprocess.run(
            ["apt-get", "-qq", *quick, *arguments],
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return f"apt-get {arguments[0]} took more than {seconds:g} s"
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    return f"apt-get {arguments[0]}: {last}" if done.returncode else ""


class Cluster:
    """One node of four CPUs, whatever the machine has; on exit all jobs, steps and daemons are ended by process id.

    Raises Refused where a daemon ends at once, such as slurmd in a container without /sys/fs/cgroup.
    """

    def __init__(self, seconds: float = 900):
        self.seconds, self.daemons = seconds, {}
        self.folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # paths of sockets have at most 107 bytes
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))},
            "PATH": f"{os.environ['PATH']}:{SERVER_PATHS}",
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        until = time.monotonic() + 30
        while (processes := self._processes()) and time.monotonic() < until:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)
        for daemon in self.daemons.values():
            daemon.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        for name in ("state", "spool"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        controller, node = _free_ports(2)
        job = random.SystemRandom().randrange(1, 10**6)  # the port of its ranks: clusters beside each other must differ
        user = pwd.getpwuid(os.geteuid()).pw_name
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(folder=folder, host=host, controller=controller, node=node, user=user, job=job)
        )
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        self._daemon(
            "munged", "--foreground", "--force", *(f"--{name}={folder / file}" for name, file in files.items())
        )
        self.wait(lambda: (folder / "munge.socket").exists(), "munged opens its socket")
        self._daemon("slurmctld", "-D", "-i", "-c")
        self.wait(lambda: self._answers("scontrol", "ping"), "slurmctld answers")
        self._daemon("slurmd", "-D")
        self.wait(lambda: "idle" in self._answers("sinfo", "--noheader", "--format=%T"), "the node is idle")

    def _daemon(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "w") as output:
            tied = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []  # should the tests be killed
            self.daemons[command[0]] = subprocess.Popen(
                [*tied, *command], env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def _answers(self, *command: str) -> str:
        """Return what a tool prints, or nothing if it fails."""
        try:
            return self.run(*command)
        except (AssertionError, subprocess.TimeoutExpired):
            return ""

    def _processes(self) -> set[int]:
        """Return the processes of jobs and daemons, by SLURM_CONF in their environment."""
        mark, found = f"SLURM_CONF={self.folder / 'slurm.conf'}\0".encode(), set()
        for place in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in place.read_bytes():
                    found.add(int(place.parent.name))
        return found

    def run(self, *command: str, **variables: str) -> str:
        """Run a tool of Slurm and return its output; raises AssertionError if it fails."""
        done = subprocess.run(
            command, env={**self.environment, **variables}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Return the state of a job, such as RUNNING; the flags of one that is being completed are left out."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """Return a field of `scontrol show job`."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def wait(self, condition, what: str):
        """Return the first true value of a condition; raises AssertionError with the logs after `seconds`."""
        until = time.monotonic() + self.seconds
        while not (value := condition()):
            for name, daemon in self.daemons.items():
                if daemon.poll() is not None:
                    raise Refused(
                        f"{name} ended: {' '.join((self.folder / f'{name}.out').read_text().splitlines()[-3:])}"
                    )
            assert time.monotonic() < until, f"{what}: not within {self.seconds:g} s\n{self.logs()}"
            time.sleep(0.1)
        return value

    def wait_until_ended(self, job: str) -> str:
        """Wait until a job has ended for good, and return its state."""
        return self.wait(lambda: (state := self.state(job)) in ENDED and state, f"job {job} ends")

    def logs(self, last: int = 3000) -> str:
        """Return the ends of the logs of daemons and jobs."""
        paths = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-last:]}" for path in paths)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in sockets]
