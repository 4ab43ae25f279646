"""The world: alone, and what two ranks say to each other."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from torch import nn

from maskwise.distributed import world as world_module
from maskwise.distributed.world import World
from maskwise.functional.errors import UserError


def test_alone_there_is_no_process_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = World.start("cpu")
    value, module = torch.ones(2, requires_grad=True), nn.Linear(1, 1)
    assert (world.rank, world.size, world.device, world.is_main) == (0, 1, torch.device("cpu"), True)
    assert torch.equal(world.all_sum(value), value) and not world.all_sum(value).requires_grad
    assert world.wrap(module) is module and world.any(True) and not world.any(False) and world.gather_objects(3) == [3]
    assert not torch.distributed.is_initialized()
    world.barrier(), world.close()


@pytest.mark.parametrize(
    ("environment", "device", "text"),
    [
        ({"WORLD_SIZE": "two"}, "cpu", "must be integers"),
        ({"WORLD_SIZE": "2"}, "cpu", "start with torchrun, or unset WORLD_SIZE"),
        ({}, "gpu", "unknown device 'gpu'"),
        ({}, "cuda:99", "this machine has"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, environment, device, text):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=text) as caught:
        World.start(device)
    assert "\n" not in str(caught.value)


def test_a_group_that_was_left_is_not_taken_apart(monkeypatch):
    left = []
    monkeypatch.setattr(world_module, "LEFT", left)
    group = world_module.dist.GroupMember
    monkeypatch.setattr(world_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(world_module.dist, "destroy_process_group", lambda: left.append("destroyed"))
    World(0, 2).close()
    assert left == [group.WORLD, "destroyed"]  # held before the others let go of it: its end joins a thread that may want the GIL


def test_two_ranks():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = [
        subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]
    ends = [(child.communicate(timeout=120)[1], child.returncode) for child in children]
    assert all(code == 0 for _, code in ends), ends


def conversation():
    world = World.start("cpu")
    value = torch.full((2,), world.rank + 1.0)
    assert world.all_sum(value).tolist() == [3.0, 3.0] and value.tolist() == [world.rank + 1.0] * 2
    rows = torch.arange(world.rank + 1) + 10 * world.rank
    assert world.gather(rows).tolist() == [0, 10, 11]
    assert world.gather_objects(world.rank) == [0, 1]
    assert world.any(world.rank == 1) and not world.any(False)
    torch.manual_seed(world.rank)
    layer = nn.Linear(2, 1, bias=False)
    wrapped = world.wrap(layer)
    assert len(world.gather(layer.weight).unique(dim=0)) == 1, "weights start equal"
    wrapped(torch.full((1, 2), float(world.rank))).sum().backward()
    assert layer.weight.grad.tolist() == [[0.5, 0.5]]
    try:
        world.wrap(nn.BatchNorm1d(2))
    except UserError as error:
        assert "2 CPU ranks" in str(error)
    else:
        raise AssertionError("batch norm on CPU ranks was let through")
    world.barrier(), world.close()


if __name__ == "__main__":
    conversation()
