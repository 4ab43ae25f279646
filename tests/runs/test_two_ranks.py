"""Two gloo ranks at half the batch equal one process: masks, drop path, losses, centers."""

import sys
from pathlib import Path

import pytest
import torch

from maskwise.methods.masking import MASKINGS
from support import pair
from support.hints import revealed

STEPS, IMAGES, LOCALS = 10, 8, 2
POOLINGS = ("cls", "simpool")
HINT = {"ratio": 0.4, "var": 0.2, "prob": 0.5, "show_max": 0.5, "seed": 3}  # up to 4 of 16 patches are hints
STEM = {"stem": "conv", "stem_channels": (6, 8, 12), "stem_strides": (2, 2, 2)}
STEM_NORMS = ("layer", "group")
TOLERANCES = {"float64": (1e-9, 0.0), "float32": (0.0, 2e-6)}  # absolute, relative to the largest entry


def build(world, pooling, dtype, accumulate=1, size=(32, 32), stem=None, **options):
    from maskwise import nn
    from maskwise.engine.optim import make_optimizer, parameter_groups
    from maskwise.engine.trainer import Schedules, Trainer
    from maskwise.methods.ibot import IBOT
    from maskwise.nn import Backbone, Encoder, ProjectionHead

    torch.manual_seed(world.rank)  # ranks start apart on purpose: the wrapping must make them equal to rank 0
    backbone = Backbone(
        "vit_tiny_patch16_224",
        image_size=size,
        embed_dim=24,
        depth=2,
        num_heads=2,
        drop_path=0.1,
        mask_token=True,
        **(stem or {"patch_size": 8}),
    )
    encoder = Encoder(backbone, nn.POOLINGS[pooling](24))
    head = ProjectionHead(24, 32, hidden=32, bottleneck=8, norm_last_layer=False)
    masking = MASKINGS["attmask_hint"](**HINT)
    ranks = {"all_sum": world.all_sum, "world_size": world.size, "rank": world.rank}
    method = IBOT(encoder, head, masking, **ranks, seed=3, **options).to(dtype)
    # as a head warms up
    frozen = (
        [name for name, _ in method.named_parameters() if name.startswith("student.encoder.")]
        if pooling == "cls"
        else []
    )
    return Trainer(
        method,
        frozen=frozen,
        freeze_steps=3,
        optimizer=make_optimizer("adamw", parameter_groups(method)),
        world=world,
        schedules=Schedules(
            lr=lambda step: 1e-3 * min(step, 3) / 3,
            weight_decay=lambda step: 0.04,
            momentum=lambda step: 0.9,
            steps_per_epoch=4,
            total_steps=STEPS,
        ),
        accumulate=accumulate,
    )


def part(rows, views, world):
    """This rank's samples of all views of a whole, crop-major batch."""
    share = IMAGES // world.size
    return rows.unflatten(0, (views, IMAGES))[:, world.rank * share : (world.rank + 1) * share].flatten(0, 1)


def gathered(rows, views, world):
    """The crop-major batch of all ranks, from each rank's part."""
    return world.gather(rows.unflatten(0, (views, -1)).transpose(0, 1).contiguous()).transpose(0, 1).flatten(0, 1)


