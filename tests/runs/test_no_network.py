"""Training, k-NN, export and evaluation open no connection: sockets watched, and in an empty network namespace.

urllib3, which tensorboard imports where boto3 is installed, binds ::1 once to see whether IPv6 works; that is let pass.
"""

import os
import shutil
import subprocess
import sys

import pytest

WATCH = """
import os, socket
LOG = os.environ["WATCH_LOG"]
OUT = {socket.AF_INET, socket.AF_INET6}
def note(what):
    with open(LOG, "a") as file:
        file.write(what + "\\n")
    raise OSError(101, "no network in this test")
def watched(function, name):
    def call(self, *arguments, **options):
        if self.family in OUT and (name, arguments) != ("bind", (("::1", 0),)):
            note(f"{name} {arguments}")
        return function(self, *arguments, **options)
    return call
for name in ("connect", "connect_ex", "sendto", "bind"):
    setattr(socket.socket, name, watched(getattr(socket.socket, name), name))
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
    setattr(socket, name, lambda *arguments, name=name, **options: note(f"{name} {arguments}"))
with open(LOG, "a") as file:
    file.write("watching\\n")
"""

RUN = """
import sys
from maskwise import cli
tiny = ["data.count=64", "train.steps=2", "evaluate.knn_every=1", "evaluate.k=[5]", "optimizer.warmup_epochs=0"]
tiny += ["teacher.warmup_temp_epochs=0", "speed.workers=1"]
for words in (["show", "debug/tiny"], ["train", "debug/tiny", "--out", "run", *tiny],
              ["export", "run", "--to", "exported"], ["evaluate", "knn", "run"],
              ["evaluate", "knn", "run", "k=[3]"], ["convert", "exported", "--to", "again"],
              ["list", "recipes"], ["train", "debug/tiny", "--out", "run", *tiny]):
    if cli.main(words):
        sys.exit(f"failed: {words}")
"""


def own_network() -> list[str]:
    """The words that start a program in an empty network, [] where the system does not let us."""
    for command in (["unshare", "-n"], ["unshare", "-r", "-n"]):
        if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return []


@pytest.mark.slow
@pytest.mark.parametrize("isolated", [False, True])
def test_run_opens_no_network_connection(tmp_path, isolated):
    prefix = own_network() if isolated else []
    if isolated and not prefix:
        pytest.skip("no network namespaces here (unshare)")
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    (tmp_path / "run.py").write_text(RUN)
    log = tmp_path / "log"
    environment = {
        name: value for name, value in os.environ.items() if not name.endswith(("_OFFLINE", "_proxy", "_PROXY"))
    }
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "WATCH_LOG": str(log),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [*prefix, sys.executable, "run.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = log.read_text().splitlines()
    assert lines and set(lines) == {"watching"}, lines
    assert (tmp_path / "exported" / "config.json").is_file() and (tmp_path / "run" / "metrics.jsonl").is_file()


def test_network_guard_detects_connections(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "WATCH_LOG": str(tmp_path / "log")}
    code = (
        "import urllib.request\ntry:\n    urllib.request.urlopen('http://example.invalid/')\n"
        "except OSError:\n    print('stopped')"
    )
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (
        result.stdout == "stopped\n"
        and "create_connection" in (tmp_path / "log").read_text()
        or "getaddrinfo" in (tmp_path / "log").read_text()
    )
