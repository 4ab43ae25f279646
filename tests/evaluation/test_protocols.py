"""Each protocol end to end on miniature data in its layout on disk, with checks of its numbers."""

import json
import math
import shutil

import pytest
import torch

from data.benchmark_sets.test_benchmark_sets import copydays_on_disk, cub_on_disk, inshop_on_disk
from maskwise import api
from maskwise.data.benchmark_sets import imagenet, in9
from maskwise.data.datasets.folder import Folder
from maskwise.errors import UserError
from maskwise.evaluation import EVALUATIONS
from maskwise.evaluation.clustering import kmeans, plus_plus
from maskwise.evaluation.copy_detection import gem, whitener
from maskwise.evaluation.features import views
from maskwise.evaluation.masked import attention_of, patch_mask
from maskwise.evaluation.retrieval import ranking
from maskwise.evaluation.robustness import in9_accuracy, real_accuracy, restricted
from maskwise.evaluation.scoring.scorer import ScorerOptions, scorer_of
from maskwise.functional import keyed_random
from support.benchmark_folders import class_folders, photograph, revisited, tiny_encoder

WNIDS = ["n01440764", "n02102040", "n02110958"]  # fish, dog, dog


@pytest.fixture(scope="module")
def encoder():
    return tiny_encoder()


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    class_folders(root / "train", WNIDS, 6)
    class_folders(root / "val", WNIDS, 3, seed=7, pattern="ILSVRC2012_val_{:08d}.JPEG")
    return root


def sane(report, name):
    assert report.protocol["evaluation"] == name and report.cost["seconds"] > 0 and len(report.data_hash) == 64
    assert all(
        isinstance(value, float) and (math.isnan(value) or -100 <= value <= 100) for value in report.numbers.values()
    )
    json.dumps(report.protocol)


# clustering


def test_clustering(encoder, classes):
    pytest.importorskip("sklearn")
    report = api.evaluate("clustering", encoder, test=classes / "val")
    sane(report, "clustering")
    assert (
        report.numbers["clusters_used"] == 3.0
        and report.numbers["matched_accuracy"] >= 100 / 3
        and report.seeds == {"k-means": 0}
    )
    head = torch.nn.Linear(48, 5)
    by_head = api.evaluate("clustering", encoder, test=classes / "val", head=head)
    assert by_head.protocol["prototypes"] == 5 and by_head.seeds == {}
    with pytest.raises(UserError, match="into 99 groups of 9 images"):
        api.evaluate("clustering", encoder, test=classes / "val", clusters=99)


def test_kmeans_equals_scikit_learn_from_the_same_centers():
    cluster = pytest.importorskip("sklearn.cluster")
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 4, generator=g, dtype=torch.float64)
    start = rows[:6].clone()
    groups, inertia = kmeans(rows, 6, start=start)
    theirs = cluster.KMeans(6, init=start.numpy(), n_init=1, algorithm="lloyd", tol=0, max_iter=100).fit(rows.numpy())
    assert groups.tolist() == theirs.labels_.tolist() and inertia == pytest.approx(theirs.inertia_, rel=1e-9)


def test_kmeans_starts_from_distant_rows_and_repeats():
    rows = torch.cat([torch.randn(20, 2, generator=torch.Generator().manual_seed(i)) * 0.01 + 10 * i for i in range(4)])
    assert (
        len((plus_plus(rows, 4, keyed_random.make_key(keyed_random.ORDER, 0, 0)).mean(dim=1) / 10).round().unique())
        == 4
    )
    first, again = kmeans(rows, 4, seed=3), kmeans(rows, 4, seed=3)
    assert torch.equal(first[0], again[0]) and first[1] == again[1]
    assert len(kmeans(torch.zeros(5, 2), 3)[0]) == 5  # equal rows: groups stay empty without an error


# IN-9


def test_in9_accuracy_takes_the_arg_max_over_all_classes():
    logits = torch.zeros(4, 1000)
    for row, best in enumerate((160, 171, 0, 160)):
        logits[row, best] = 1.0
    labels = torch.tensor([0, 0, 8, 1])
    assert in9_accuracy(logits, labels) == 50.0  # 160 is a dog; 171 is none of the nine; 0 is a fish; a dog is no bird
    assert in9_accuracy(logits[:, :2], torch.tensor([3, 3, 3, 3]), torch.tensor([3, -1])) == 100.0
    with pytest.raises(UserError, match="has 10 classes and the map 1000"):
        in9_accuracy(torch.zeros(1, 10), torch.tensor([0]))


