"""Public functions: images and datasets of every kind that they take, one line for others."""

import numpy as np
import pytest
import torch
from PIL import Image

from export.folder.test_folder import build
from maskwise import api
from maskwise.errors import UserError
from maskwise.imaging.panels import HEADING, MARGIN

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def test_look_takes_files_pictures_arrays_and_tensors(tmp_path):
    encoder, picture = build(), Image.fromarray(PIXELS)
    picture.save(tmp_path / "photo.png")
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    singles = [str(tmp_path / "photo.png"), tmp_path / "photo.png", picture, PIXELS, tensor]
    several = [[tmp_path / "photo.png"], [picture], tensor[None]]
    sheets = [
        np.array(Image.open(api.look(encoder, images, tmp_path / f"{i}.png")))
        for i, images in enumerate(singles + several)
    ]
    below = MARGIN + HEADING  # files are headed by their names
    assert len({sheet[below:].tobytes() for sheet in sheets}) == 1
    assert np.array_equal(sheets[0], sheets[1]) and np.array_equal(sheets[2], sheets[4])
    crops = {
        api.look(encoder, images, tmp_path / "crops.png", masking="random").read_bytes() for images in singles + several
    }
    assert len(crops) == 1
    api.look(encoder, [tensor / 255, PIXELS[..., 0]], tmp_path / "mixed.png")
    assert Image.open(tmp_path / "mixed.png").height > Image.open(tmp_path / "0.png").height


def test_look_names_a_file_that_is_missing_or_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="nowhere.jpg is not a file"):
        api.look(build(), tmp_path / "nowhere.jpg", tmp_path / "x.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/x.png \("):
        api.look(build(), PIXELS, tmp_path / "file" / "x.png")


def test_other_images_are_refused_in_one_line():
    for images, kind in (([PIXELS], "list"), (7, "int")):
        with pytest.raises(UserError, match=f"images are a folder, a list file, or a dataset .* this is a {kind}"):
            api.evaluate("knn", build(), train=images, test=images)
    scalars = torch.utils.data.TensorDataset(torch.zeros(2))
    with pytest.raises(UserError, match=r"dataset\[0\]: an image is \[C, H, W\]"):
        api.evaluate("knn", build(), train=scalars, test=scalars)