def record(
    world, pooling, dtype, accumulate=1, steps=range(STEPS), trainer=None, sizes=((32, 32), (16, 16)), stem=None
):
    """These steps: masks and drop-path draws of every one, losses and centers."""
    from maskwise.functional import keyed_random

    trainer = trainer or build(world, pooling, dtype, accumulate, sizes[0], stem)
    method, records = trainer.method, {"masks": [], "draws": [], "loss": [], "center": [], "patch_center": []}
    sample_masks, student_forward, uniform = method.sample_masks, method.student_forward, keyed_random.uniform

    def recorded_sample_masks(*arguments, **options):
        masks = sample_masks(*arguments, **options)
        records["masks"].append(gathered(masks.mask, 2, world))
        return masks

    def recorded_uniform(key, n):
        draws = uniform(key, n)
        records["draws"].append(gathered(draws.flatten(1), 2, world))
        return draws

    def recorded_student_forward(*arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(keyed_random, "uniform", recorded_uniform)
            return student_forward(*arguments, **options)

    method.sample_masks, method.student_forward = recorded_sample_masks, recorded_student_forward
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        global_crops = torch.randn(2 * IMAGES, 3, *sizes[0], generator=generator, dtype=torch.float64).to(dtype)
        local_crops = torch.randn(LOCALS * IMAGES, 3, *sizes[1], generator=generator, dtype=torch.float64).to(dtype)
        ids = torch.arange(IMAGES) * 7 + step
        output = trainer.step(part(global_crops, 2, world), part(local_crops, LOCALS, world), part(ids, 1, world))
        records["loss"].append(
            torch.stack([world.all_sum(output[key]) / world.size for key in ("loss", "cls", "patch")])
        )
        records["center"].append(method.center.clone())
        records["patch_center"].append(method.patch_center.clone())
    return {key: torch.stack(values) for key, values in records.items()}


def record_all(world):
    """The recordings of all cases."""
    cases = {
        (pooling, dtype): record(world, pooling, getattr(torch, dtype)) for pooling in POOLINGS for dtype in TOLERANCES
    }
    micro = record(world, "cls", torch.float64, accumulate=2 if world.size == 2 else 1)
    oblong = record(world, "cls", torch.float64, sizes=((24, 40), (8, 16)))
    extra = build(world, "simpool", torch.float64, 2 if world.size == 2 else 1, koleo=0.5, visible_weight=0.5)
    terms = record(world, "simpool", torch.float64, trainer=extra)
    stems = {
        norm: record(world, "simpool", torch.float64, stem={**STEM, "stem_norm_layer": norm}) for norm in STEM_NORMS
    }
    return {
        **cases,
        **stems,
        "oblong": oblong,
        "micro-batches": {key: micro[key] for key in ("loss", "center", "patch_center")},
        "koleo and visible patches": {key: terms[key] for key in ("loss", "center", "patch_center")},
    }


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """What one process, rank 0 of two and rank 1 of two have seen."""
    from maskwise.distributed.world import World

    folder = tmp_path_factory.mktemp("ranks")
    ranks = pair.start(__file__, folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the ranks want the other cores
    single_process = record_all(World())
    torch.set_num_threads(threads)
    pair.end(ranks)
    return single_process, *(torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))


def test_hints_are_revealed():
    assert sum(count > 0 for count in revealed(MASKINGS["attmask_hint"](**HINT), range(STEPS), IMAGES)) > STEPS / 2


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_two_ranks_equal_one_process(recordings, pooling, dtype):
    absolute, relative = TOLERANCES[dtype]
    expected, *ranks = (recording[pooling, dtype] for recording in recordings)
    assert expected["masks"].any() and not expected["masks"].any(-1).all(), "some views are masked, some are not"
    assert len(expected["draws"]) == 2 * STEPS and expected["loss"].isfinite().all()
    for rank in ranks:
        assert torch.equal(expected["masks"], rank["masks"])
        assert torch.equal(expected["draws"], rank["draws"])
        for key in ("loss", "center", "patch_center"):
            allowed = absolute + relative * expected[key].abs().amax(-1, keepdim=True)
            off = (expected[key] - rank[key]).abs()
            assert (off <= allowed).all(), f"{key} off by {off.max():.3g}"


@pytest.mark.parametrize("norm", STEM_NORMS)
def test_two_ranks_equal_one_process_with_a_stem_of_convolutions(recordings, norm):
    expected, *ranks = (recording[norm] for recording in recordings)
    assert expected["masks"].any() and expected["patch_center"].abs().max() > 1e-3
    for rank in ranks:
        assert torch.equal(expected["masks"], rank["masks"])
        torch.testing.assert_close(rank, expected, rtol=0, atol=1e-9)


def test_two_ranks_equal_one_process_on_crops_that_are_not_square(recordings):
    expected, *ranks = (recording["oblong"] for recording in recordings)
    assert expected["masks"].shape == (STEPS, 2 * IMAGES, 15) and expected["masks"].any()
    for rank in ranks:
        assert torch.equal(expected["masks"], rank["masks"])
        torch.testing.assert_close(rank, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", ["micro-batches", "koleo and visible patches"])
def test_two_ranks_with_micro_batches_equal_one_process_without(recordings, case):
    expected, *ranks = (recording[case] for recording in recordings)
    for rank in ranks:
        torch.testing.assert_close(rank, expected, rtol=0, atol=1e-9)


def run_rank():
    from maskwise.distributed.world import World

    world = World.start("cpu")
    torch.save(record_all(world), Path(sys.argv[1]) / f"{world.rank}.pt")
    world.close()


if __name__ == "__main__":
    run_rank()
