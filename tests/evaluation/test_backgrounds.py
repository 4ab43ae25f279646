"""IN-9 with planted predictions: every variant has its own accuracy."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from maskwise import api
from maskwise.data.benchmark_sets import in9
from support.planted import Lookup

DOG, BIRD = 151, 7


@pytest.fixture
def challenge(tmp_path):
    """All variants on disk: of ten dogs, v + 1 are predicted as dogs in variant v."""
    for v, variant in enumerate(in9.VARIANTS):
        for k, name in enumerate(in9.CLASSES):
            (tmp_path / variant / "val" / f"{k:02d}_{name}").mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (8, 8), (i > v,) * 3).save(tmp_path / variant / "val" / "00_dog" / f"{i}.png")
    return tmp_path


def test_every_variant_is_scored_on_its_own_images(challenge):
    encoder = Lookup(torch.eye(1000)[[DOG, BIRD]])
    classifier = SimpleNamespace(encoder=encoder, head=nn.Identity(), feature="pooled", count=1000)
    numbers = api.evaluate("backgrounds", encoder, test=challenge, classifier=classifier).numbers
    expected = {name: 10.0 * (v + 1) for v, name in enumerate(in9.VARIANTS)}
    assert numbers == pytest.approx({**expected, "bg_gap": 30.0 - 40.0})
