"""Supervised crops: box, policy, views, jitter, erasing and mixing, against Pillow and timm."""

import numpy as np
import pytest
import torch
from PIL import Image

from maskwise.data.augmentation import color
from maskwise.data.augmentation import random_erasing as erasing
from maskwise.data.augmentation.mixup import MixupCutMix
from maskwise.data.augmentation.supervised_crop import SupervisedCrop
from maskwise.data.augmentation.timm_policies import make_policy, patch_posterize, posterize
from maskwise.data.loader import batches, epoch_order
from maskwise.errors import UserError
from maskwise.functional import keyed_random

RAND = "rand-m9-mstd0.5-inc1"


def picture(seed=0, height=40, width=52):
    coarse = torch.randint(0, 256, (3, 6, 7), generator=torch.Generator().manual_seed(seed)).float()
    return (
        torch.nn.functional.interpolate(coarse[None], (height, width), mode="bicubic").clamp(0, 255)[0].to(torch.uint8)
    )


def crop(samples=(3,), epoch=1, images=None, **options):
    options = {"size": 32, "jitter": 0.0, **options}
    return SupervisedCrop(**options).batch(images or [picture(k) for k in samples], list(samples), epoch)


class Pictures:
    """Hold twenty images in memory, in four classes."""

    labels = torch.arange(20) % 4

    def __len__(self):
        return 20

    def image(self, i):
        return picture(i)

    def name(self, i):
        return str(i)


def test_crop_equals_pillow():
    maker = SupervisedCrop(size=32, jitter=0.0)
    boxes, flips = maker.boxes(maker.sample_uniforms(torch.tensor([3]), 1), [(40, 52)])
    top, left, height, width = boxes[0, 0].tolist()
    image = Image.fromarray(picture(3).permute(1, 2, 0).numpy()).resize(
        (32, 32), Image.BICUBIC, box=(left, top, left + width, top + height)
    )
    expected = (
        np.asarray(image.transpose(Image.FLIP_LEFT_RIGHT) if flips[0, 0] else image).transpose(2, 0, 1).astype(int)
    )
    result = crop()[0][0].numpy().astype(int)
    assert np.abs(result - expected).max() <= 8 and np.abs(result - expected).mean() < 0.6


@pytest.mark.parametrize("size", [(24, 40), (40, 24)])
def test_crop_that_is_not_square_equals_timm(size):
    """timm's RandomResizedCropAndInterpolation resizes the box to (h, w); its policies take the shorter side."""
    maker = SupervisedCrop(size=size, jitter=0.0, splits=2)
    boxes, flips = maker.boxes(maker.sample_uniforms(torch.tensor([3]), 1), [(40, 52)])
    top, left, height, width = boxes[0, 0].tolist()
    image = Image.fromarray(picture(3).permute(1, 2, 0).numpy()).crop((left, top, left + width, top + height))
    expected = image.resize(size[::-1], Image.BICUBIC)
    expected = np.asarray(expected.transpose(Image.FLIP_LEFT_RIGHT) if flips[0, 0] else expected).transpose(2, 0, 1)
    crops, local, _ = crop(size=size, splits=2)
    assert crops.shape == (2, 3, *size) and not len(local) and maker.pixels == 2 * 24 * 40
    assert np.abs(crops[0].numpy().astype(int) - expected.astype(int)).max() <= 3
    with keyed_random.seed_scope(int(keyed_random.make_key(49, 0, 1, 3, 0))):
        policy = make_policy(RAND, 24, (0.485, 0.456, 0.406), "bicubic")
        changed = policy(Image.fromarray(crops[0].permute(1, 2, 0).numpy()))
    assert torch.equal(crop(size=size, policy=RAND)[0][0], torch.from_numpy(np.array(changed)).permute(2, 0, 1))


def test_policies_get_the_shorter_side_as_in_timm(monkeypatch):
    seen = []
    module = "maskwise.data.augmentation.supervised_crop.make_policy"
    monkeypatch.setattr(module, lambda name, size, mean, interpolation: seen.append(size))
    for size in (32, (24, 40), (40, 24)):
        SupervisedCrop(size=size, policy=RAND)
    assert seen == [32, 24, 24]


def test_area_lies_within_its_bounds():
    maker = SupervisedCrop(size=8, scale=(0.2, 0.5))
    boxes, _ = maker.boxes(maker.sample_uniforms(torch.arange(500), 0), [(400, 500)] * 500)
    share = boxes[:, 0, 2] * boxes[:, 0, 3] / 200_000
    assert 0.19 < share.min() < 0.25 and 0.45 < share.max() < 0.51


