"""Training crops that are not square: masks, whole runs, sheets, exports, ranks, on a grid of 3 x 5 patches."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import maskwise
from maskwise import build
from maskwise.cli.main import main
from maskwise.data.loader import batches
from maskwise.distributed.world import World
from maskwise.doctor.measure import noise
from maskwise.errors import UserError
from maskwise.functional.attention import mean_heads
from maskwise.recipe.reading import read_recipe

SIZES = ("crops.global_size=[24, 40]", "crops.local_size=[8, 16]", "data.count=16", "evaluate.pictures_every=0")
RESNET = ("backbone.name=resnet18", "backbone.layers=[1, 1, 1, 1]", "backbone.channels=[8, 8, 8, 16]")
RESNET += ("head.prototypes=32", "head.hidden=32", "head.bottleneck=8", "crops.local_number=1", "evaluate.knn_every=0")
CASES = {
    ("ibot", "none"): {0},
    ("ibot", "random"): {6},
    ("ibot", "block"): set(range(1, 7)),
    ("ibot", "attmask_high"): {6},
    ("ibot", "attmask_low"): {6},
    ("ibot", "attmask_hint"): {4},  # 6 masked, int(15 * .4 * .4) = 2 of them revealed
    ("dino", "none"): {0},
    ("dino", "attmask_high"): {6},
    ("mst", "attmask_low"): {6},
    ("mst", "block"): set(range(1, 7)),
}


def first_step(*words):
    """The trainer of a recipe, its first batch as a step takes it, and what the step gives."""
    recipe = read_recipe("debug/tiny", *SIZES, "evaluate.knn_every=0", *words)
    trainer = build.trainer(recipe, images=16)
    batch = next(iter(build.stream(recipe, World(), build.dataset(recipe), 1, 0)))
    crops = build.inputs(recipe, trainer)(batch)
    return trainer, crops, batch, recipe


@pytest.mark.parametrize("pooling", ["cls", "simpool"])
@pytest.mark.parametrize("method, masking", CASES)
def test_every_method_masks_the_patches_of_its_grid(method, masking, pooling):
    words = [f"method={method}", f"masking={masking}", f"pooling={pooling}"]
    if masking != "none":
        words += ["masking.ratio=.4", "masking.var=0", "masking.prob=1"]
    if masking == "attmask_hint":
        words.append("masking.show_max=.4")
    trainer, (global_crops, local_crops), batch, _ = first_step(*words)
    assert global_crops.shape == (16, 3, 24, 40) and local_crops.shape == (16, 3, 8, 16)
    encoder, seen = trainer.method.teacher.encoder, []
    with torch.no_grad():
        features = encoder.eval()(global_crops)
    assert features.grid == (3, 5) and encoder.backbone.table_grid == (3, 5)
    sample_masks = trainer.method.sample_masks

    def recorded(*arguments, **options):
        seen.append(sample_masks(*arguments, **options))
        return seen[-1]

    trainer.method.sample_masks = recorded
    losses = trainer.step(global_crops, local_crops, sample_ids=batch.index)
    assert losses["loss"].isfinite() and all(losses[key].isfinite() for key in ("cls", "patch"))
    if masking == "none":
        assert float(losses["mask_share"]) == 0
        return
    [masks] = seen
    assert masks.mask.shape == (16, 15) and set(masks.mask.sum(1).tolist()) <= CASES[method, masking]
    assert float(losses["mask_share"]) == pytest.approx(masks.num_masked / 16 / 15)
    if masking in ("attmask_high", "attmask_low"):
        for row, mask in zip(mean_heads(features.attention).tolist(), masks.mask):
            order = sorted(range(15), key=lambda i: row[i], reverse=masking == "attmask_high")
            assert set(mask.nonzero()[:, 0].tolist()) == set(order[:6])


def test_a_convolutional_network_trains():
    words = ["crops.global_size=[64, 96]", "crops.local_size=[32, 64]", *RESNET, "train.batch_size=8", "data=shapes"]
    recipe = read_recipe("pretrain/dino_vits16", *words, "data.count=16", "speed.workers=0", "pooling=simpool")
    trainer = build.trainer(recipe, images=16)
    batch = next(iter(build.stream(recipe, World(), build.dataset(recipe), 1, 0)))
    global_crops, local_crops = build.inputs(recipe, trainer)(batch)
    assert global_crops.shape == (16, 3, 64, 96) and local_crops.shape[1:] == (3, 32, 64)
    with torch.no_grad():
        assert trainer.method.teacher.encoder.eval()(global_crops).grid == (2, 3)
    assert trainer.step(global_crops, local_crops, sample_ids=batch.index)["loss"].isfinite()


@pytest.mark.parametrize(
    "words, line",
    [
        (
            ("crops.local_size=[64, 16]",),
            "crops.local_size: images of 64x16 pixels are smaller than the stride 32 of resnet18: make them larger",
        ),
        (
            ("backbone.image_size=64", "crops.global_size=[16, 64]"),
            "crops.global_size: images of 16x64 pixels are smaller than the stride 32 of resnet18: make them larger",
        ),
    ],
)
def test_each_side_is_checked_against_the_network(words, line):
    with pytest.raises(UserError) as caught:
        read_recipe("pretrain/dino_vits16", *RESNET, "data=shapes", "pooling=simpool", *words)
    assert str(caught.value) == f"command line: {line}"


def test_ranks_and_workers_give_the_crops_of_one_process():
    recipe = read_recipe("debug/tiny", *SIZES)
    data, views = build.dataset(recipe), build.views(recipe)
    whole = list(batches(data, views, batch_size=8, total_steps=2, seed=3))
    for workers in (0, 1):
        ranks = [
            list(batches(data, views, batch_size=8, total_steps=2, seed=3, rank=r, world_size=2, workers=workers))
            for r in range(2)
        ]
        for step, one in enumerate(whole):
            for name, count in (("global_crops", 2), ("local_crops", 2)):
                parts = [getattr(rank[step], name).unflatten(0, (count, 4)) for rank in ranks]
                assert torch.equal(torch.cat(parts, 1).flatten(0, 1), getattr(one, name))


def test_padding_and_noise_follow_the_grid():
    recipe = read_recipe("debug/tiny", *SIZES, "train.batch_size=64", "data.count=64")
    trainer = build.trainer(recipe, images=64, precision="bf16")
    assert trainer.method.pad_multiple == 2 * 64 * 15 // 16
    batch = noise(recipe, 2, trainer.method.teacher.encoder)
    assert batch.global_crops.shape == (4, 3, 24, 40) and batch.local_crops.shape == (4, 3, 8, 16)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oblong") / "run"
    words = [*SIZES[:3], "train.epochs=1", "evaluate.limit_bank=16", "train.save_every=1"]
    assert build.train(read_recipe("debug/tiny", *words), folder, quiet=True)["status"] == "complete"
    return folder


def test_a_run_evaluates_draws_and_reads_its_recipe_back(run, capsys):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("report") == "knn" for line in lines)
    picture = np.asarray(Image.open(next((run / "pictures").glob("attention_and_masks_*.png"))))
    assert (picture.shape[0] - 4) % 100 in range(30, 40), "96 pixels and a gap for each row, below one line of titles"
    assert picture.shape[1] == 4 + 3 * (160 + 4)
    assert main(["report", str(run), "--measure"]) == 0 and main(["doctor", str(run)]) == 0
    assert "k-NN" in capsys.readouterr().out
    again = build.train(read_recipe(str(run / "recipe.yaml")), run, quiet=True)  # the recipe is read back unchanged
    assert again["status"] == "complete"


def test_an_export_takes_images_as_the_run_did(run, tmp_path):
    assert main(["export", str(run), "--to", str(tmp_path / "export")]) == 0
    encoder, ours = maskwise.load(tmp_path / "export"), maskwise.load(run)
    assert encoder.image_size == ours.image_size == (24, 40) and encoder.backbone.pos_embed.shape == (1, 16, 48)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 120, 3), dtype=np.uint8)
    inputs = encoder.transform(Image.fromarray(pixels))[None]
    assert inputs.shape == (1, 3, 24, 40)
    with torch.no_grad():
        theirs, mine = encoder(inputs), ours(inputs)
    assert torch.equal(theirs.pooled, mine.pooled) and theirs.grid == (3, 5) and theirs.attention.shape == (1, 3, 15)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    words = ["look", str(run), str(tmp_path / "wide.png"), "masking=block", "--out", str(tmp_path / "look.png")]
    assert main(words) == 0 and (tmp_path / "look.png").is_file()
