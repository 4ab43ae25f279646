"""A port where ranks are to meet: free, torch's store, or another program."""

import datetime
import socket
import subprocess
import sys

import pytest
import torch.distributed as dist

from maskwise.distributed.rendezvous import answers


@pytest.fixture
def other_program():
    """The port of a program that accepts connections and says nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


def test_answers(other_program):
    wait = datetime.timedelta(seconds=20)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait)
    assert answers("127.0.0.1", store.port) is True
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert answers("127.0.0.1", free.getsockname()[1]) is None
    assert answers("127.0.0.1", other_program, seconds=0.5) is False


def test_another_program_is_named(other_program, monkeypatch):
    program = "from maskwise.distributed import rendezvous as r; import os, sys; r.SECONDS = 0.5\n"
    program += "r.answers.__defaults__ = (0.5,); status = r.main(); os._exit(status)"
    done = subprocess.run(
        [sys.executable, "-c", program, "127.0.0.1", str(other_program)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (
        2,
        f"maskwise: port {other_program} of 127.0.0.1 is in use by another program: choose another (PORT=n for "
        "launch/multinode.sh, --standalone or --master-port=n for torchrun, MASTER_PORT=n for other launchers), the "
        "same on all ranks\n",
    )


def test_a_free_port_passes_without_torch():
    program = "import sys; from maskwise.distributed import rendezvous as r; assert r.main() == 0; "
    program += "sys.exit('torch' in sys.modules)"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        assert subprocess.run([sys.executable, "-c", program, "127.0.0.1", port], check=False).returncode == 0