def test_policy_equals_timm_on_the_crop():
    plain, changed = crop()[0][0], crop(policy=RAND)[0][0]
    with keyed_random.seed_scope(int(keyed_random.make_key(49, 0, 1, 3, 0))):
        expected = make_policy(RAND, 32, (0.485, 0.456, 0.406), "bicubic")(
            Image.fromarray(plain.permute(1, 2, 0).numpy())
        )
    assert torch.equal(changed, torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    assert any(not torch.equal(crop((k,), policy=RAND)[0], crop((k,))[0]) for k in range(3))


def test_posterization_to_zero_bits_is_black():
    """Check magnitude 10, where timm requests 0 bits, which Pillow refuses."""
    from timm.data.auto_augment import AugmentOp

    image = Image.fromarray(picture().permute(1, 2, 0).numpy())
    assert not np.asarray(posterize(image, 0)).any() and np.array_equal(
        np.asarray(posterize(image, 8)), np.asarray(image)
    )
    assert np.array_equal(np.asarray(posterize(image, 3)), np.asarray(image) & 0b11100000)
    for name in ("rand-m10-n13-p1.0-inc1", "augmix-m10", "original"):
        policy = make_policy(name, 32, (0.5,) * 3, "bicubic")
        operations = getattr(policy, "ops", None) or [
            operation for sub_policy in policy.policy for operation in sub_policy
        ]
        assert any(operation.aug_fn is posterize for operation in operations)
    policy.policy = [[AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10)]]
    assert not np.asarray(patch_posterize(policy)(image)).any()


@pytest.mark.parametrize("policy", [None, RAND, "augmix-m3-w3", "original"])
def test_views_depend_on_sample_and_epoch_only(policy):
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    whole = crop((3, 8, 5), policy=policy, splits=2, interpolation="random")[0]
    alone = crop((8,), policy=policy, splits=2, interpolation="random")[0]
    assert torch.equal(whole[1::3], alone)
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert not torch.equal(alone, crop((8,), 2, policy=policy, splits=2)[0])


def test_first_of_several_views_has_no_policy_and_no_erasing():
    crops, local, params = crop((3, 8), policy=RAND, splits=3, erasing=1.0, skip_first=True)
    assert crops.shape == (6, 3, 32, 32) and not len(local)
    assert torch.equal(crops[:2], crop((3, 8))[0])
    assert sorted(params.erased.rows.tolist()) == [2, 3, 4, 5]
    jittered = crop((3, 8), splits=3, jitter=0.4)[2].global_
    assert jittered.jitter.tolist() == [False, False, True, True, True, True] and "hue" not in {
        step[0] for step in jittered.plan.steps
    }


def test_color_jitter_does_not_shift_the_hue():
    crops, _, params = crop((3,), jitter=0.4)
    moved = color.recolor(crops, params.global_)
    assert not torch.equal(moved, crops.float()) and {step[0] for step in params.global_.plan.steps} == {
        "brightness",
        "contrast",
        "saturation",
    }
    crops, _, params = crop((3,), jitter=0.0)
    assert torch.equal(color.recolor(crops, params.global_), crops.float())


def test_erasing_of_crops_that_are_not_square_equals_a_loop():
    height, width, samples = 24, 40, torch.arange(300)
    drawn = erasing.sample(samples, 2, 1, (height, width), 1.0, seed=1)
    keys = keyed_random.make_key(erasing.STREAM, 1, 2, samples, torch.zeros(300, dtype=torch.int64))
    expected = []
    for row, u in enumerate(keyed_random.uniform(keys, 23).tolist()):
        for area, aspect in zip(u[3::2], u[4::2]):
            area, aspect = height * width * (0.02 + (1 / 3 - 0.02) * area), 0.3 ** (1 - 2 * aspect)
            h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if h < height and w < width:
                expected.append([row, int(u[1] * (height - h + 1)), int(u[2] * (width - w + 1)), h, w])
                break
    assert torch.cat([drawn.rows[:, None], drawn.boxes], 1).tolist() == expected
    assert any(w > height for *_, w in expected)


def test_erasing_against_its_definition():
    samples, size = torch.arange(4000), 32
    drawn = erasing.sample(samples, 0, 1, size, 0.25, seed=1)
    assert abs(len(drawn.rows) / 4000 - 0.25) < 0.03
    top, left, tall, wide = drawn.boxes.unbind(1)
    share, aspect = tall * wide / size**2, tall / wide
    assert (
        (top + tall <= size).all()
        and (left + wide <= size).all()
        and share.min() > 0.01
        and share.max() < 0.36
        and aspect.min() < 0.4
        and aspect.max() > 2.5
    )
    again = erasing.sample(samples[100:], 0, 1, size, 0.25, seed=1)
    keep = drawn.rows >= 100
    assert torch.equal(again.boxes, drawn.boxes[keep]) and torch.equal(again.keys, drawn.keys[keep])
    assert erasing.sample(samples, 0, 1, size, 0.0) is None


@pytest.mark.parametrize("mode", erasing.MODES)
def test_only_the_erased_box_is_overwritten(mode):
    drawn = erasing.sample(torch.arange(40), 3, 1, 32, 0.9)
    images = torch.full((40, 3, 32, 32), 7.0)
    erasing.erase(images, drawn, mode)
    for row, (top, left, tall, wide) in zip(drawn.rows.tolist(), drawn.boxes.tolist()):
        inside = images[row, :, top : top + tall, left : left + wide].clone()
        assert (inside != 7).all() and len(inside[0].unique()) == (1 if mode != "pixel" else tall * wide)
        images[row, :, top : top + tall, left : left + wide] = 7.0
    assert (images == 7).all()


