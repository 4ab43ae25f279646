import os
import random
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

from maskwise import build
from maskwise.data.datasets.shapes import Shapes
from maskwise.data.decoding.image import CorruptImage
from maskwise.errors import UserError
from maskwise.evaluation.features import extract, fingerprints, reading
from maskwise.recipe.reading import read_recipe


@pytest.mark.parametrize("threads", [2, 3])
def test_features_do_not_depend_on_the_number_of_threads(threads, monkeypatch):
    """Neither on those that read images nor on torch's."""
    # 16 channels fill a vector of AVX-512; sums of fewer depend on how threads share them
    recipe = read_recipe("pretrain/cifar10_small_dino", "data=shapes", "backbone.channels=[16, 16, 16, 16]")
    encoder, images, found = build.encoder(recipe), Shapes(70, size=40), []
    before = torch.get_num_threads()
    for count in (1, threads):
        monkeypatch.setattr(extract, "read", partial(reading.read, threads=count))
        torch.set_num_threads(count)
        try:
            found.append(extract.extract(encoder, images, batch_size=32))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("pooled", "patch_mean"))


class Images:
    """Random images of different sizes; some cannot be read."""

    def __init__(self, n, broken=(), labels=True):
        self.n, self.broken = n, broken
        self.labels = torch.arange(n) % 4 if labels else None
        self.classes = None

    def __len__(self):
        return self.n

    def image(self, i):
        if i in self.broken:
            raise CorruptImage(self.name(i), "cut short")
        return torch.randint(
            0, 256, (3, 8 + i % 5, 9 + i % 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8
        )

    def name(self, i):
        return f"image{i}"

    def fingerprint(self):
        return f"images {self.n}"


class Net(torch.nn.Module):
    """Two patches; batch norm and dropout show whether the mode is right."""

    mean, std, dim = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3]), 6

    def __init__(self, same_size=True):
        super().__init__()
        self.layer, self.norm, self.drop = torch.nn.Linear(96, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5)
        self.same_size, self.seen = same_size, []

    def transform(self, image):
        return (image[:, :8, :8] if self.same_size else image).float() / 255

    def forward(self, images, mask=None, *, attention=True, keys=False, layers=()):
        self.seen.append((self.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), len(images)))
        patches = self.layer(images.flatten(1).view(len(images), 2, 96))
        patches = self.drop(self.norm(patches.transpose(1, 2)).transpose(1, 2))
        return type("Features", (), {"pooled": patches[:, 0], "patches": patches})()


def test_rows_equal_those_of_single_images():
    net, data = Net(), Images(11)
    bank = extract.extract(net, data, batch_size=4)
    net.eval()
    alone = [net(net.transform(data.image(i))[None]) for i in range(11)]
    assert torch.allclose(bank.pooled, torch.cat([features.pooled for features in alone]), atol=1e-6)
    assert torch.allclose(bank.patch_mean, torch.cat([features.patches.mean(1) for features in alone]), atol=1e-6)
    assert torch.equal(bank.labels, data.labels) and bank.index.tolist() == list(range(11))
    assert len(bank) == 11 and not bank.corrupt and bank.seconds > 0 and not bank.pooled.requires_grad
    assert extract.extract(net, data, "pooled").patch_mean is None


def test_modes_are_restored_and_weights_unchanged():
    net = Net()
    net.train()
    net.drop.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        extract.extract(net, Images(9), batch_size=4)
    assert net.training and net.norm.training and not net.drop.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.seen == [(False, False, False, 4), (False, False, False, 4), (False, False, False, 1)]


def test_modes_are_restored_after_a_failure():
    net, data = Net(), Images(4)
    net.train()
    data.image = lambda i: 1 / 0
    with pytest.raises(ZeroDivisionError):
        extract.extract(net, data)
    assert net.training and net.norm.training


def test_random_state_is_not_touched():
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    net = Net()
    before = state()
    extract.extract(net, Images(9), batch_size=2)
    extract.pixels(Images(9), 4)
    assert state() == before


def test_unreadable_images_are_left_out_and_listed():
    bank = extract.extract(Net(), Images(9, broken=(0, 4, 5)), batch_size=2)
    assert (
        bank.index.tolist() == [1, 2, 3, 6, 7, 8]
        and bank.labels.tolist() == [1, 2, 3, 2, 3, 0]
        and len(bank.pooled) == 6
    )
    assert bank.corrupt == {f"image{i}": "cut short" for i in (0, 4, 5)}
    with pytest.raises(UserError, match="none of the 3 images can be read .*cut short"):
        extract.extract(Net(), Images(3, broken=(0, 1, 2)))


