"""Two hosts on one machine: network namespaces with an address each and a link that can be cut."""

import os
import shutil
import subprocess
import time
from pathlib import Path

ADDRESSES = ("10.203.77.1", "10.203.77.2")
INTERFACE = "cable"


class Refused(Exception):
    """Network namespaces are unavailable; the message gives the reason."""


class Hosts:
    """Two network namespaces, removed on exit.

    Raises Refused where the kernel or a missing tool prevents them.
    """

    def __enter__(self):
        missing = [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]
        if missing:
            raise Refused(f"{', '.join(missing)} is not installed")
        self.user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        self.keepers = []
        try:
            self._keep(["unshare", "--net", *(["--map-root-user"] if self.user else [])])
            inside = ["nsenter", "--target", str(self.keepers[0].pid), *self.user] if self.user else []
            self._keep([*inside, "unshare", "--net"])
            self.ip(
                0,
                "link",
                "add",
                INTERFACE,
                "type",
                "veth",
                "peer",
                "name",
                INTERFACE,
                "netns",
                str(self.keepers[1].pid),
            )
            for host, address in enumerate(ADDRESSES):
                self.ip(host, "link", "set", "lo", "up")
                self.ip(host, "address", "add", f"{address}/24", "dev", INTERFACE)
                self.ip(host, "link", "set", INTERFACE, "up")
        except Refused:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception):
        for keeper in self.keepers:
            keeper.kill()
            keeper.wait()

    def on(self, host: int) -> list[str]:
        """Return the command prefix that runs a program on a host."""
        return ["nsenter", "--target", str(self.keepers[host].pid), *self.user, "--net"]

    def ip(self, host: int, *arguments: str) -> None:
        result = subprocess.run([*self.on(host), "ip", *arguments], capture_output=True, text=True)
        if result.returncode:
            raise Refused(f"ip {' '.join(arguments)}: {result.stderr.strip()}")

    def cut(self) -> None:
        """Cut the link silently: packets are dropped without an error."""
        self.ip(1, "link", "set", INTERFACE, "down")

    def _keep(self, command):
        keeper = subprocess.Popen([*command, "sleep", "600"], stderr=subprocess.PIPE, text=True)
        self.keepers.append(keeper)
        ours = os.readlink("/proc/self/ns/net")
        for _ in range(500):
            if keeper.poll() is not None:
                raise Refused(keeper.stderr.read().strip() or f"{command[0]} ended with {keeper.returncode}")
            if (
                os.readlink(f"/proc/{keeper.pid}/ns/net") != ours
                and Path(f"/proc/{keeper.pid}/comm").read_text().strip() == "sleep"
            ):
                return
            time.sleep(0.01)
        raise Refused("no namespace came within five seconds")


def below(pid: int) -> dict[int, int]:
    """Return {process: parent} of all descendants of a process."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, *_ = path.joinpath("stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if state != "Z":
            parents[int(path.name)] = int(parent)
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return {child: parents[child] for child in family - {pid}}


def ranks_below(pid: int) -> dict[int, int]:
    """Return {rank: process} of the ranks below a torchrun process, without their own children."""
    family, ranks = below(pid), {}
    for child in family:
        try:
            variables = dict(
                variable.partition("=")[::2] for variable in Path(f"/proc/{child}/environ").read_text().split("\0")
            )
        except OSError:
            continue
        if "LOCAL_RANK" in variables:
            ranks[child] = int(variables["RANK"])
    return {rank: child for child, rank in ranks.items() if family[child] not in ranks}
