"""Data workers that the system ends: one line, between two batches, and no handler of torch's that raises anywhere."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from maskwise.data.loader import batches
from maskwise.data.multicrop import MultiCrop
from maskwise.data.worker import Items, is_from_torch, lost_worker
from maskwise.errors import UserError

CROPS = MultiCrop(global_size=8, local_size=4, local_number=0)


class Noise:
    """Eight images without files."""

    labels = None

    def __len__(self):
        return 8

    def image(self, index):
        return torch.full((3, 12, 12), index, dtype=torch.uint8)

    def name(self, index):
        return str(index)


@pytest.mark.parametrize(
    "code, line",
    [
        (
            -signal.SIGKILL,
            "a data worker was ended by SIGKILL; most likely memory ran out: lower speed.workers, set "
            "speed.cache=none, or give the job more memory",
        ),
        (
            -signal.SIGBUS,
            "a data worker was ended by SIGBUS; most likely the shared memory is full: give the container more (docker "
            "run --shm-size=8g), or lower speed.workers",
        ),
        (
            -signal.SIGSEGV,
            "a data worker was ended by SIGSEGV; most likely a decoder crashed: set data.decoder=pil, or find "
            "the image with speed.workers=0",
        ),
        (-signal.SIGFPE, "a data worker was ended by SIGFPE; find the reason with speed.workers=0"),
        (-99, "a data worker was ended by signal 99; find the reason with speed.workers=0"),
        (1, "a data worker ended by itself (exit status 1); find the reason with speed.workers=0"),
    ],
)
def test_a_lost_worker_is_described_with_its_likely_cause(code, line):
    alive = SimpleNamespace(is_alive=lambda: True, exitcode=None)
    assert lost_worker([alive]) is None and lost_worker([]) is None
    assert lost_worker([alive, SimpleNamespace(is_alive=lambda: False, exitcode=code)]) == line


def test_a_killed_worker_ends_the_batches_in_one_line():
    """The next batch takes up to five seconds: torch looks for its workers that often."""
    handler = signal.getsignal(signal.SIGCHLD)
    stream = batches(Noise(), CROPS, batch_size=4, total_steps=1000, workers=1)
    next(stream)
    assert signal.getsignal(signal.SIGCHLD) == handler
    os.kill(stream._iterator.iterator._workers[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match="^a data worker was ended by SIGKILL; most likely memory ran out: [^\n]*$"):
        for _ in range(1000):
            next(stream)
    stream.close()


def test_a_handler_that_torch_has_set_before_is_replaced(monkeypatch):
    from torch.utils.data._utils import signal_handling

    former = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    signal_handling._set_SIGCHLD_handler()
    assert is_from_torch(signal.getsignal(signal.SIGCHLD))
    assert list(Items(DataLoader([1, 2], batch_size=None))) == [1, 2]
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    own = lambda *_: None  # noqa: E731
    signal.signal(signal.SIGCHLD, own)
    assert list(Items(DataLoader([1, 2], batch_size=None))) == [1, 2] and signal.getsignal(signal.SIGCHLD) == own
    signal.signal(signal.SIGCHLD, former)


def test_other_errors_stay_what_they_are():
    class Broken:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise RuntimeError("a mistake in the code")

    with pytest.raises(RuntimeError, match="a mistake in the code"):
        list(Items(DataLoader(Broken(), batch_size=None)))
