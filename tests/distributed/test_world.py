"""World: a single process, and collective operations of two ranks."""

import inspect
import os
import socket
import subprocess
import sys

import pytest
import torch
from torch import nn

from maskwise.distributed import world as world_module
from maskwise.distributed.rendezvous import taken
from maskwise.distributed.world import World
from maskwise.errors import UserError
from support.pair import free_port


def test_single_process_has_no_process_group(monkeypatch):
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
        ({"WORLD_SIZE": "two"}, "cpu", "WORLD_SIZE=two is not a whole number"),
        ({}, "gpu", "unknown device 'gpu'"),
        ({}, "cuda:99", "this machine has"),
    ],
)
def test_user_errors_are_one_line(monkeypatch, environment, device, text):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=text) as caught:
        World.start(device)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_port_of_another_program_is_named(monkeypatch, rank):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in {**variables, "MASKWISE_TIMEOUT": "0.5"}.items():
            monkeypatch.setenv(name, value)
        for name in ("LOCAL_RANK", "TORCHELASTIC_USE_AGENT_STORE"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(UserError) as caught:
            World.start("cpu")
    assert str(caught.value) == taken(port, "127.0.0.1" if rank else "this machine")


class Gathered(World):
    """Three ranks, of which the second and third have a problem."""

    def gather_objects(self, value):
        return [value, "no disk", "no images"]


def test_all_ranks_raise_the_problem_of_the_lowest(monkeypatch):
    World().raise_together("")
    with pytest.raises(UserError, match="^mine$"):
        World().raise_together("mine")
    with pytest.raises(UserError, match="^no disk$"):
        Gathered(0, 3).raise_together()


def test_abandoned_process_group_is_not_destroyed(monkeypatch):
    events = []
    monkeypatch.setattr(world_module, "_KEEP_ALIVE", events)
    group = world_module.dist.GroupMember
    monkeypatch.setattr(world_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(world_module.dist, "destroy_process_group", lambda: events.append("destroyed"))
    World(0, 2).close()
    assert events == [
        group.WORLD,
        "destroyed",
    ]  # a reference is taken first: destruction of the group joins a thread that may need the GIL


def test_two_ranks():
    port = str(free_port())
    children = [
        subprocess.Popen(
            [sys.executable, __file__],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends = [(child.communicate(timeout=120)[1], child.returncode) for child in children]
    assert all(code == 0 for _, code in ends), ends


def test_synchronized_batch_norms_keep_timms_activations():
    import timm

    network = nn.ModuleDict({"net": timm.create_model("efficientnet_b0"), "plain": nn.BatchNorm2d(3)})
    made = World(0, 2, torch.device("cuda")).synchronize_batch_norm(network)
    assert isinstance(made["net"].bn1, nn.SyncBatchNorm) and type(made["plain"]) is nn.SyncBatchNorm
    x = torch.randn(1, 32, 4, 4)
    module = made["net"].bn1
    assert torch.equal(module.act(x.clone()), nn.functional.silu(x))
    assert "self.act(" in inspect.getsource(type(module).forward)  # torch's SyncBatchNorm holds it and never calls it


def run_rank():
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
        raise AssertionError("batch norm on CPU ranks was accepted")
    world.barrier(), world.close()


if __name__ == "__main__":
    run_rank()
