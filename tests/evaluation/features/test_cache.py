"""Feature cache: reuse, invalidation by weights, transform, data and precision, resumption, damaged files."""

import logging
import os

import pytest
import torch
from PIL import Image

from maskwise.data.datasets.folder import Folder
from maskwise.data.datasets.subset import Subset
from maskwise.errors import UserError
from maskwise.evaluation.features import cache as feature_store
from maskwise.evaluation.features import extract
from maskwise.nn import POOLINGS, Backbone, Encoder


def encoder(pooling="simpool", seed=0, **options):
    torch.manual_seed(seed)
    backbone = Backbone("vit_tiny_patch16_224", image_size=16, patch_size=8, embed_dim=24, depth=3, num_heads=2)
    return Encoder(backbone, POOLINGS[pooling](24, **options))


@pytest.fixture
def folder(tmp_path):
    for i in range(11):
        (tmp_path / "images" / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (18, 20, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"class{i % 3}" / f"{i:02d}.bmp")
    return tmp_path / "images"


def origins(*arguments, **options):
    return extract.extract(*arguments, batch_size=4, **options).origin


def test_cached_features_equal_computed_ones_and_are_memory_mapped(folder, tmp_path):
    net, data, names = encoder(), Folder(folder), ("pooled", "mean2", "patches", "keys", "pooled+patch_mean")
    plain = extract.extract(net, data, names, batch_size=4)
    for expected in ("computed", "cached"):
        bank = extract.extract(net, data, names, batch_size=4, cache=tmp_path / "cache")
        assert bank.origin == dict.fromkeys(names, expected)
        assert all(torch.equal(bank[name], plain[name]) for name in names) and torch.equal(bank.labels, data.labels)
    assert bank["keys"].shape == (11, 4, 24) and bank["mean2"].shape == (11, 48)
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps") as maps:
            assert str(next((tmp_path / "cache").glob("*/keys/rows.bin"))) in maps.read()
    assert not list((tmp_path / "cache").glob("*/parts-*"))


def test_only_missing_features_are_computed(folder, tmp_path):
    net, data, cache = encoder(), Folder(folder), tmp_path / "cache"
    assert origins(net, data, "pooled", cache=cache) == {"pooled": "computed"}
    assert origins(net, data, ("pooled", "mean2"), cache=cache) == {"pooled": "cached", "mean2": "computed"}


def test_every_change_of_inputs_computes_features_again(folder, tmp_path):
    net, data, cache = encoder(), Folder(folder), tmp_path / "cache"
    assert origins(net, data, "pooled", cache=cache)["pooled"] == "computed"
    assert origins(net, data, "pooled", cache=cache, precision="bf16")["pooled"] == "computed"
    assert (
        origins(encoder(gamma=2.0), data, "pooled", cache=cache)["pooled"] == "computed"
    )  # no weight differs, only a setting
    with torch.no_grad():
        net.backbone.blocks[1].mlp.fc1.weight[0, 0] += 1e-6
    assert origins(net, data, "pooled", cache=cache)["pooled"] == "computed"
    net.crop_pct = 1.0
    assert origins(net, data, "pooled", cache=cache)["pooled"] == "computed"
    net.mean = (0.5, 0.5, 0.5)
    assert origins(net, data, "pooled", cache=cache)["pooled"] == "computed"
    assert origins(net, Subset(data, [0, 1, 2]), "pooled", cache=cache)["pooled"] == "computed"
    assert origins(net, Subset(data, [0, 1, 3]), "pooled", cache=cache)["pooled"] == "computed"
    assert origins(net, data, "pooled", cache=cache)["pooled"] == "cached"
    before = extract.extract(net, data, "pooled", batch_size=4, cache=cache)
    name = data.root / data.files[0]
    size = name.stat().st_size
    Image.new("RGB", (20, 18), (200, 10, 10)).save(name)
    assert name.stat().st_size == size  # an uncompressed file keeps its size, and so the set its fingerprint
    after = extract.extract(net, Folder(folder), "pooled", batch_size=4, cache=cache)
    assert (
        after.origin == {"pooled": "computed"}
        and not torch.equal(after.pooled[0], before.pooled[0])
        and torch.equal(after.pooled[1:], before.pooled[1:])
    )
    data.labels = data.labels.flip(0)
    assert origins(net, data, "pooled", cache=cache)["pooled"] == "computed"


@pytest.mark.parametrize("file", ["rows.bin", "index.bin", "meta.json"])
def test_damaged_file_is_reported_and_computed_again(folder, tmp_path, caplog, file):
    net, data, cache = encoder(), Folder(folder), tmp_path / "cache"
    whole = extract.extract(net, data, "pooled", batch_size=4, cache=cache).pooled.clone()
    path = next(cache.glob(f"*/pooled/{file}"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, logger="maskwise"):
        bank = extract.extract(net, data, "pooled", batch_size=4, cache=cache)
    assert bank.origin == {"pooled": "damaged, computed again"} and torch.equal(bank.pooled, whole)
    assert len(caplog.messages) == 1 and "damaged" in caplog.messages[0] and "\n" not in caplog.messages[0]
    assert origins(net, data, "pooled", cache=cache) == {"pooled": "cached"}


def test_interrupted_extraction_resumes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "PART", 4)
    net, data, cache = encoder(), Folder(folder), tmp_path / "cache"
    whole = extract.extract(net, data, "pooled", batch_size=4)
    read = data.image
    data.image = lambda i: read(i) if i < 8 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        extract.extract(net, data, "pooled", batch_size=4, cache=cache)
    parts = sorted(cache.glob("*/parts-*/*.safetensors"))
    assert len(parts) == 2
    parts[1].write_bytes(parts[1].read_bytes()[:-3])  # truncated: computed again
    seen = []
    data.image = lambda i: seen.append(i) or read(i)
    bank = extract.extract(net, data, "pooled", batch_size=4, cache=cache)
    assert (
        sorted(seen) == list(range(4, 11))
        and bank.origin == {"pooled": "resumed"}
        and torch.equal(bank.pooled, whole.pooled)
    )


def test_unreadable_images_are_stored_in_the_cache(folder, tmp_path):
    data = Folder(folder)
    (data.root / data.files[4]).write_bytes(b"BM nothing")
    plain = extract.extract(encoder(), Folder(folder), "pooled", batch_size=4)
    for _ in range(2):
        bank = extract.extract(encoder(), Folder(folder), "pooled", batch_size=4, cache=tmp_path / "cache")
        assert (
            torch.equal(bank.pooled, plain.pooled)
            and list(bank.corrupt) == [data.files[4]]
            and 4 not in bank.index
            and len(bank.labels) == 10
        )


def test_unwritable_cache_and_view_without_fingerprint_are_refused(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"cannot write the feature cache .* \(Not a directory\): .*, or give another cache=FOLDER"
    ):
        extract.extract(encoder(), Folder(folder), "pooled", cache=tmp_path / "file" / "below")
    with pytest.raises(UserError, match="fingerprint"):
        extract.extract(
            encoder(),
            Folder(folder),
            "pooled",
            cache=tmp_path / "cache",
            view=lambda image, i: image[:, :16, :16].float(),
        )
