"""Settings of all tests: the environment of the user does not reach them."""

import os

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
    """Remove variables that change what the program does, before any module reads them."""
    for name in USER_SETTINGS:
        os.environ.pop(name, None)


@pytest.fixture(scope="module")
def one_thread():
    """Compute on one thread: more only slow down tensors as small as those of tests."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
