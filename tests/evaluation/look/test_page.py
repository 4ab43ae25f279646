"""The page as a file: its data decoded here, its size, and that nothing of it comes from elsewhere."""

import base64
import json
import re
import zlib

import numpy as np
import pytest
import torch

from maskwise.evaluation.look import page as pages
from maskwise.evaluation.look.codes import colors
from maskwise.evaluation.look.maps import maps_of
from maskwise.evaluation.look.page import Settings, pack, page, quantized, steps
from support.looked import image, vit


@pytest.fixture(scope="module")
def made():
    """Maps of two images and the page of both."""
    encoder = vit()
    maps = [
        maps_of(encoder, image(48, 80), "a </script> & b.png", 0, side=64),
        maps_of(encoder, image(64, 48, 3), "c.png", 1, side=64),
    ]
    packed = [pack(each, 2) for each in maps]
    return maps, packed, page(packed, Settings("of <b>", "about & more"))


def data_of(text):
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.S)[1])


def arrays_of(facts):
    raw = zlib.decompress(base64.b64decode(facts["bytes"]))
    return {name: np.frombuffer(raw, np.uint8, size, start) for name, (start, size) in facts["arrays"].items()}


def test_maps_masks_and_colors_are_read_back(made):
    maps, packed, text = made
    data = data_of(text)
    for each, codes, colored, facts in zip(maps, packed, colors([p.codes for p in packed]), data["images"]):
        patches, arrays = len(each.tokens), arrays_of(facts)
        stored = arrays["maps"].reshape(-1, patches).astype(float)
        values = np.array(facts["map_scales"])[:, None] * (stored / 255) ** 2
        true = torch.cat([torch.cat([layer.merged[None], layer.heads]) for layer in each.layers]).numpy()
        assert values.shape == true.shape == (9, patches)
        assert (np.abs(values - true) <= true.max(axis=1, keepdims=True) * 0.0045).all()
        assert (np.abs(values - true) <= 0.07 * true + 1e-3 * true.max(axis=1, keepdims=True)).all()
        assert np.array_equal(arrays["codes"].view(np.int8).reshape(patches, -1), codes.codes.values.numpy())
        assert np.array_equal(arrays["colors"].reshape(-1, 3), colored.numpy())
        for name, mask in each.masks.items():
            bits = np.unpackbits(arrays[f"mask_{name}"].reshape(101, -1), axis=1)[:, :patches]
            assert np.array_equal(np.bitwise_xor.accumulate(bits, axis=0).astype(bool), mask.numpy()), name
        assert facts["boxes"] == {name: pytest.approx(box, abs=0.01) for name, box in each.boxes.items()}
    assert data["images"][0]["name"] == "a </script> & b.png"


def test_the_page_is_one_file_without_addresses(made):
    text = made[2]
    assert text.count("</script>") == 2 and "<title>of &lt;b&gt;</title>" in text and "about &amp; more" in text
    assert "{{" not in text
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", text) + re.findall(r"url\(([^)]*)", text)
    assert [link for link in links if not link.startswith("data:")] == []
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}  # a name, never loaded
    assert not re.search(r"\b(fetch|XMLHttpRequest|import)\s*\(", text)


def test_blocks_and_directions_are_cut_to_the_bytes_of_a_page(made, monkeypatch):
    each = made[0][0]
    patches = len(each.tokens)
    monkeypatch.setattr(pages, "MAP_BYTES", 2 * patches * 7)  # two images: seven maps each, a layer has three
    monkeypatch.setattr(pages, "CODE_BYTES", 2 * patches * 20)
    packed = pack(each, 2)
    assert [layer["title"] for layer in packed.facts["layers"]] == ["block 2", "block 3"]
    assert packed.arrays["codes"].shape == (patches, 20) and packed.arrays["maps"].shape == (6, patches)
    monkeypatch.setattr(pages, "MAP_BYTES", 0)
    assert [layer["title"] for layer in pack(each, 2).facts["layers"]] == ["block 3"]


def test_many_images_of_a_real_grid_stay_small():
    """Twelve images of 14 x 14 patches, three blocks of two heads: about 30 kB each."""
    encoder = vit(size=224, patch=16)
    packed = [pack(maps_of(encoder, image(90, 96, number), str(number), number), 12) for number in range(3)]
    text = page(packed, Settings("t", "a"))
    fixed = len(page(packed[:1], Settings("t", "a"))) - len(json.dumps(data_of(page(packed[:1], Settings("t", "a")))))
    assert fixed < 40_000 and (len(text) - fixed) / 3 < 45_000


def test_quantization_keeps_zero_the_maximum_and_an_empty_map():
    values, scales = quantized(torch.tensor([[0.0, 0.25, 1.0], [0.0, 0.0, 0.0]]))
    assert values.tolist() == [[0, 128, 255], [0, 0, 0]] and scales[0] == 1
    assert steps(torch.tensor([[True, False], [True, True]])).tolist() == [[128], [64]]
