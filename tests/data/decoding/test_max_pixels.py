"""data.max_pixels: checked when the recipe is read, applied by every dataset, training and evaluations."""

import numpy as np
import pytest
from PIL import Image

from data.datasets.test_tar import pack, png
from maskwise import build
from maskwise.data.datasets import DATASETS, Folder
from maskwise.data.decoding.image import MAX_PIXELS, CorruptImage
from maskwise.data.loader import batches
from maskwise.data.multicrop import MultiCrop
from maskwise.errors import UserError
from maskwise.recipe.reading import read_recipe

CROPS = MultiCrop(global_size=8, local_size=4, local_number=1)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    for k, size in enumerate([(20, 20), (40, 20), (20, 21), (10, 10)]):
        Image.fromarray(np.full((*size, 3), 30 * k, np.uint8)).save(tmp_path / "a" / f"{k}.png")
    return tmp_path / "a"


def test_the_key_reaches_the_dataset_and_has_bounds(folder):
    recipe = read_recipe(
        "debug/tiny", "data=folder", f"data.path={folder}", "evaluate.knn_every=0", "data.max_pixels=400"
    )
    assert build.dataset(recipe).max_pixels == 400
    assert (
        read_recipe("debug/tiny", "data=folder", f"data.path={folder}", "evaluate.knn_every=0").values[
            "data.max_pixels"
        ]
        == MAX_PIXELS
    )
    for value in (0, 200_000_000):
        with pytest.raises(UserError, match=r"data.max_pixels: must be from 1 to 178956970"):
            read_recipe("debug/tiny", "data=folder", f"data.path={folder}", f"data.max_pixels={value}")


@pytest.mark.parametrize("name", ["folder", "list", "tar", "sixteen"])
def test_larger_images_are_unreadable_in_every_dataset(folder, name):
    if name == "list":
        (folder / "l.txt").write_text("".join(f"{k}.png\n" for k in range(4)))
        data = DATASETS["list"](folder / "l.txt", max_pixels=400)
    elif name == "tar":
        data = DATASETS["tar"](
            pack(
                folder / "a.tar",
                {f"{k}.png": png(k, size) for k, size in enumerate([(20, 20), (40, 20), (20, 21), (10, 10)])},
            ),
            max_pixels=400,
        )
    else:
        data = Folder(folder, max_pixels=400, bits=16 if name == "sixteen" else 8)
    for index, readable in enumerate((True, False, False, True)):
        if readable:
            assert data.image(index).shape[0] == 3
        else:
            with pytest.raises(CorruptImage, match="pixels are more than data.max_pixels=400"):
                data.image(index)
    if name != "sixteen":
        stream = batches(data, CROPS, batch_size=4, total_steps=1, cache="none")
        assert next(stream).replaced == 2 and len(stream.corrupt) == 2
