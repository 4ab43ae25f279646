"""Processes that end while a thread of torch.distributed still holds a tensor."""

import subprocess
import sys

import pytest

from maskwise.process.ending import end_process
from support import pair


def test_open_collective_does_not_change_exit_status():
    first, second = pair.start(__file__)
    try:
        outputs = first.communicate(timeout=120)
        assert (first.returncode, outputs) == (3, ("last line without newline, registered", ""))
    finally:
        second.kill()
        second.communicate()


@pytest.mark.parametrize("status", [0, 2])
def test_exit_functions_run_and_streams_are_flushed(status):
    code = (
        "import atexit, sys; from maskwise.process.ending import end_process; "
        "atexit.register(sys.stdout.write, ' registered'); sys.stdout.write('buffered'); sys.stderr.write('error'); "
        f"end_process({status}); print('not reached')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, "buffered registered", "error")


if __name__ == "__main__":
    import atexit
    import signal

    import torch
    import torch.distributed as dist

    from maskwise.distributed.world import World

    world = World.start("cpu")
    if world.is_main:
        dist.all_reduce(torch.ones(1000), async_op=True)  # the thread alone holds the tensor now
        atexit.register(sys.stdout.write, ", registered")
        sys.stdout.write("last line without newline")
        end_process(3)
    signal.pause()  # never joins; the test kills it
