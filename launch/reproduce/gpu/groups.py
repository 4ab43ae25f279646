"""A group of one rank, sharded weights, and deterministic kernels beside a plain run: losses, speed, memory."""

from __future__ import annotations

from unittest import mock

from launch.reproduce.gpu import steps

STEPS = 4


def run(kind: str, settings) -> dict:
    """Train a few steps, "plain", with "ddp" or with "fsdp" in a group of one rank: losses of each step, then speed."""
    import torch
    import torch.distributed as dist

    device = settings.torch_device()
    trainer, inputs = build(kind, steps.recipe_of("vits16", settings.miniature, "optimizer.warmup_epochs=0"), device)
    if kind == "ddp":
        trainer.forward = torch.nn.parallel.DistributedDataParallel(trainer.method)
    losses = [trainer.step(*inputs)["loss"] for _ in range(STEPS)]
    result = {"losses": torch.stack(losses).tolist(), "backend": dist.get_backend() if kind != "plain" else None}
    return {**result, **steps.timed(trainer, inputs, 1 if settings.miniature else 10, warm_up=1)}


def build(kind: str, recipe, device):
    """Build a trainer of that kind; a group of one rank starts before."""
    import torch.distributed as dist

    from maskwise.build import training

    if kind != "plain":
        backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backends, store=dist.HashStore(), rank=0, world_size=1)
    if kind != "fsdp":
        return steps.trainer_of(recipe, device)

    def shards_of(model, recipe, world, precision):  # a single rank is not sharded otherwise
        from maskwise.distributed.fsdp import ShardedMethod

        return ShardedMethod(model, world, "fsdp", precision=precision)

    with mock.patch.object(training, "shards_of", shards_of):
        return steps.trainer_of(recipe, device)


def compare(kind: str, settings) -> dict:
    """Run a kind of group beside a plain run in one process; their losses agree to rounding, or the part fails."""
    import torch.distributed as dist

    plain = run("plain", settings)
    grouped = run(kind, settings)
    dist.destroy_process_group()
    difference = max(abs(a - b) / abs(a) for a, b in zip(plain["losses"], grouped["losses"]))
    if difference > 1e-3:
        raise AssertionError(f"losses of {kind} differ from those of a plain run by {difference:.1e}")
    return {"plain": plain, kind: grouped, "relative_difference": difference}


def deterministic(settings) -> dict:
    """Train twice with deterministic kernels; the weights must be equal in every bit."""
    import torch

    from maskwise.engine.runtime import use_deterministic_kernels

    use_deterministic_kernels()
    recipe, weights, result = steps.recipe_of("vits16", settings.miniature), [], {}
    for _ in range(2):
        trainer, inputs = steps.trainer_of(recipe, settings.torch_device())
        result = steps.timed(trainer, inputs, 1 if settings.miniature else 5, warm_up=3)
        weights.append([parameter.detach().clone() for parameter in trainer.method.parameters()])
    differing = sum(not torch.equal(a, b) for a, b in zip(*weights))
    if differing:
        raise AssertionError(f"{differing} of {len(weights[0])} tensors differ between two deterministic runs")
    return {"tensors": len(weights[0]), "differing": differing, **result}
