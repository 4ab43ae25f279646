"""A batch is a function of (seed, step, world), whatever workers, ranks and restarts there are."""

import pytest
import torch

from maskwise.data.decode import CorruptImage, decode
from maskwise.data.loader import batches, steps_per_epoch
from maskwise.data.multicrop import MultiCrop
from maskwise.data.reader import Remembered, remembered
from maskwise.functional import draws
from maskwise.functional.errors import UserError

CROPS = MultiCrop(global_size=8, local_size=4, local_number=2)


class Memory:
    """Images in memory; some cannot be read."""

    def __init__(self, count=22, broken=(), labels=True):
        self.pixels = torch.arange(count * 3 * 12 * 10).mul(31).remainder(251).to(torch.uint8).view(count, 3, 12, 10)
        self.labels = torch.arange(count) * 10 if labels else None
        self.broken = set(broken)
        self.asked = 0

    def __len__(self):
        return len(self.pixels)

    def image(self, index):
        self.asked += 1
        if index in self.broken:
            raise CorruptImage(f"{index}.jpg", "cut short")
        return self.pixels[index]


def run(data=None, **options):
    arguments = dict(batch_size=4, total_steps=12, seed=3)
    return list(batches(data or Memory(), CROPS, **{**arguments, **options}))


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        for name in ("global_crops", "local_crops", "index", "labels"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        for x, y in ((a.params.global_, b.params.global_), (a.params.local_, b.params.local_)):
            for name in ("jitter", "factors", "order", "grey", "sigma", "solarize"):
                assert torch.equal(getattr(x, name), getattr(y, name)), name


def test_shapes_and_order():
    taken = run()
    assert len(taken) == 12 and steps_per_epoch(22, 4) == 5
    for step, batch in enumerate(taken):
        epoch, place = divmod(step, 5)
        assert torch.equal(batch.index, draws.order(3, epoch, 22)[place * 4:place * 4 + 4])
        assert torch.equal(batch.labels, batch.index * 10) and len(batch) == 4
        assert tuple(batch.global_crops.shape) == (8, 3, 8, 8) and tuple(batch.local_crops.shape) == (8, 3, 4, 4)
        assert batch.global_crops.dtype == torch.uint8 and len(batch.params.global_) == len(batch.params.local_) == 8
    for epoch in range(2):
        assert len({int(i) for batch in taken[epoch * 5:epoch * 5 + 5] for i in batch.index}) == 20
    assert run(Memory(labels=False))[0].labels is None


def test_the_epoch_changes_the_views():
    one = run(Memory(4), batch_size=4, total_steps=2)
    first, second = (batch.global_crops[batch.index.argmin()] for batch in one)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    assert_same(run(), run(workers=workers))


def test_global_random_state_is_untouched():
    state = torch.random.get_rng_state()
    run(workers=1, total_steps=2)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("start", [3, 5, 7])
def test_restart_in_mid_epoch(start):
    assert_same(run()[start:], run(start_step=start))


def test_two_ranks_are_one():
    whole, parts = run(), [run(rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        left, right = parts[0][step], parts[1][step]
        assert torch.equal(batch.index, torch.cat([left.index, right.index]))
        for name in ("global_crops", "local_crops"):
            views = [getattr(side, name).unflatten(0, (2, 2)) for side in (left, right)]
            assert torch.equal(getattr(batch, name), torch.cat(views, 1).flatten(0, 1))
        sides = [side.params.global_.factors.unflatten(0, (2, 2)) for side in (left, right)]
        assert torch.equal(batch.params.global_.factors, torch.cat(sides, 1).flatten(0, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_and_listed(workers):
    data = Memory(22, broken={6, 7, 21})
    iterator = batches(data, CROPS, batch_size=11, total_steps=4, seed=1, workers=workers)
    taken = list(iterator)
    assert iterator.corrupt == {"6.jpg": "cut short", "7.jpg": "cut short", "21.jpg": "cut short"}
    assert iterator.seen == 44 and iterator.replaced == 6
    for batch in taken:
        shown = {6: 80, 7: 80, 21: 0}
        assert batch.labels.tolist() == [shown.get(i, 10 * i) for i in batch.index.tolist()]
    assert_same(taken, list(batches(data, CROPS, batch_size=11, total_steps=4, seed=1)))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_is_one_line(workers):
    with pytest.raises(UserError) as caught:
        iterator = batches(Memory(150, broken=range(150)), CROPS, batch_size=4, total_steps=2, workers=workers)
        list(iterator)
    assert iterator.corrupt == caught.value.corrupt
    assert "in a row" in str(caught.value) and "\n" not in str(caught.value) and len(caught.value.corrupt) >= 100


@pytest.mark.parametrize("options, words", [
    (dict(batch_size=23), ["23", "22 images"]),
    (dict(batch_size=9, world_size=2), ["2 ranks", "train.batch_size=8"]),
    (dict(batch_size=0), ["at least 1"]),
])
def test_batches_that_cannot_be(options, words):
    with pytest.raises(UserError) as caught:
        batches(Memory(), CROPS, **{"total_steps": 1, **options})
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_small_sets_are_decoded_once():
    data = Memory(22)
    run(data)
    assert data.asked <= 22 + 8
    assert isinstance(remembered(Memory(), 1), Remembered)
    assert not isinstance(remembered(Memory(), 10**9), Remembered)
    plain = Memory(22)
    run(plain, cache="none")
    assert plain.asked == 48


def test_moving_a_batch_takes_everything_along():
    batch = run(total_steps=1)[0]
    moved = batch.to("meta")
    for tensor in (moved.global_crops, moved.local_crops, moved.index, moved.labels, moved.params.global_.sigma, moved.params.local_.plan.rows):
        assert tensor.device.type == "meta"
    assert moved.params.global_.plan.steps == batch.params.global_.plan.steps


class Encoded:
    """JPEGs in memory, read through `source` as files are."""

    def __init__(self, sizes, **options):
        import io

        import numpy as np
        from PIL import Image

        self.data, self.labels = [], None
        for k, (height, width) in enumerate(sizes):
            y, x = np.mgrid[:height, :width]
            pixels = np.stack([127 + 100 * np.sin(y / height * 9 + k), x % 256, (x + y) % 200], -1)
            held = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(held, "JPEG", quality=95, **options)
            self.data.append(held.getvalue())

    def __len__(self):
        return len(self.data)

    def source(self, index):
        return self.data[index]

    def name(self, index):
        return f"{index}.jpg"

    def image(self, index):
        return decode(self.source(index), self.name(index))


def test_jpegs_are_shrunk_where_every_view_stays_smaller_still(monkeypatch):
    from maskwise.data import reader

    asked = []

    def noted(data, name, decoder, shrink=1, **options):
        asked.append(shrink)
        return decode(data, name, decoder, shrink, **options)

    monkeypatch.setattr(reader, "decode", noted)
    data = Encoded([(300, 400), (40, 50), (160, 130), (600, 500)] * 2)
    options = dict(batch_size=8, total_steps=1, seed=3, cache="none")
    crops = MultiCrop(global_size=16, local_size=8, local_number=2)
    plain, scaled = (next(batches(data, crops, **options, jpeg_scaling=each)) for each in (False, True))
    boxes, _ = crops.boxes(crops.geometry(plain.index, 0), [decode(data.data[i]).shape[1:] for i in plain.index.tolist()])
    expected = []
    for own in boxes:
        room = min(side // size for box, size in zip(own, (16, 16, 8, 8)) for side in box[2:])
        expected.append(8 if room >= 8 else 4 if room >= 4 else 2 if room >= 2 else 1)
    assert asked[8:] == expected and max(expected) > 2 and min(expected) == 1
    assert torch.equal(plain.index, scaled.index) and torch.equal(plain.params.local_.sigma, scaled.params.local_.sigma)
    gap = (plain.global_crops.float() - scaled.global_crops.float()).abs()
    assert gap.mean() < 12 and all(torch.equal(plain.global_crops[i::8], scaled.global_crops[i::8]) for i in range(8) if expected[i] == 1)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_turned_jpegs_are_shrunk_as_they_are_seen(orientation):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = Encoded([(200, 700), (600, 150)], exif=exif)
    options = dict(batch_size=2, total_steps=3, seed=3, cache="none")
    crops = MultiCrop(global_size=16, local_size=8, local_number=2)
    plain, scaled = (list(batches(data, crops, **options, jpeg_scaling=each)) for each in (False, True))
    for one, other in zip(plain, scaled):
        assert (one.global_crops.float() - other.global_crops.float()).abs().mean() < 12
    assert data.image(0).shape == ((3, 700, 200) if orientation >= 5 else (3, 200, 700))


def test_damage_found_while_shrinking_is_replaced():
    data = Encoded([(200, 300)] * 6)
    data.data[2] = data.data[2][:1500]
    data.data[4] = b""
    iterator = batches(data, CROPS, batch_size=6, total_steps=1, jpeg_scaling=True)
    batch = next(iterator)
    assert set(iterator.corrupt) == {"2.jpg", "4.jpg"} and batch.replaced == 2


def test_a_decoder_that_does_not_work_is_one_line():
    with pytest.raises(UserError, match="data.decoder"):
        batches(Memory(), CROPS, batch_size=4, total_steps=1, decoder="none such")


def where(tensor):
    return tensor.untyped_storage().data_ptr()


def test_batches_are_read_where_workers_wrote_them_and_slots_are_used_again():
    iterator = batches(Memory(), CROPS, batch_size=4, total_steps=30, seed=3, workers=1)
    buffers = {where(buffer) for buffer in iterator._slots.buffers}
    assert len(buffers) == 5 and all(buffer.is_shared() for buffer in iterator._slots.buffers)
    seen, expected = [], run(total_steps=30)
    for batch, plain in zip(iterator, expected):
        assert where(batch.global_crops) == where(batch.local_crops) and torch.equal(batch.global_crops, plain.global_crops)
        assert batch.global_crops.is_contiguous(memory_format=torch.channels_last)
        assert batch.params.global_.plan.steps == plain.params.global_.plan.steps
        seen.append(where(batch.global_crops))
    assert set(seen) <= buffers and len(set(seen)) < 30


def test_a_batch_that_is_kept_is_never_written_over():
    iterator = batches(Memory(), CROPS, batch_size=4, total_steps=30, seed=3, workers=2)
    kept = [batch.local_crops[:1] for batch in iterator]  # a view is enough to keep the slot
    assert len({where(crop) for crop in kept}) == 30
    for crop, plain in zip(kept, run(total_steps=30)):
        assert torch.equal(crop, plain.local_crops[:1])


def test_too_little_shared_memory_is_one_line(monkeypatch):
    from maskwise.data import slots

    monkeypatch.setattr(slots.os, "statvfs", lambda path: type("There", (), {"f_bavail": 1, "f_frsize": 4096}))
    with pytest.raises(UserError) as caught:
        batches(Memory(), MultiCrop(local_number=2), batch_size=4, total_steps=3, workers=2)
    assert "shared memory" in str(caught.value) and "speed.workers" in str(caught.value) and "\n" not in str(caught.value)
