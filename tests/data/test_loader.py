"""Batches are a function of (seed, step, rank), independent of workers and restarts."""

import pytest
import torch

from maskwise.data.decoding.image import CorruptImage, decode
from maskwise.data.loader import batches, steps_per_epoch
from maskwise.data.multicrop import MultiCrop
from maskwise.data.reader import CachedDataset, DecodedDataset, cached_if_small
from maskwise.errors import UserError
from maskwise.functional import keyed_random

CROPS = MultiCrop(global_size=8, local_size=4, local_number=2)


class Memory:
    """Hold images in memory, some of them unreadable."""

    def __init__(self, count=22, broken=(), labels=True):
        self.pixels = torch.arange(count * 3 * 12 * 10).mul(31).remainder(251).to(torch.uint8).view(count, 3, 12, 10)
        self.labels = torch.arange(count) * 10 if labels else None
        self.broken = set(broken)
        self.reads = 0

    def __len__(self):
        return len(self.pixels)

    def image(self, index):
        self.reads += 1
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
            for name in ("jitter", "factors", "order", "gray", "sigma", "solarize"):
                assert torch.equal(getattr(x, name), getattr(y, name)), name


def test_shapes_and_order():
    taken = run()
    assert len(taken) == 12 and steps_per_epoch(22, 4) == 5
    for step, batch in enumerate(taken):
        epoch, place = divmod(step, 5)
        assert torch.equal(batch.index, keyed_random.order(3, epoch, 22)[place * 4 : place * 4 + 4])
        assert torch.equal(batch.labels, batch.index * 10) and len(batch) == 4
        assert tuple(batch.global_crops.shape) == (8, 3, 8, 8) and tuple(batch.local_crops.shape) == (8, 3, 4, 4)
        assert batch.global_crops.dtype == torch.uint8 and len(batch.params.global_) == len(batch.params.local_) == 8
    for epoch in range(2):
        assert len({int(i) for batch in taken[epoch * 5 : epoch * 5 + 5] for i in batch.index}) == 20
    assert run(Memory(labels=False))[0].labels is None


def test_views_differ_between_epochs():
    one = run(Memory(4), batch_size=4, total_steps=2)
    first, second = (batch.global_crops[batch.index.argmin()] for batch in one)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(workers):
    assert_same(run(), run(workers=workers))


def test_global_random_state_is_untouched():
    state = torch.random.get_rng_state()
    run(workers=1, total_steps=2)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("start", [3, 5, 7])
def test_restart_within_an_epoch(start):
    assert_same(run()[start:], run(start_step=start))


def test_two_ranks_equal_one_process():
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
def test_no_readable_image_gives_one_line(workers):
    with pytest.raises(UserError) as caught:
        iterator = batches(Memory(150, broken=range(150)), CROPS, batch_size=4, total_steps=2, workers=workers)
        list(iterator)
    assert iterator.corrupt == caught.value.corrupt
    assert "in a row" in str(caught.value) and "\n" not in str(caught.value) and len(caught.value.corrupt) >= 100


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(batch_size=23), ["23", "22 images"]),
        (dict(batch_size=9, world_size=2), ["2 ranks", "train.batch_size=8"]),
        (dict(batch_size=0), ["at least 1"]),
    ],
)
def test_impossible_batch_sizes_are_refused(options, words):
    with pytest.raises(UserError) as caught:
        batches(Memory(), CROPS, **{"total_steps": 1, **options})
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_small_sets_are_decoded_once():
    data = Memory(22)
    run(data)
    assert data.reads <= 22 + 8
    assert isinstance(cached_if_small(DecodedDataset(Memory()), 1), CachedDataset)
    assert not isinstance(cached_if_small(DecodedDataset(Memory()), 10**9), CachedDataset)
    plain = Memory(22)
    run(plain, cache="none")
    assert plain.reads == 48


def test_moving_a_batch_moves_every_tensor():
    batch = run(total_steps=1)[0]
    moved = batch.to("meta")
    for tensor in (
        moved.global_crops,
        moved.local_crops,
        moved.index,
        moved.labels,
        moved.params.global_.sigma,
        moved.params.local_.plan.rows,
    ):
        assert tensor.device.type == "meta"
    assert moved.params.global_.plan.steps == batch.params.global_.plan.steps


class Encoded:
    """Hold JPEGs in memory, read through `source` as files are."""

    def __init__(self, sizes, **options):
        import io

        import numpy as np
        from PIL import Image

        self.data, self.labels = [], None
        for k, (height, width) in enumerate(sizes):
            y, x = np.mgrid[:height, :width]
            pixels = np.stack([127 + 100 * np.sin(y / height * 9 + k), x % 256, (x + y) % 200], -1)
            buffer = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=95, **options)
            self.data.append(buffer.getvalue())

    def __len__(self):
        return len(self.data)

    def source(self, index):
        return self.data[index]

    def name(self, index):
        return f"{index}.jpg"

    def image(self, index):
        return decode(self.source(index), self.name(index))


