"""Encoders of one and of many channels in every evaluation, in evaluate all, in report and in pictures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from maskwise import api, build
from maskwise.data.datasets import Folder, Shapes
from maskwise.errors import UserError
from maskwise.evaluation import EVALUATIONS, mask_overlap
from maskwise.evaluation.features import views
from maskwise.evaluation.linear import linear
from maskwise.imaging.pil import to_gray
from maskwise.nn import POOLINGS, Backbone, Encoder
from maskwise.recipe.reading import read_recipe
from support.benchmark_folders import photograph
from support.tiny_sets import Colors

OPTIONS = {
    "knn": {"k": (1, 5), "pixels": 8},
    "few_shot": {"per_class": 1},
    "linear": {"augment": False, "epochs": 2, "batch_size": 8, "lr": 1.0, "feature": "pooled"},
    "logistic": {},
    "attentive": {"epochs": 1, "warmup_epochs": 0, "batch_size": 16, "lr": 0.02},
    "clustering": {},
    "masked": {"ratios": (0.5,), "k": 3},
    "robustness": {"k": 3},
    "analysis": {"parts": ("diversity", "salient")},
    "recall": {"ks": (1, 2)},
    "retrieval": {"long_side": 16, "multi_scale": True},
    "copy_detection": {},
    "top1": {},
}


class Gray(Colors):
    """Gray images of some channels, all equal."""

    def __init__(self, *parts, channels=1, bits=8, **options):
        super().__init__(*parts, **options)
        self.channels, self.bits = channels, bits

    def image(self, i):
        gray = super().image(i)[int(self.labels[i]) % 3].clone()
        gray[: 4 * int(self.labels[i]) + 1] = 255
        if self.bits == 16:
            gray = (gray.to(torch.int32) * 257).to(torch.uint16)
        return gray.expand(self.channels, *gray.shape)


def encoder_of(channels):
    """Encoders that give equal features for equal channels: the first layer's weights are shared out."""
    torch.manual_seed(0)
    mean, std = (0.4,) * channels, (0.3,) * channels
    size = {"image_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    backbone = Backbone("vit_tiny_patch16_224", mean=mean, std=std, **size)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim < 4:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        weight = backbone.patch_embed.proj.weight
        shared = torch.randn(weight.shape[0], 1, *weight.shape[2:], generator=generator)
        weight.copy_(0.2 * shared.expand_as(weight) / channels)
    return Encoder(backbone, POOLINGS["cls"](24)).eval()


def evaluate(name, encoder, tmp_path, **kind):
    train, test = Gray(24, **kind), Gray(9, seed=1, **kind)
    boxes = [{"bbx": torch.tensor([1.0, 2, 15, 15]), "easy": [i], "hard": [i + 3], "junk": []} for i in range(9)]
    data = {
        "robustness": {"train": train, "test": test, "shifted": Gray(9, seed=2, **kind)},
        "retrieval": {"query": test, "database": train, "ground_truth": boxes},
        "copy_detection": {"database": train, "copies": {"strong": test}, "whitening": test},
        "recall": {"test": test},
    }.get(name, {"train": train, "test": test})
    options = dict(OPTIONS[name])
    if name == "top1":
        options["probe"] = tmp_path / "probe.safetensors"
        linear(encoder, data, save=options["probe"], **OPTIONS["linear"])
    return EVALUATIONS[name](encoder, data, **options).numbers


@pytest.mark.parametrize("kind", [{"channels": 1}, {"channels": 4}, {"channels": 5, "bits": 16}], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_numbers_equal_those_of_three_equal_channels(name, kind, tmp_path):
    numbers = evaluate(name, encoder_of(kind["channels"]), tmp_path, **kind)
    expected = evaluate(name, encoder_of(3), tmp_path, **{**kind, "channels": 3})
    assert numbers == pytest.approx(expected, abs=1e-3, nan_ok=True)


def test_colors_become_luma_for_one_channel():
    """As Pillow converts them; RGB sets that are read without a number of channels included."""

    class Luma(Colors):
        def image(self, i):
            picture = to_gray(Image.fromarray(super().image(i).permute(1, 2, 0).numpy()))
            return torch.from_numpy(np.array(picture))[None]

    encoder, options = encoder_of(1), {"k": (1, 3), "pixels": 8}
    report = EVALUATIONS["knn"](encoder, {"train": Colors(24), "test": Colors(9, seed=1)}, **options)
    luma = EVALUATIONS["knn"](encoder, {"train": Luma(24), "test": Luma(9, seed=1)}, **options)
    assert report.numbers == luma.numbers


@pytest.mark.parametrize("channels", [1, 5])
def test_masks_on_objects_are_cropped_for_any_number_of_channels(channels):
    shapes = Shapes(2, 32)
    kinds = (encoder_of(channels), encoder_of(3))
    covered = [mask_overlap.objects(encoder, shapes, torch.arange(2), (2, 2)) for encoder in kinds]
    assert torch.equal(*covered) and covered[0].any()


def test_other_numbers_of_channels_end_in_one_line():
    with pytest.raises(UserError, match="^0.png has 3 channels and the encoder takes 5; give images of 5 channels$"):
        EVALUATIONS["knn"](encoder_of(5), {"train": Colors(6), "test": Colors(3)})
    with pytest.raises(UserError, match="finetune augments RGB images, and this encoder takes 1 channels; evaluate"):
        EVALUATIONS["finetune"](encoder_of(1), {"train": Colors(6), "test": Colors(3)})


@pytest.mark.parametrize(
    "make", [lambda: views.Bilinear((8, 8)), lambda: views.Downscaled(12, (2, 2), ((1, 2, 25, 19),))]
)
def test_views_resize_each_channel_as_rgb(make):
    image = torch.randint(0, 256, (3, 21, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rgb, five = make()(image, 0), make()(torch.cat([image, image[:2]]), 0)
    assert torch.equal(five[:3], rgb) and torch.equal(five[3:], rgb[:2])
    assert torch.equal(make()(image[1:2], 0), rgb[1:2])
    wide = make()((image.to(torch.int32) * 257).to(torch.uint16), 0)
    difference = wide.to(torch.int32) - rgb.to(torch.int32) * 257
    assert wide.dtype == torch.uint16 and difference.abs().max() <= 4 * 257  # 8 bits are rounded twice


def bands(root, channels, per_class):
    """Class folders of gray PNG files, or of arrays for more channels."""
    for label, name in enumerate(("a", "b")):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = np.random.default_rng(10 * label + i).integers(0, 90, (20, 24, channels), dtype=np.uint8)
            pixels[:10] += np.uint8(100 * label)
            if channels == 1:
                Image.fromarray(pixels[..., 0]).save(root / name / f"{i}.png")
            else:
                np.save(root / name / f"{i}.npy", pixels)


@pytest.mark.parametrize("channels", [1, 5])
def test_a_run_and_all_its_evaluations(channels, tmp_path):
    pytest.importorskip("sklearn")
    bands(tmp_path / "photos" / "train", channels, 8), bands(tmp_path / "photos" / "val", channels, 4)
    recipe = read_recipe(
        "debug/tiny",
        "data.name=folder",
        f"data.path={tmp_path / 'photos'}",
        "data.split=train",
        "data.test_split=val",
        "train.epochs=1",
        f"data.mean={[0.5] * channels}",
        f"data.std={[0.25] * channels}",
        "teacher.warmup_temp_epochs=0",
        "optimizer.warmup_epochs=0",
        "evaluate.k=[1]",
        "evaluate.pictures_every=1",
    )
    run = tmp_path / "run"
    assert build.train(recipe, run, quiet=True)["status"] == "complete"
    report = api.report(run)
    assert 0 <= report.numbers["knn_pixels"] <= 100 and (run / "pictures" / "sheet.png").is_file()
    reports = api.evaluate_all(run, tmp_path / "photos", tmp_path / "out", say=str)
    assert set(reports) == {"knn_photos", "baselines_photos", "clustering_photos", "masked_photos"}
    sets = {
        role: Folder(tmp_path / "photos", part, channels=channels)
        for role, part in (("train", "train"), ("test", "val"))
    }
    again = api.evaluate("knn", run, **sets, k=(10, 20), feature="pooled").numbers
    assert again == reports["knn_photos"].numbers
    assert json.loads((tmp_path / "out" / "reports" / "knn_photos.json").read_text())["numbers"] == again
    assert len(list((tmp_path / "out" / "pictures").glob("photos_*.png"))) == 4
    photograph(tmp_path / "color.png", 0)
    if channels == 1:
        assert api.look(run, [tmp_path / "color.png"], tmp_path / "sheet.png").is_file()