def test_backgrounds(encoder, classes, tmp_path):
    names = [f"{i:02d}_{name}" for i, name in enumerate(in9.CLASSES)]
    for variant in ("original", "mixed_same", "mixed_rand"):
        class_folders(tmp_path / variant / "val", names, 2)
    report = api.evaluate("backgrounds", encoder, train=classes / "train", test=tmp_path)
    sane(report, "backgrounds")
    assert (
        report.numbers["bg_gap"] == report.numbers["mixed_same"] - report.numbers["mixed_rand"]
        and report.protocol["mapped"] == 3
    )
    scorer = scorer_of(encoder, {"train": Folder(classes / "train")}, ScorerOptions())
    data = in9.read(tmp_path)["original"]
    seen = scorer.score(data, views.ResizeCenter((32, 32)))
    table = torch.tensor([8, 0, 0])  # the three classes of the bank
    right = (table[seen.scores.argmax(1)] == data.labels).double().mean()
    assert report.numbers["original"] == pytest.approx(100 * float(right))
    with pytest.raises(UserError, match="needs a classifier"):
        api.evaluate("backgrounds", encoder, test=tmp_path)


def test_backgrounds_by_a_probe(encoder, classes, tmp_path):
    from safetensors.torch import save_file

    class_folders(tmp_path / "original" / "val", [f"{i:02d}_{name}" for i, name in enumerate(in9.CLASSES)], 1)
    weight = torch.zeros(1000, 48)
    save_file(
        {"weight": weight, "bias": torch.eye(1000)[200]}, tmp_path / "probe.safetensors", metadata={"feature": "pooled"}
    )
    report = api.evaluate("backgrounds", encoder, test=tmp_path, probe=str(tmp_path / "probe.safetensors"))
    assert (
        report.numbers["original"] == pytest.approx(100 / 9) and report.protocol["classifier"] == "linear probe"
    )  # everything is a dog


def test_images_of_the_encoders_size_are_unchanged():
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    assert torch.equal(views.ResizeCenter((32, 32))(image, 0), image)


# masked


def test_masked(encoder, classes):
    report = api.evaluate(
        "masked",
        encoder,
        train=classes / "train",
        test=classes / "val",
        ratios=(0.0, 0.5),
        modes=("high", "low", "random"),
    )
    sane(report, "masked")
    assert report.numbers["high_0_drop"] == 0.0 and report.numbers["random_0_top1"] == report.numbers["top1"]
    again = api.evaluate(
        "masked",
        encoder,
        train=classes / "train",
        test=classes / "val",
        ratios=(0.0, 0.5),
        modes=("high", "low", "random"),
    )
    assert again.numbers == report.numbers
    with pytest.raises(UserError, match="guide=MODEL"):
        api.evaluate("masked", views.RawPixels(8), train=classes / "train", test=classes / "val")


def test_black_before_normalizing():
    """A masked pixel is -mean / std after normalization (AttMask, masked ImageNet)."""
    encoder = tiny_encoder()
    encoder.crop_pct = 1.0
    hidden = torch.zeros(1, 16, dtype=torch.bool)
    hidden[0, 5] = True
    view = views.MaskedOut(encoder.uint8_crop, hidden, (4, 4))
    image = torch.full((3, 32, 32), 200, dtype=torch.uint8)
    seen = view(image, 0)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (encoder.mean, encoder.std))
    normal = (seen.float() / 255 - mean) / std
    assert normal[:, 8:16, 8:16].amax(dim=(1, 2)).tolist() == pytest.approx([-2.1179, -2.0357, -1.8044], abs=5e-5)
    covered = torch.zeros(32, 32, dtype=torch.bool)
    covered[8:16, 8:16] = True
    assert (seen[:, ~covered] == 200).all() and (image == 200).all()


