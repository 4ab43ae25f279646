"""The view of supervised training: its box, policy, views, jitter and erasing, all keyed; against PIL and timm."""

import numpy as np
import pytest
import torch
from PIL import Image

from maskwise.data import augment, erasing
from maskwise.data.loader import batches, epoch_order
from maskwise.data.mixing import Mixing
from maskwise.data.policy import make_policy, mended, posterize
from maskwise.data.train_crop import TrainCrop
from maskwise.functional import draws
from maskwise.functional.errors import UserError

RAND = "rand-m9-mstd0.5-inc1"


def picture(seed=0, height=40, width=52):
    coarse = torch.randint(0, 256, (3, 6, 7), generator=torch.Generator().manual_seed(seed)).float()
    return torch.nn.functional.interpolate(coarse[None], (height, width), mode="bicubic").clamp(0, 255)[0].to(torch.uint8)


def crop(samples=(3,), epoch=1, images=None, **options):
    options = {"size": 32, "jitter": 0.0, **options}
    return TrainCrop(**options).batch(images or [picture(k) for k in samples], list(samples), epoch)


class Pictures:
    """Twenty images in memory, each of its own level, four classes."""

    labels = torch.arange(20) % 4

    def __len__(self):
        return 20

    def image(self, i):
        return picture(i)

    def name(self, i):
        return str(i)


def test_the_crop_is_pils():
    maker = TrainCrop(size=32, jitter=0.0)
    boxes, flips = maker.boxes(maker.geometry(torch.tensor([3]), 1), [(40, 52)])
    top, left, height, width = boxes[0, 0].tolist()
    image = Image.fromarray(picture(3).permute(1, 2, 0).numpy()).resize((32, 32), Image.BICUBIC, box=(left, top, left + width, top + height))
    expected = np.asarray(image.transpose(Image.FLIP_LEFT_RIGHT) if flips[0, 0] else image).transpose(2, 0, 1).astype(int)
    found = crop()[0][0].numpy().astype(int)
    assert np.abs(found - expected).max() <= 8 and np.abs(found - expected).mean() < 0.6


def test_the_area_lies_in_its_bounds():
    maker = TrainCrop(size=8, scale=(0.2, 0.5))
    boxes, _ = maker.boxes(maker.geometry(torch.arange(500), 0), [(400, 500)] * 500)
    share = boxes[:, 0, 2] * boxes[:, 0, 3] / 200_000
    assert 0.19 < share.min() < 0.25 and 0.45 < share.max() < 0.51


def test_the_policy_is_timms_on_the_crop():
    plain, changed = crop()[0][0], crop(policy=RAND)[0][0]
    with draws.seeded(int(draws.mix(49, 0, 1, 3, 0))):
        expected = make_policy(RAND, 32, (0.485, 0.456, 0.406), "bicubic")(Image.fromarray(plain.permute(1, 2, 0).numpy()))
    assert torch.equal(changed, torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    assert any(not torch.equal(crop((k,), policy=RAND)[0], crop((k,))[0]) for k in range(3))


def test_full_posterisation_leaves_black_and_no_error():
    """At full strength timm asks for no bits, which Pillow refuses."""
    from timm.data.auto_augment import AugmentOp

    image = Image.fromarray(picture().permute(1, 2, 0).numpy())
    assert not np.asarray(posterize(image, 0)).any() and np.array_equal(np.asarray(posterize(image, 8)), np.asarray(image))
    assert np.array_equal(np.asarray(posterize(image, 3)), np.asarray(image) & 0b11100000)
    for name in ("rand-m10-n13-p1.0-inc1", "augmix-m10", "original"):
        policy = make_policy(name, 32, (0.5,) * 3, "bicubic")
        operations = getattr(policy, "ops", None) or [each for row in policy.policy for each in row]
        assert any(each.aug_fn is posterize for each in operations)
    policy.policy = [[AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10)]]
    assert not np.asarray(mended(policy)(image)).any()


