"""Settings of all tests: the environment of the user does not reach them."""

import os
import signal

import pytest

USER_SETTINGS = (
    "MASKWISE_CACHE",
    "MASKWISE_MODULES",
    "MASKWISE_TIMEOUT",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
)


def pytest_configure():
    """Remove variables that change what the program does, before any module reads them, and let Ctrl-C interrupt."""
    for name in USER_SETTINGS:
        os.environ.pop(name, None)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so in the background jobs of a shell script
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def one_thread():
    """Compute on one thread: more only slow down tensors as small as those of tests."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
