"""Runs on a GPU with NCCL, gloo and sharded weights equal a run of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.pair import free_port

pytestmark = pytest.mark.gpu
STEPS, RELATIVE = 6, 2e-5  # the order of summation of cuBLAS depends on the shape


def start(kind, folder, ranks):
    shared = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    children = [
        subprocess.Popen(
            [sys.executable, __file__, kind, str(folder / f"{kind}{rank}.pt"), str(rank), str(ranks)],
            env={**os.environ, **shared},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    ends = [(child.communicate(timeout=300)[1], child.returncode) for child in children]
    assert all(code == 0 for _, code in ends), ends
    return [torch.load(folder / f"{kind}{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.fixture(scope="module")
def single_process(tmp_path_factory):
    [losses] = start("plain", tmp_path_factory.mktemp("plain"), 1)
    assert losses.isfinite().all() and (losses[0] != losses[-1]).all()
    return losses


@pytest.mark.parametrize(("kind", "ranks"), [("nccl", 1), ("nccl split", 1), ("gloo", 2), ("gloo split", 2)])
def test_groups_on_one_gpu_equal_a_single_process(single_process, tmp_path, kind, ranks):
    for losses in start(kind, tmp_path, ranks):
        torch.testing.assert_close(losses, single_process, rtol=RELATIVE, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two ranks of NCCL need two GPUs")
@pytest.mark.parametrize("kind", ["nccl", "nccl split"])
def test_two_gpus_equal_a_single_process(single_process, tmp_path, kind):
    for losses in start(kind, tmp_path, 2):
        torch.testing.assert_close(losses, single_process, rtol=RELATIVE, atol=0)


def run_rank(kind, file, rank, ranks):
    """Save the losses of a few steps; a process group of one rank is a group, too."""
    import torch.distributed as dist

    from distributed.test_fsdp import build, part
    from maskwise.distributed.world import World

    backend = "gloo" if kind.startswith("gloo") else "cpu:gloo,cuda:nccl"
    device = torch.device("cuda", 0 if kind.startswith("gloo") else rank)
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if kind != "plain":
        dist.init_process_group(backend, rank=rank, world_size=ranks)
    world = World(rank, ranks, device)
    trainer = build(world, "fsdp" if kind.endswith("split") else "none", optimizer="sgd")
    if kind == "nccl":
        trainer.forward = torch.nn.parallel.DistributedDataParallel(trainer.method) if ranks == 1 else trainer.forward
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        crops = torch.randn(16, 3, 32, 32, generator=generator), torch.randn(16, 3, 16, 16, generator=generator)
        answer = trainer.step(
            *(part(crop, 2, world).to(device) for crop in crops), part(torch.arange(8) * 7 + step, 1, world)
        )
        means = torch.stack([answer[key].double() for key in ("cls", "patch")])
        losses.append((world.all_sum(means) / ranks).cpu())
    torch.save(torch.stack(losses), file)
    if kind != "plain":
        dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