@pytest.mark.parametrize("policy", [None, RAND, "augmix-m3-w3", "original"])
def test_views_are_a_function_of_sample_and_epoch_alone(policy):
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    whole = crop((3, 8, 5), policy=policy, splits=2, interpolation="random")[0]
    alone = crop((8,), policy=policy, splits=2, interpolation="random")[0]
    assert torch.equal(whole[1::3], alone)
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert not torch.equal(alone, crop((8,), 2, policy=policy, splits=2)[0])


def test_the_first_of_several_views_is_clean():
    crops, local, params = crop((3, 8), policy=RAND, splits=3, erasing=1.0, spare_first=True)
    assert crops.shape == (6, 3, 32, 32) and not len(local)
    assert torch.equal(crops[:2], crop((3, 8))[0])
    assert sorted(params.erased.rows.tolist()) == [2, 3, 4, 5]
    jittered = crop((3, 8), splits=3, jitter=0.4)[2].global_
    assert jittered.jitter.tolist() == [False, False, True, True, True, True] and "hue" not in {step[0] for step in jittered.plan.steps}


def test_colour_jitter_leaves_the_hue_and_moves_the_rest():
    crops, _, params = crop((3,), jitter=0.4)
    moved = augment.recolour(crops, params.global_)
    assert not torch.equal(moved, crops.float()) and {step[0] for step in params.global_.plan.steps} == {"brightness", "contrast", "saturation"}
    crops, _, params = crop((3,), jitter=0.0)
    assert torch.equal(augment.recolour(crops, params.global_), crops.float())


def test_erasing_against_its_definition():
    samples, size = torch.arange(4000), 32
    drawn = erasing.draw(samples, 0, 1, size, 0.25, seed=1)
    assert abs(len(drawn.rows) / 4000 - 0.25) < 0.03
    top, left, tall, wide = drawn.boxes.unbind(1)
    share, aspect = tall * wide / size**2, tall / wide
    assert (top + tall <= size).all() and (left + wide <= size).all() and share.min() > 0.01 and share.max() < 0.36 and aspect.min() < 0.4 and aspect.max() > 2.5
    again = erasing.draw(samples[100:], 0, 1, size, 0.25, seed=1)
    keep = drawn.rows >= 100
    assert torch.equal(again.boxes, drawn.boxes[keep]) and torch.equal(again.keys, drawn.keys[keep])
    assert erasing.draw(samples, 0, 1, size, 0.0) is None


@pytest.mark.parametrize("mode", erasing.MODES)
def test_only_the_box_is_overwritten(mode):
    drawn = erasing.draw(torch.arange(40), 3, 1, 32, 0.9)
    images = torch.full((40, 3, 32, 32), 7.0)
    erasing.erase(images, drawn, mode)
    for row, (top, left, tall, wide) in zip(drawn.rows.tolist(), drawn.boxes.tolist()):
        inside = images[row, :, top : top + tall, left : left + wide].clone()
        assert (inside != 7).all() and len(inside[0].unique()) == (1 if mode != "pixel" else tall * wide)
        images[row, :, top : top + tall, left : left + wide] = 7.0
    assert (images == 7).all()


def test_noise_is_normal():
    found = erasing.normal(torch.arange(20), 3001)
    assert found.shape == (20, 3001) and abs(found.mean()) < 0.02 and abs(found.std() - 1) < 0.02 and abs((found**4).mean() - 3) < 0.2
    assert torch.equal(erasing.normal(torch.arange(5, 6), 3001)[0], found[5])


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "prob": 0.7}])
def test_mixing_is_timms_with_neighbours_for_pairs(options):
    from timm.data import Mixup

    theirs = Mixup(options.get("mixup", 0.0), options.get("cutmix", 0.0), prob=options.get("prob", 1.0), label_smoothing=0.1, num_classes=5)
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    order = torch.tensor([0, 2, 4, 5, 3, 1])  # its pairs are first and last
    kinds = set()
    for key in range(12):
        with draws.seeded(key):
            expected, soft = theirs(images[order].clone(), labels[order])
        found, targets = Mixing(5, smoothing=0.1, **options)(images.clone(), labels, key)
        torch.testing.assert_close(found[order], expected)
        torch.testing.assert_close(targets[order], soft)
        kinds.add(Mixing(5, **options).draw(key, (8, 8))[1] is None)
    assert len(kinds) == (1 if len(options) == 1 else 2)