def test_most_attended_patches_are_blackened(encoder, classes):
    data = Folder(classes / "val")
    salience, grid = attention_of(encoder, data, encoder.uint8_crop, encoder, batch_size=4)
    assert grid == (4, 4) and salience.shape == (9, 16)
    alone = encoder(torch.stack([encoder.transform(data.image(0))]))
    assert torch.allclose(salience[0], alone.attention.mean(1)[0], atol=1e-6)
    noise = torch.rand(9, 16, dtype=torch.float64)
    high, low, random = (patch_mask(salience, 0.3, mode, noise) for mode in ("high", "low", "random"))
    assert high.sum(1).tolist() == low.sum(1).tolist() == random.sum(1).tolist() == [4] * 9  # int(.3 * 16)
    assert float(salience[high].min()) >= float(salience[~high].min()) and not (high & low).any()
    for row in range(9):
        assert salience[row][high[row]].min() >= salience[row][~high[row]].max()


# robustness


def test_robustness(encoder, classes, tmp_path):
    class_folders(tmp_path / "r", WNIDS[:2], 2)
    class_folders(tmp_path / "v2", ["0", "217", "254"], 2)  # numbers sort as text: 0, 217, 254
    assert [imagenet.synsets()[i] for i in (0, 217, 254)] == WNIDS
    (tmp_path / "real.json").write_text(json.dumps([[0], []] + [[217, 0]] * 10))
    shutil.copytree(classes / "val", tmp_path / "val")
    for path in sorted((tmp_path / "val").rglob("*_00000000.JPEG")):  # ImageNet counts from 1
        path.rename(path.with_name("ILSVRC2012_val_00000009.JPEG"))
    data = {"train": Folder(classes / "train"), "test": Folder(tmp_path / "val")}
    report = EVALUATIONS["robustness"](
        encoder, data, imagenet_r=tmp_path / "r", imagenet_v2=tmp_path / "v2", real=tmp_path / "real.json"
    )
    sane(report, "robustness")
    assert report.protocol["images"] == {"test": 9, "imagenet_r": 4, "imagenet_v2": 6, "real": 6}
    for name in ("imagenet_r", "imagenet_v2"):
        assert report.numbers[f"{name}_drop"] == pytest.approx(
            report.numbers[f"{name}_clean_top1"] - report.numbers[f"{name}_top1"]
        )
    with pytest.raises(UserError, match="no set to compare with the test images"):
        EVALUATIONS["robustness"](encoder, data)


def test_restriction_and_real_labels():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.8, 0.1, 0.2]])
    assert restricted(scores, torch.tensor([0, 2])).argmax(1).tolist() == [2, 0]
    assert real_accuracy(scores, [[0, 1], []]) == (100.0, 1) and real_accuracy(scores, [[0], [0, 2]]) == (50.0, 2)


# recall, retrieval, copies


def test_recall_on_birds_and_garments(encoder, tmp_path):
    birds = api.evaluate("recall", encoder, test=cub_on_disk(tmp_path / "cub"))
    sane(birds, "recall")
    assert set(birds.numbers) == {"recall_1", "recall_2", "recall_4"} and "101-200" in birds.protocol["split"]
    garments = api.evaluate("recall", encoder, test=inshop_on_disk(tmp_path / "inshop"))
    assert set(garments.numbers) == {"recall_1", "recall_10", "recall_20"} and garments.protocol["gallery"] == 3
    assert garments.numbers["recall_10"] == 100.0
    plain = api.evaluate("recall", encoder, test=tmp_path / "cub" / "CUB_200_2011" / "images", ks=(3,))
    assert set(plain.numbers) == {"recall_3"} and plain.protocol["preset"] is None


def test_retrieval(encoder, tmp_path):
    report = api.evaluate("retrieval", encoder, test=revisited(tmp_path), long_side=32)
    sane(report, "retrieval")
    assert {
        f"{variant}_{level}_map" for variant in ("official", "papers") for level in ("easy", "medium", "hard")
    } <= set(report.numbers)
    assert "not cropped" in report.protocol["variants"]["papers"]
    several = api.evaluate("retrieval", encoder, test=revisited(tmp_path / "b"), variants="papers", multi_scale=True)
    assert "official_easy_map" not in several.numbers and several.protocol["multi_scale"] == [1.0, 2**-0.5, 0.5]


