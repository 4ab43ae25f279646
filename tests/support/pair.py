"""Start two or more ranks on this machine without torchrun."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def free_port() -> int:
    """Return a TCP port of this machine that no program listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(*words: object, ranks: int = 2, **environment: str) -> list[subprocess.Popen]:
    """Start `python WORDS` as ranks 0, 1, ..., one thread each, with this process's import path.

    environment: further variables by name.
    """
    shared = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    script = [Path(__file__).with_name("rank.py")] if not str(words[0]).startswith("-") else []
    command = [sys.executable, *map(str, [*script, *words])]
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def end(ranks: list[subprocess.Popen], seconds: float = 300) -> list[tuple[str, str]]:
    """Wait until all have exited with status 0 -> (stdout, stderr) of each, without gloo's lines in older torch."""
    outputs = [rank.communicate(timeout=seconds) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), outputs
    return [
        ("".join(line for line in out.splitlines(keepends=True) if not line.startswith("[Gloo]")), err)
        for out, err in outputs
    ]
