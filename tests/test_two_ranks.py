"""Two gloo ranks at half the batch are one process at the whole batch (DESIGN.md 7): masks, kept paths, losses, centers."""

import sys
from pathlib import Path

import pair
import pytest
import torch

STEPS, IMAGES, LOCALS = 10, 8, 2
POOLINGS = ("cls", "simpool")
TOLERANCES = {"float64": (1e-9, 0.0), "float32": (0.0, 2e-6)}  # absolute, relative to the largest entry


def build(world, pooling, dtype, accumulate=1):
    from maskwise.engine.optim import make_optimizer, parameter_groups
    from maskwise.engine.trainer import Trainer
    from maskwise.methods.ibot import IBOT
    from maskwise.methods.masking import MASKINGS
    from maskwise import nn
    from maskwise.nn import Backbone, Encoder, ProjectionHead

    torch.manual_seed(world.rank)  # ranks start apart on purpose: the wrapping must make them equal to rank 0
    backbone = Backbone("vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, drop_path=0.1, mask_token=True)
    encoder = Encoder(backbone, nn.POOLINGS[pooling](24))
    head = ProjectionHead(24, 32, hidden=32, bottleneck=8, norm_last_layer=False)
    masking = MASKINGS["attmask_hint"](ratio=0.4, var=0.2, prob=0.5, seed=3)
    method = IBOT(encoder, head, masking, all_sum=world.all_sum, world_size=world.size, seed=3).to(dtype)
    still = [name for name, _ in method.named_parameters() if name.startswith("student.encoder.")] if pooling == "cls" else []  # as a head warms up
    return Trainer(
        method, still=still, still_steps=3, optimizer=make_optimizer("adamw", parameter_groups(method)), world=world, lr=lambda step: 1e-3 * min(step, 3) / 3,
        weight_decay=lambda step: 0.04, momentum=lambda step: 0.9, steps_per_epoch=4, total_steps=STEPS,
        accumulate=accumulate,
    )


def part(rows, views, world):
    """This rank's samples of all views of a whole, crop-major batch."""
    share = IMAGES // world.size
    return rows.unflatten(0, (views, IMAGES))[:, world.rank * share : (world.rank + 1) * share].flatten(0, 1)


def whole(rows, views, world):
    """The crop-major batch of all ranks, from each rank's part."""
    return world.gather(rows.unflatten(0, (views, -1)).transpose(0, 1).contiguous()).transpose(0, 1).flatten(0, 1)


def record(world, pooling, dtype, accumulate=1, steps=range(STEPS), trainer=None):
    """These steps: masks and drop-path draws of every one, losses and centers."""
    from maskwise.functional import draws

    trainer = trainer or build(world, pooling, dtype, accumulate)
    method, seen = trainer.method, {"masks": [], "kept": [], "loss": [], "center": [], "patch_center": []}
    hide, study, uniform = method.hide, method.study, draws.uniform

    def watched_hide(*arguments, **options):
        hidden = hide(*arguments, **options)
        seen["masks"].append(whole(hidden.mask, 2, world))
        return hidden

    def watched_uniform(key, n):
        drawn = uniform(key, n)
        seen["kept"].append(whole(drawn.flatten(1), 2, world))
        return drawn

    def watched_study(*arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(draws, "uniform", watched_uniform)
            return study(*arguments, **options)

    method.hide, method.study = watched_hide, watched_study
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        global_crops = torch.randn(2 * IMAGES, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
        local_crops = torch.randn(LOCALS * IMAGES, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
        ids = torch.arange(IMAGES) * 7 + step
        answer = trainer.step(part(global_crops, 2, world), part(local_crops, LOCALS, world), part(ids, 1, world))
        seen["loss"].append(torch.stack([world.all_sum(answer[key]) / world.size for key in ("loss", "cls", "patch")]))
        seen["center"].append(method.center.clone())
        seen["patch_center"].append(method.patch_center.clone())
    return {key: torch.stack(values) for key, values in seen.items()}


def record_all(world):
    """The recordings of all cases."""
    cases = {(pooling, dtype): record(world, pooling, getattr(torch, dtype)) for pooling in POOLINGS for dtype in TOLERANCES}
    micro = record(world, "cls", torch.float64, accumulate=2 if world.size == 2 else 1)
    return {**cases, "micro-batches": {key: micro[key] for key in ("loss", "center", "patch_center")}}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """What one process, rank 0 of two and rank 1 of two have seen."""
    from maskwise.distributed.world import World

    folder = tmp_path_factory.mktemp("ranks")
    ranks = pair.start(__file__, folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the ranks want the other cores
    one = record_all(World())
    torch.set_num_threads(threads)
    pair.end(ranks)
    return one, *(torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_two_ranks_are_one_process(recordings, pooling, dtype):
    absolute, relative = TOLERANCES[dtype]
    one, *two = (recording[pooling, dtype] for recording in recordings)
    assert one["masks"].any() and not one["masks"].any(-1).all(), "some views are masked, some are not"
    assert len(one["kept"]) == 2 * STEPS and one["loss"].isfinite().all()
    for rank in two:
        assert torch.equal(one["masks"], rank["masks"])
        assert torch.equal(one["kept"], rank["kept"])
        for key in ("loss", "center", "patch_center"):
            allowed = absolute + relative * one[key].abs().amax(-1, keepdim=True)
            off = (one[key] - rank[key]).abs()
            assert (off <= allowed).all(), f"{key} off by {off.max():.3g}"


def test_two_ranks_with_micro_batches_are_one_process_without(recordings):
    one, *two = (recording["micro-batches"] for recording in recordings)
    for rank in two:
        torch.testing.assert_close(rank, one, rtol=0, atol=1e-9)


def speak():
    from maskwise.distributed.world import World

    world = World.start("cpu")
    torch.save(record_all(world), Path(sys.argv[1]) / f"{world.rank}.pt")
    world.close()


if __name__ == "__main__":
    speak()