FORKED = """
import os, threading
import torch
from maskwise.evaluation.features import extract

class Meeting:
    "Four readers that begin together."
    gate = threading.Barrier(4)

    def image(self, i):
        self.gate.wait(20)
        return torch.arange(40000) * 3

torch.set_num_threads(1)
torch.arange(40000) * 3
wrong = 0
for _ in range(40):
    child = os.fork()
    if not child:
        try:
            batches = extract.read(Meeting(), lambda image: image, torch.arange(4), 4, {}, threads=4)
            os._exit(sum(len(index) for index, _ in batches) != 4)
        finally:
            os._exit(1)
    wrong += os.waitpid(child, 0)[1] != 0
print(wrong)
"""


def test_forked_process_reads_images():
    """Torch rebuilds its thread pool after a fork; threads that need it at the same time once failed (seen in CI)."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "0", done.stdout + done.stderr[-2000:]


def test_sets_without_labels_have_features():
    assert extract.extract(Net(), Images(3, labels=False)).labels is None


def test_images_of_different_sizes_are_refused():
    with pytest.raises(UserError, match="different sizes"):
        extract.extract(Net(same_size=False), Images(6))


class Rank:
    """Rank r of 3; tensors given to `gather` are stored and joined by the test."""

    size = 3

    def __init__(self, rank):
        self.rank, self.parts = rank, []

    def gather(self, tensor):
        self.parts.append(tensor)
        return tensor

    def gather_objects(self, value):
        return [value]


def test_ranks_share_the_images_without_overlap():
    net, data = Net(), Images(10)
    ranks = [Rank(r) for r in range(3)]
    rows = torch.cat([extract.extract(net, data, "pooled", world=rank, batch_size=2).index for rank in ranks])
    assert rows.sort().values.tolist() == list(range(10))
    joined = torch.cat([rank.parts[0] for rank in ranks])[torch.argsort(rows)]
    assert torch.equal(
        joined, extract.extract(net, data, batch_size=2).pooled
    )  # whole batches are dealt to the ranks: equal bit for bit
    assert [rank.parts[1].tolist() for rank in ranks] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5]]


def test_pixels_are_resized_normalized_and_flat():
    data = Images(5)
    bank = extract.pixels(data, 8, mean=Net.mean, std=Net.std)
    assert bank.pooled.shape == (5, 192)
    same = Images(1)
    same.image = lambda i: torch.full((3, 4, 4), 102, dtype=torch.uint8)
    assert torch.allclose(
        extract.pixels(same, 2, mean=Net.mean, std=Net.std).pooled.view(3, 4)[:, 0],
        (0.4 - Net.mean) / Net.std,
        atol=1e-6,
    )


def test_fingerprint_depends_on_images_and_labels():
    data, other = Images(6), Images(6)
    other.labels = other.labels.flip(0)
    assert len({fingerprints.fingerprint(images) for images in (data, other, Images(7), Images(6, labels=False))}) == 4


def test_a_real_encoder_on_images_of_many_sizes():
    from maskwise.nn import POOLINGS, Encoder
    from maskwise.nn.backbones.factory import Backbone

    backbone = Backbone("vit_tiny_patch16_224", image_size=16, patch_size=8, depth=1, drop_path=0.5)
    encoder, data = Encoder(backbone, POOLINGS["cls"](backbone.dim)).train(), Images(6)
    state = torch.get_rng_state()
    bank = extract.extract(encoder, data, batch_size=4)
    assert encoder.training and torch.equal(state, torch.get_rng_state())
    assert bank.pooled.shape == bank.patch_mean.shape == (6, encoder.dim)
    alone = encoder.eval()(encoder.transform(data.image(5))[None])
    assert torch.allclose(bank.pooled[5], alone.pooled[0], atol=1e-5)
    assert torch.allclose(bank.patch_mean[5], alone.patches[0].mean(0), atol=1e-5)


def small(pooling="cls", **options):
    from maskwise.nn import POOLINGS, Backbone, Encoder

    torch.manual_seed(0)
    backbone = Backbone(
        "vit_tiny_patch16_224", image_size=16, patch_size=4, embed_dim=24, depth=5, num_heads=2, **options
    )
    return Encoder(backbone, POOLINGS[pooling](24)).eval()


def test_block_features_equal_those_of_the_blocks_in_turn():
    """cls4: class tokens of the last four blocks, each through the final norm, 4 x 24 wide (DINO, linear probe)."""
    encoder, data = small(reg_tokens=2), Images(3)
    names = (
        "cls4",
        "cls",
        "mean2",
        "pooled",
        "patch_mean",
        "pooled+patch_mean",
        "pooled~patch_mean",
        "patches",
        "keys",
        "attention",
    )
    bank = extract.extract(encoder, data, names, batch_size=2)
    backbone = encoder.backbone
    x = backbone._embed(torch.stack([encoder.transform(data.image(i)) for i in range(3)]), None, (4, 4))
    outputs = []
    with torch.no_grad():
        for block in backbone.blocks:
            x = block(x)
            outputs.append(encoder.norm(x))
    assert bank["cls4"].shape == (3, 96)
    close = lambda a, b: torch.allclose(a, b, atol=1e-5)  # noqa: E731
    assert close(bank["cls4"], torch.cat([tokens[:, 0] for tokens in outputs[-4:]], dim=1))
    assert close(bank["cls"], outputs[-1][:, 0]) and close(bank["cls"], bank["pooled"])
    assert close(bank["mean2"], torch.cat([tokens[:, 3:].mean(1) for tokens in outputs[-2:]], dim=1))
    assert close(bank["pooled+patch_mean"], torch.cat([bank["pooled"], bank["patch_mean"]], dim=1))
    assert close(bank["pooled~patch_mean"][:, ::2], bank["pooled"]) and close(
        bank["pooled~patch_mean"][:, 1::2], bank["patch_mean"]
    )
    assert (
        close(bank["patches"].mean(1), bank["patch_mean"])
        and bank["keys"].shape == (3, 16, 24)
        and bank["attention"].shape == (3, 2, 16)
    )


@pytest.mark.parametrize(
    "name, reason",
    [
        ("cls4", "needs a class token"),
        ("mean6", "needs 6 blocks"),
        ("poled", "no feature 'poled'"),
        ("pooled+", "no feature"),
        ("cls0", "no feature"),
    ],
)
def test_unavailable_features_are_refused(name, reason):
    with pytest.raises(UserError, match=reason):
        extract.extract(small("simpool", class_token=False), Images(2), name)


def test_view_replaces_the_transform():
    encoder, data = small(), Images(5)
    dark = extract.extract(
        encoder, data, "pooled", view=lambda image, i: torch.full((3, 16, 16), 8 * i, dtype=torch.uint8)
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    inputs = torch.stack([(torch.full((3, 16, 16), 8 * i) / 255 - mean) / std for i in range(5)])
    with torch.no_grad():
        assert torch.allclose(dark.pooled, encoder(inputs).pooled, atol=1e-5)


def test_bf16_is_close_and_stored_as_bfloat16():
    encoder, data = small(), Images(6)
    full, half = (extract.extract(encoder, data, "pooled", precision=name).pooled for name in ("fp32", "bf16"))
    assert half.dtype == torch.bfloat16 and full.dtype == torch.float32
    assert 0 < (half.float() - full).abs().max() < 0.1
    with pytest.raises(UserError, match="precision='half'"):
        extract.extract(encoder, data, precision="half")


def test_streaming_keeps_the_gradient_mode_of_the_caller():
    encoder = small().train()
    for index, images, features in extract.stream(
        encoder, Images(5), rows=torch.tensor([4, 1, 3]), batch_size=2, layers=(-1,)
    ):
        assert torch.is_grad_enabled() and not features.pooled.requires_grad and not encoder.training
        assert images.shape == (len(index), 3, 16, 16) and len(features.layers) == 1
    assert encoder.training and index.tolist() == [3]


def test_weights_fingerprint_covers_settings_but_not_mode():
    same, other = small(), small()
    assert fingerprints.weights_fingerprint(same) == fingerprints.weights_fingerprint(other.train())
    other.norm.eps = 1e-5
    assert fingerprints.weights_fingerprint(same) != fingerprints.weights_fingerprint(other)