def test_noise_is_normal():
    result = erasing.normal(torch.arange(20), 3001)
    assert (
        result.shape == (20, 3001)
        and abs(result.mean()) < 0.02
        and abs(result.std() - 1) < 0.02
        and abs((result**4).mean() - 3) < 0.2
    )
    assert torch.equal(erasing.normal(torch.arange(5, 6), 3001)[0], result[5])


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "prob": 0.7}])
def test_mixing_equals_timm_on_neighboring_pairs(options):
    from timm.data import Mixup

    theirs = Mixup(
        options.get("mixup", 0.0),
        options.get("cutmix", 0.0),
        prob=options.get("prob", 1.0),
        label_smoothing=0.1,
        num_classes=5,
    )
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    order = torch.tensor([0, 2, 4, 5, 3, 1])  # timm pairs the first with the last
    kinds = set()
    for key in range(12):
        with keyed_random.seed_scope(key):
            expected, soft = theirs(images[order].clone(), labels[order])
        result, targets = MixupCutMix(5, smoothing=0.1, **options)(images.clone(), labels, key)
        torch.testing.assert_close(result[order], expected)
        torch.testing.assert_close(targets[order], soft)
        kinds.add(MixupCutMix(5, **options).sample(key, (8, 8))[1] is None)
    assert len(kinds) == (1 if len(options) == 1 else 2)


def test_mixing_by_hand():
    mix = MixupCutMix(3, mixup=1.0)
    share, box = mix.sample(5, (2, 2))
    images, targets = mix(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2).clone(), torch.tensor([0, 2]), 5)
    assert box is None and torch.allclose(images[0], torch.tensor(share + 3 * (1 - share)))
    assert torch.allclose(targets, torch.tensor([[share, 0, 1 - share], [1 - share, 0, share]]))
    with pytest.raises(UserError, match="3 images cannot be mixed in pairs"):
        mix(torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 2]), 5)


def test_repeats_share_a_batch_and_are_never_neighbors():
    order = epoch_order(7, 2, 20, 6, 3)
    assert len(order) == 18 and len(order.unique()) == 18  # a copy is a sample of its own
    for batch in order.view(-1, 6):
        images = batch % 20
        assert len(images.unique()) == 2 and (images.view(-1, 2)[:, 0] != images.view(-1, 2)[:, 1]).all()
        assert sorted((batch // 20).tolist()) == [0, 0, 1, 1, 2, 2]
    assert torch.equal(epoch_order(7, 2, 20, 6), keyed_random.order(7, 2, 20))


@pytest.mark.parametrize("repeats", [1, 2])
def test_batches_are_the_same_for_any_number_of_ranks_and_workers(repeats):
    options = {"batch_size": 8, "total_steps": 4, "seed": 3, "repeats": repeats}
    maker = SupervisedCrop(size=16, policy=RAND, erasing=0.5, splits=1)
    whole = list(batches(Pictures(), maker, **options))
    assert [batch.step for batch in whole] == [0, 1, 2, 3] and all(
        torch.equal(batch.labels, batch.index % 20 % 4) for batch in whole
    )
    if repeats > 1:  # copies of an image get different crops
        first, second = (
            whole[0].global_crops[(whole[0].index == sample).nonzero()[0, 0]]
            for sample in (whole[0].index[0], (whole[0].index[0] + 20) % 40)
        )
        assert not torch.equal(first, second)
    for workers in (1, 4):
        for expected, batch in zip(whole, batches(Pictures(), maker, workers=workers, **options)):
            assert same(expected, batch) and batch.step == expected.step
    halves = [list(batches(Pictures(), maker, rank=rank, world_size=2, **options)) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([half[step].global_crops for half in halves]), batch.global_crops)
    late = list(batches(Pictures(), maker, start_step=2, **options))
    assert all(same(expected, batch) for expected, batch in zip(whole[2:], late))


def same(first, second):
    erased = [batch.params.erased for batch in (first, second)]
    alike = (
        erased[0] is erased[1] is None
        or torch.equal(erased[0].boxes, erased[1].boxes)
        and torch.equal(erased[0].keys, erased[1].keys)
    )
    return (
        alike
        and torch.equal(first.global_crops, second.global_crops)
        and torch.equal(first.index, second.index)
        and torch.equal(first.labels, second.labels)
    )


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"policy": "rand-q5"}, "augment.policy='rand-q5' is not a timm policy"),
        ({"policy": "nonsense"}, "is not a timm policy"),
        ({"interpolation": "nearest"}, "choose one of bicubic"),
        ({"splits": 0}, "augment.splits=0"),
    ],
)
def test_wrong_options_are_refused(options, reason):
    with pytest.raises(UserError, match=reason):
        SupervisedCrop(**options)


def test_policy_is_refused_for_other_channels():
    image = picture()[:1]
    assert crop(images=[image])[0].shape == (1, 1, 32, 32)
    with pytest.raises(UserError, match="augment.policy takes RGB images of 8 bits, and these have 1 channels"):
        crop(images=[image], policy=RAND)
