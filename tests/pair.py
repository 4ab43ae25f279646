"""Two processes that are the two ranks of a world on this machine, without torchrun."""

import os
import socket
import subprocess
import sys


def start(*words: object, **surroundings: str) -> list[subprocess.Popen]:
    """Begin `python WORDS` as rank 0 and rank 1 of two, one thread each, with the imports of this process; further environment by name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, *map(str, words)]
    return [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **surroundings}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip


def end(ranks: list[subprocess.Popen], seconds: float = 300) -> list[tuple[str, str]]:
    """Wait until both have ended well -> what each wrote, (out, err), without the connections that gloo tells of under older torches."""
    said = [rank.communicate(timeout=seconds) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    return [("".join(line for line in out.splitlines(keepends=True) if not line.startswith("[Gloo]")), err) for out, err in said]