def test_downscaled_keeps_aspect_never_enlarges_and_crops_to_patches():
    image = torch.randint(0, 256, (3, 60, 100), dtype=torch.uint8)
    assert views.Downscaled(50, (8, 8))(image, 0).shape == (3, 24, 48)  # 30 x 50, whole patches
    assert torch.equal(views.Downscaled(200, (4, 4))(image, 0), image)
    cut = views.Downscaled(200, (4, 4), boxes=((8, 4, 40, 36),))
    assert torch.equal(cut(image, 0), image[:, 4:36, 8:40])


def test_scales_average_raw_features(encoder):
    images = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        one, half = (
            encoder(images).pooled,
            encoder(torch.nn.functional.interpolate(images, scale_factor=0.5, mode="bilinear")).pooled,
        )
        both = views.Scales(encoder, (1.0, 0.5), (8, 8))(images).pooled
    assert torch.allclose(both, (one + half) / 2, atol=1e-6)


def test_ranking_by_cosine_with_ties_by_index():
    bank = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    assert ranking(bank, torch.tensor([[1.0, 0.1]])).T.tolist() == [[0, 2, 1]]
    assert ranking(bank, torch.tensor([[1.0, 0.1]]), torch.tensor([7, 8, 9])).T.tolist() == [[7, 9, 8]]


def test_copy_detection(encoder, tmp_path):
    data = copydays_on_disk(tmp_path / "copydays")
    report = api.evaluate("copy_detection", encoder, test=data)
    sane(report, "copy_detection")
    assert report.numbers["jpegqual/30_map"] > 50 and report.protocol["copies"] == {"jpegqual/30": 5, "strong": 5}
    for i in range(60):
        photograph(tmp_path / "others" / f"{i}.jpg", 500 + i)
    from maskwise.data.benchmark_sets import copydays

    more = copydays.read(data, distractors=tmp_path / "others", whitening=tmp_path / "others")
    white = EVALUATIONS["copy_detection"](encoder, more)
    assert white.protocol["whitening"] and white.protocol["distractors"] == 60 and white.protocol["database"] == 65


def test_generalized_mean():
    patches = torch.tensor([[[1.0, -3.0], [2.0, 0.0]]])
    assert gem(patches)[0].tolist() == pytest.approx([((1 + 16) / 2) ** 0.25, 1e-6], rel=1e-5)


def test_whitening_makes_the_covariance_the_identity():
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 3, generator=g) @ torch.randn(3, 5, generator=g) + 4  # rank 3 in 5 directions
    mean, turn = whitener(rows)
    white = ((rows - mean) @ turn).double()
    assert turn.shape == (5, 3) and torch.allclose(white.T @ white / 200, torch.eye(3, dtype=torch.float64), atol=1e-3)


# raw pixels as an encoder


def test_raw_pixels_in_every_protocol(classes, tmp_path):
    raw = views.RawPixels(8)
    assert (
        api.evaluate("knn", raw, train=classes / "train", test=classes / "val", feature="pooled").numbers["top1"]
        == 100.0
    )  # classes differ by color
    assert api.evaluate("recall", raw, test=classes / "val", ks=1).numbers["recall_1"] == 100.0
    assert api.evaluate("retrieval", raw, test=revisited(tmp_path)).numbers["papers_easy_map"] > 50


def test_class_pictures(encoder, classes):
    from maskwise.evaluation.features import extract
    from maskwise.evaluation.suite.class_charts import SAME_CLASS, class_pictures, feature_map, neighbor_sheet

    data = {role: Folder(classes / name) for role, name in (("train", "train"), ("test", "val"))}
    raw = views.RawPixels(8)
    train, test = (extract.extract(raw, data[role], "pooled") for role in ("train", "test"))
    pictures = class_pictures(train, test, data, raw.uint8_crop)
    assert set(pictures) == {"classes", "confusion", "neighbors", "map"}
    assert all(
        picture.dtype.name == "uint8" and picture.ndim == 3 and picture.shape[2] == 3 for picture in pictures.values()
    )
    sheet = neighbor_sheet(train, test, data, torch.tensor([0]), raw.uint8_crop, count=3)
    assert (
        (sheet == torch.tensor(SAME_CLASS).numpy()).all(-1).any()
    )  # classes differ by color, so the nearest are of the same
    pytest.importorskip("sklearn")
    assert feature_map(test.pooled, test.labels, ["a", "b", "c"], method="tsne").shape == pictures["map"].shape
    with pytest.raises(UserError, match="pca or tsne"):
        feature_map(test.pooled, test.labels, [], method="umap")
