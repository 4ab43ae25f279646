"""`Embedder`: scikit-learn's own checks, images of every kind, pipelines."""

import copy
import pickle

import numpy
import pytest
import torch
from PIL import Image

from maskwise.errors import UserError
from maskwise.nn import POOLINGS, Backbone, Encoder
from support.figures import Noise

pytest.importorskip("sklearn")

import maskwise  # noqa: E402


def build(**options):
    """A small encoder for images of 16 px, with weights that follow from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = {"image_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 12, "num_heads": 2}
        return Encoder(Backbone("vit_tiny_patch16_224", **network), POOLINGS["simpool"](12), **options).eval()


def checks():
    """scikit-learn's checks, with rows of any length as images of one row of pixels, in float64.

    They compare vectors within 1e-7, which float32 does not give for batches of other sizes.
    """
    from sklearn.utils.estimator_checks import estimator_checks_generator

    embedder = maskwise.Embedder(build().double(), image_shape=(1, -1), value_range=(-10, 10))
    expected = {
        "check_estimators_overwrite_params": "compares joblib's hashes, which differ between copies of a torch module",
        "check_array_api_input": "is skipped without SCIPY_ARRAY_API",
    }
    return list(estimator_checks_generator(embedder, mark="xfail", expected_failed_checks=expected))


@pytest.mark.parametrize(
    "embedder, check", checks(), ids=lambda value: getattr(getattr(value, "func", None), "__name__", "")
)
def test_checks_of_scikit_learn(embedder, check):
    check(embedder)


def test_the_expected_failure_is_that_of_joblib():
    joblib = pytest.importorskip("joblib")
    encoder = build()
    same = copy.deepcopy(encoder)
    assert all(torch.equal(one, other) for one, other in zip(encoder.parameters(), same.parameters()))
    assert joblib.hash(encoder) != joblib.hash(same)


def direct(encoder, images):
    with torch.no_grad():
        return encoder(torch.stack([encoder.transform(image) for image in images])).pooled.numpy()


def test_every_kind_of_images(tmp_path):
    import pandas

    encoder, noise = build(), Noise(3, side=20)
    pictures = [noise[index][0] for index in range(3)]
    arrays = numpy.stack([noise.array(index) for index in range(3)])
    paths = []
    for index, picture in enumerate(pictures):
        paths.append(str(tmp_path / f"{index}.png"))
        picture.save(paths[-1])
    tensors = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    expected, embedder = direct(encoder, pictures), maskwise.Embedder(encoder, batch_size=2)
    kinds = [pictures, arrays, tensors, tensors / 255, paths, numpy.array(paths), pandas.Series(paths), noise]
    for images in [*kinds, pandas.DataFrame({"file": paths})]:
        numpy.testing.assert_allclose(embedder.fit(images).transform(images), expected, rtol=1e-4, atol=1e-5)
    rows = maskwise.Embedder(encoder, image_shape=(20, 20, 3), value_range=(0, 510))
    halved = [Image.fromarray((array / 2).round().astype(numpy.uint8)) for array in arrays]
    given = numpy.stack([numpy.asarray(picture) for picture in halved]).astype(float) * 2
    numpy.testing.assert_allclose(rows.transform(given.reshape(3, -1)), direct(encoder, halved), rtol=1e-4, atol=1e-5)


def test_a_model_by_path_other_features_and_names(tmp_path):
    encoder, noise = build(), Noise(3, side=20)
    maskwise.export(encoder, tmp_path / "exported")
    embedder = maskwise.Embedder(str(tmp_path / "exported"), features="pooled+patch_mean")
    before = embedder.transform(noise)
    assert before.shape == (3, 24) and not hasattr(embedder, "encoder_")
    numpy.testing.assert_allclose(
        before[:, :12], direct(encoder, [noise[i][0] for i in range(3)]), rtol=1e-4, atol=1e-5
    )
    table = embedder.set_output(transform="pandas").fit_transform(noise)
    assert list(table.columns) == [f"embedder{index}" for index in range(24)]
    again = pickle.loads(pickle.dumps(embedder)).set_output(transform="default")
    assert numpy.array_equal(again.transform(noise), before)


def test_pipelines_and_cross_validation():
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline

    draws = numpy.random.default_rng(0)
    labels = numpy.arange(20) % 2
    bright = [Image.fromarray((draws.integers(0, 60, (20, 20, 3)) + 150 * label).astype("uint8")) for label in labels]
    pipeline = make_pipeline(maskwise.Embedder(build()), LogisticRegression(max_iter=500))
    assert (cross_val_predict(pipeline, bright, labels, cv=2) == labels).all()


@pytest.mark.parametrize(
    "options, images, line",
    [
        ({}, numpy.zeros((2, 12)), "give image_shape for rows of pixels"),
        ({}, "photo.jpg", "takes several images"),
        ({}, [Image.new("RGB", (8, 8)), "missing.png"], "1 of 2 images cannot be read (the first: missing.png"),
        ({"image_shape": (5, 5)}, numpy.zeros((2, 12)), "rows of 12 pixels are no images of image_shape=(5, 5)"),
        ({"features": "tokens"}, Noise(2), "tokens"),
        ({"model": None}, Noise(2), "give a model"),
    ],
)
def test_mistakes_are_one_line(options, images, line):
    with pytest.raises(UserError) as caught:
        maskwise.Embedder(**{"model": build(), **options}).transform(images)
    assert line in str(caught.value) and "\n" not in str(caught.value)