def test_mixing_by_hand():
    mix = Mixing(3, mixup=1.0)
    share, box = mix.draw(5, (2, 2))
    images, targets = mix(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2).clone(), torch.tensor([0, 2]), 5)
    assert box is None and torch.allclose(images[0], torch.tensor(share + 3 * (1 - share)))
    assert torch.allclose(targets, torch.tensor([[share, 0, 1 - share], [1 - share, 0, share]]))
    with pytest.raises(UserError, match="3 images cannot be mixed in pairs"):
        mix(torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 2]), 5)


def test_repeats_come_in_one_batch_and_never_as_neighbours():
    order = epoch_order(7, 2, 20, 6, 3)
    assert len(order) == 18 and len(order.unique()) == 18  # a copy is a sample of its own
    for batch in order.view(-1, 6):
        images = batch % 20
        assert len(images.unique()) == 2 and (images.view(-1, 2)[:, 0] != images.view(-1, 2)[:, 1]).all()
        assert sorted((batch // 20).tolist()) == [0, 0, 1, 1, 2, 2]
    assert torch.equal(epoch_order(7, 2, 20, 6), draws.order(7, 2, 20))


@pytest.mark.parametrize("repeats", [1, 2])
def test_batches_are_the_same_for_any_number_of_ranks_and_workers(repeats):
    options = {"batch_size": 8, "total_steps": 4, "seed": 3, "repeats": repeats}
    maker = TrainCrop(size=16, policy=RAND, erasing=0.5, splits=1)
    whole = list(batches(Pictures(), maker, **options))
    assert [batch.step for batch in whole] == [0, 1, 2, 3] and all(torch.equal(batch.labels, batch.index % 20 % 4) for batch in whole)
    if repeats > 1:  # copies of an image are seen in different ways
        first, second = (whole[0].global_crops[(whole[0].index == sample).nonzero()[0, 0]] for sample in (whole[0].index[0], (whole[0].index[0] + 20) % 40))
        assert not torch.equal(first, second)
    for workers in (1, 4):
        for one, other in zip(whole, batches(Pictures(), maker, workers=workers, **options)):
            assert same(one, other) and other.step == one.step
    halves = [list(batches(Pictures(), maker, rank=rank, world_size=2, **options)) for rank in (0, 1)]
    for step, one in enumerate(whole):
        assert torch.equal(torch.cat([half[step].global_crops for half in halves]), one.global_crops)
    late = list(batches(Pictures(), maker, start_step=2, **options))
    assert all(same(one, other) for one, other in zip(whole[2:], late))


def same(one, other):
    erased = [batch.params.erased for batch in (one, other)]
    alike = erased[0] is erased[1] is None or torch.equal(erased[0].boxes, erased[1].boxes) and torch.equal(erased[0].keys, erased[1].keys)
    return alike and torch.equal(one.global_crops, other.global_crops) and torch.equal(one.index, other.index) and torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("options, reason", [
    ({"policy": "rand-q5"}, "augment.policy='rand-q5' is nothing that timm reads"), ({"policy": "nonsense"}, "is nothing that timm reads"),
    ({"interpolation": "nearest"}, "choose one of bicubic"), ({"splits": 0}, "augment.splits=0"),
])  # fmt: skip
def test_mistakes_are_told(options, reason):
    with pytest.raises(UserError, match=reason):
        TrainCrop(**options)


def test_other_channels_have_no_policy():
    image = picture()[:1]
    assert crop(images=[image])[0].shape == (1, 1, 32, 32)
    with pytest.raises(UserError, match="augment.policy takes RGB images of 8 bits, and these have 1 channels"):
        crop(images=[image], policy=RAND)