def test_jpegs_are_shrunk_in_decoding_only_where_no_view_is_enlarged(monkeypatch):
    from maskwise.data import reader

    factors = []

    def record(data, name, decoder, shrink=1, **options):
        factors.append(shrink)
        return decode(data, name, decoder, shrink, **options)

    monkeypatch.setattr(reader, "decode", record)
    data = Encoded([(300, 400), (40, 50), (160, 130), (600, 500)] * 2)
    options = dict(batch_size=8, total_steps=1, seed=3, cache="none")
    crops = MultiCrop(global_size=16, local_size=8, local_number=2)
    plain, scaled = (next(batches(data, crops, **options, jpeg_scaling=scaling)) for scaling in (False, True))
    boxes, _ = crops.boxes(
        crops.sample_uniforms(plain.index, 0), [decode(data.data[i]).shape[1:] for i in plain.index.tolist()]
    )
    expected = []
    for image_boxes in boxes:
        limit = min(side // size for box, size in zip(image_boxes, (16, 16, 8, 8)) for side in box[2:])
        expected.append(max(factor for factor in (1, 2, 4, 8) if factor <= max(limit, 1)))
    assert factors[8:] == expected and max(expected) > 2 and min(expected) == 1
    assert torch.equal(plain.index, scaled.index) and torch.equal(plain.params.local_.sigma, scaled.params.local_.sigma)
    gap = (plain.global_crops.float() - scaled.global_crops.float()).abs()
    assert gap.mean() < 12 and all(
        torch.equal(plain.global_crops[i::8], scaled.global_crops[i::8]) for i in range(8) if expected[i] == 1
    )


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_rotated_jpegs_are_shrunk_in_display_orientation(orientation):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = Encoded([(200, 700), (600, 150)], exif=exif)
    options = dict(batch_size=2, total_steps=3, seed=3, cache="none")
    crops = MultiCrop(global_size=16, local_size=8, local_number=2)
    plain, scaled = (list(batches(data, crops, **options, jpeg_scaling=scaling)) for scaling in (False, True))
    for full, shrunk in zip(plain, scaled):
        assert (full.global_crops.float() - shrunk.global_crops.float()).abs().mean() < 12
    assert data.image(0).shape == ((3, 700, 200) if orientation >= 5 else (3, 200, 700))


def test_damaged_jpegs_are_replaced_with_jpeg_scaling():
    data = Encoded([(200, 300)] * 6)
    data.data[2] = data.data[2][:1500]
    data.data[4] = b""
    iterator = batches(data, CROPS, batch_size=6, total_steps=1, jpeg_scaling=True)
    batch = next(iterator)
    assert set(iterator.corrupt) == {"2.jpg", "4.jpg"} and batch.replaced == 2


def test_an_unknown_decoder_gives_one_line():
    with pytest.raises(UserError, match="data.decoder"):
        batches(Memory(), CROPS, batch_size=4, total_steps=1, decoder="none such")


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def test_batches_are_not_copied_and_buffers_are_reused():
    iterator = batches(Memory(), CROPS, batch_size=4, total_steps=30, seed=3, workers=1)
    buffers = {address(buffer) for buffer in iterator._pool.buffers}
    assert len(buffers) == 5 and all(buffer.is_shared() for buffer in iterator._pool.buffers)
    addresses, expected = [], run(total_steps=30)
    for batch, plain in zip(iterator, expected):
        assert address(batch.global_crops) == address(batch.local_crops) and torch.equal(
            batch.global_crops, plain.global_crops
        )
        assert batch.global_crops.is_contiguous(memory_format=torch.channels_last)
        assert batch.params.global_.plan.steps == plain.params.global_.plan.steps
        addresses.append(address(batch.global_crops))
    assert set(addresses) <= buffers and len(set(addresses)) < 30


def test_a_referenced_batch_is_never_overwritten():
    iterator = batches(Memory(), CROPS, batch_size=4, total_steps=30, seed=3, workers=2)
    crops = [batch.local_crops[:1] for batch in iterator]  # a view is enough to hold the buffer
    assert len({address(crop) for crop in crops}) == 30
    for crop, plain in zip(crops, run(total_steps=30)):
        assert torch.equal(crop, plain.local_crops[:1])


def test_too_little_shared_memory_gives_one_line(monkeypatch):
    from maskwise.data import shared_memory

    monkeypatch.setattr(shared_memory.os, "statvfs", lambda path: type("There", (), {"f_bavail": 1, "f_frsize": 4096}))
    with pytest.raises(UserError) as caught:
        batches(Memory(), MultiCrop(local_number=2), batch_size=4, total_steps=3, workers=2)
    assert (
        "shared memory" in str(caught.value) and "speed.workers" in str(caught.value) and "\n" not in str(caught.value)
    )


class Bands(Memory):
    """Hold images of any channels and dtype; `declared` datasets have attributes channels and bits, as ours do."""

    def __init__(self, channels, dtype, declared):
        super().__init__()
        values = torch.arange(22 * channels * 120).mul(7919) % (torch.iinfo(dtype).max + 1)
        self.pixels = values.to(torch.int32).to(dtype).view(22, channels, 12, 10)
        if declared:
            self.channels, self.bits = channels, torch.iinfo(dtype).bits


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("channels, dtype", [(1, torch.uint8), (5, torch.uint8), (3, torch.uint16), (5, torch.uint16)])
def test_workers_pass_any_channels_and_bits(channels, dtype, declared):
    data = Bands(channels, dtype, declared)
    assert_same(run(data, total_steps=3), run(data, total_steps=3, workers=1))
    assert run(data, total_steps=1, workers=1)[0].global_crops.dtype == dtype
