"""Images of torch datasets: every format of items and labels, keyed draws, one line for mistakes."""

import io
import random
import threading

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

from maskwise.data.datasets.subset import Subset as OwnSubset
from maskwise.data.datasets.torch_dataset import RawItems, TorchDataset
from maskwise.data.decoding.image import CorruptImage
from maskwise.errors import UserError
from support.figures import Noise

PIXELS = Noise(1, side=20).array(0)[:16]  # 16 rows, 20 columns


def test_every_format_gives_the_same_pixels(tmp_path):
    picture, stream = Image.fromarray(PIXELS), io.BytesIO()
    picture.save(stream, "png")
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    expected = torch.from_numpy(PIXELS).permute(2, 0, 1)
    images = [picture, PIXELS, expected, expected / 255, PIXELS / 255, tmp_path / "a.png", str(tmp_path / "a.png")]
    images.append(stream.getvalue())
    items = [item for image in images for item in (image, (image, 3), {"label": 3, "image": image})]
    dataset = TorchDataset(items)
    for index in range(len(items)):
        assert torch.equal(dataset.image(index), expected), index
    assert dataset.labels is None and "no attribute `targets`" in dataset.no_labels
    assert int(TorchDataset([torch.full((3, 4, 4), 0.999)]).image(0).min()) == 255  # rounded


class Labeled(Noise):
    def __init__(self, name, values, classes=None):
        super().__init__(4)
        del self.targets
        self.classes = classes
        setattr(self, name, values)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.array(index)


@pytest.mark.parametrize(
    "name, values, classes, labels, names",
    [
        ("targets", [2, 0, 1, 2], ["x", "y", "z"], [2, 0, 1, 2], ["x", "y", "z"]),
        ("labels", torch.tensor([5, 7, 5, 7]), None, [0, 1, 0, 1], ["5", "7"]),
        ("targets", numpy.array([1, 0, 1, 0]), ("x", "y"), [1, 0, 1, 0], ["x", "y"]),
        ("targets", [torch.tensor(1), numpy.int64(0), 1, 0], None, [1, 0, 1, 0], ["0", "1"]),
        ("labels", ["cat", "ant", "cat", "ant"], None, [1, 0, 1, 0], ["ant", "cat"]),
    ],
)
def test_labels(name, values, classes, labels, names):
    dataset = TorchDataset(Labeled(name, values, classes))
    assert dataset.labels.tolist() == labels and dataset.classes == names and dataset.no_labels is None


def test_labels_of_tensors_subsets_and_concatenations():
    tensors = TensorDataset(torch.zeros(3, 3, 8, 8), torch.tensor([4, 2, 4]))
    assert TorchDataset(tensors).labels.tolist() == [1, 0, 1]
    whole = Noise(6)
    part, both = Subset(whole, [4, 0, 5]), ConcatDataset([Noise(2), Subset(whole, [2])])
    assert TorchDataset(part).labels.tolist() == [1, 0, 2] and TorchDataset(part).classes == ["a", "b", "c"]
    assert TorchDataset(both).labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "values, reason",
    [([0, 1, 0], "are 3 for 4 items"), ([0, None, 1, 0], "no label in 1 of 4 rows"), ([0.5, 1, 0, 0], "a fraction")],
)
def test_labels_that_cannot_be_used_have_a_reason(values, reason):
    dataset = TorchDataset(Labeled("targets", values))
    assert dataset.labels is None and reason in dataset.no_labels


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


class Faulty(Noise):
    def __init__(self, error, at):
        super().__init__(4)
        self.error, self.at = error, at

    def __getitem__(self, index):
        if index == self.at:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize(
    "dataset, line",
    [
        (None, "given in Python"),
        (Stream(), "IterableDataset"),
        (DataLoader(Noise(2)), "DataLoader; give its dataset"),
        ({0: PIXELS}, "dict is no dataset"),
        (7, "int is no dataset"),
        ([], "list is empty"),
        ([3.0], "holds a float in place of an image"),
        ([()], "an empty tuple"),
        ([{"pixels": PIXELS, "label": 1}], "keys pixels, label, and none of image, img"),
        ([torch.randn(3, 8, 8)], "holds values in 0..1; this one has"),
        ([torch.zeros(8, 8, 5)], "takes images"),
        (TensorDataset(torch.zeros(2)), "not empty; this one is"),
        (Faulty(KeyError("no such row"), 0), "dataset[0] raised KeyError: 'no such row'"),
    ],
)
def test_mistakes_are_one_line(dataset, line):
    with pytest.raises(UserError) as caught:
        TorchDataset(dataset)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_unreadable_images(tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG torn")
    for fault in (OSError("gone"), FileNotFoundError(2, "gone")):
        dataset = TorchDataset(Faulty(fault, 0))  # another item can be read
        with pytest.raises(CorruptImage, match=r"item 0: .*gone"):
            dataset.image(0)
    with pytest.raises(CorruptImage, match="torn"):
        TorchDataset([PIXELS, tmp_path / "torn.png"]).image(1)
    with pytest.raises(UserError, match="none of the first 2 items can be read"):
        TorchDataset([tmp_path / "torn.png"] * 2)


class Drawing(Noise):
    """Images from all three global generators."""

    def __getitem__(self, index):
        draws = [random.random(), numpy.random.rand(), float(torch.rand(()))]
        return torch.tensor(draws).view(3, 1, 1).expand(3, 4, 4)


def test_draws_of_a_dataset_follow_from_the_index_and_leave_the_generators():
    dataset = TorchDataset(Drawing(5))
    first = [dataset.image(index) for index in range(5)]
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    again = [dataset.image(index) for index in (4, 3, 2, 1, 0)][::-1]
    assert (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert all(torch.equal(one, other) for one, other in zip(first, again))
    assert len({tuple(image[:, 0, 0].tolist()) for image in first}) == 5


def test_threads_do_not_seed_the_generators_of_the_main_thread():
    dataset, state = TorchDataset(Noise(3)), random.getstate()
    images = []
    thread = threading.Thread(target=lambda: images.append(dataset.image(1)))
    thread.start()
    thread.join()
    assert torch.equal(images[0], dataset.image(1)) and random.getstate() == state


def test_contents_and_fingerprint_follow_from_the_pixels():
    one, same, other = TorchDataset(Noise(40)), TorchDataset(Noise(40)), TorchDataset(Noise(40, seed=1))
    assert one.contents() == same.contents() != other.contents()
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_raw_items_are_those_of_the_dataset_also_in_a_subset():
    noise = Noise(6)
    dataset = TorchDataset(noise)
    assert isinstance(RawItems(dataset).image(2), Image.Image)
    raw = RawItems(OwnSubset(dataset, [5, 1]))
    assert numpy.array_equal(numpy.asarray(raw.image(1)), noise.array(1)) and raw.labels.tolist() == [2, 1]


def test_raw_items_of_files_are_decoded_and_torn_ones_are_unreadable(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:-40])

    class Opened(Noise):
        def __getitem__(self, index):
            return Image.open(tmp_path / "torn.png") if index == 1 else super().__getitem__(index)

    assert torch.equal(RawItems(TorchDataset([tmp_path / "a.png"])).image(0), torch.from_numpy(PIXELS).permute(2, 0, 1))
    with pytest.raises(CorruptImage, match="item 1"):
        RawItems(TorchDataset(Opened(2))).image(1)
