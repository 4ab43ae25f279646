"""Near-duplicates: planted copies, leaks, groups and lists by hand, thresholds, pages."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from maskwise import cli
from maskwise.build.embedding import dupes
from maskwise.data.datasets import Folder, ImageList, Shapes
from maskwise.distributed.world import World
from maskwise.embedding import copies, duplicates
from maskwise.embedding.embed import embed
from maskwise.embedding.reader import Embeddings
from maskwise.errors import UserError
from maskwise.imaging.resize import resize_image
from maskwise.nn.tokens import Features
from support import packs
from support.planted import Plain

KINDS = ("resized", "re-encoded", "cropped", "flipped")


class Statistics(Plain):
    """An encoder of the means and covariances of colors: crops and mirroring barely change them."""

    image_size = (32, 32)

    def __init__(self):
        super().__init__(12)

    def transform(self, image):
        return resize_image(image, (32, 32))

    def forward(self, images, **requests):
        flat = images.flatten(2)
        mean = flat.mean(dim=2)
        centered = flat - mean[..., None]
        covariance = (centered @ centered.transpose(1, 2) / flat.shape[2]).flatten(1)
        return Features(torch.cat([mean - 0.5, 8 * covariance], dim=1), torch.zeros(len(images), 1, 3), None, (1, 1))


class Planted:
    """Shapes, followed by altered copies of the first of them; all of one class."""

    def __init__(self, count=60, planted=8, kinds=KINDS):
        self.shapes, self.count, self.planted, self.kinds = Shapes(count=count, size=64), count, planted, kinds
        self.labels, self.classes = torch.zeros(len(self), dtype=torch.int64), ["all"]

    def __len__(self):
        return self.count + self.planted * len(self.kinds)

    def origin(self, i):
        return (i - self.count) % self.planted

    def image(self, i):
        if i < self.count:
            return self.shapes.image(i)
        kind = self.kinds[(i - self.count) // self.planted]
        return copies.CHANGES[kind](self.shapes.image(self.origin(i)))

    def name(self, i):
        return f"{i}.png"


@pytest.mark.parametrize("engine", ["torch", "faiss"])
def test_planted_copies_of_every_kind_are_found(engine):
    data = Planted()
    found, measured = dupes(Statistics(), data, engine=engine, batch_size=16)
    together = {node: number for number, group in enumerate(found.groups) for node in group}
    missed = [i for i in range(data.count, len(data)) if together.get(i, -1) != together.get(data.origin(i), -2)]
    assert missed == []
    assert all(share > 0.85 for share in measured.found.values()), measured
    false = [pair for pair in found.pairs if pair[1] < data.count]
    assert len(false) == 0, "false pairs of 60 shapes"
    assert len(found.kept) == 60


def test_mirrored_copies_need_the_mirrored_view():
    """Left and right halves tell an image from its mirror image; the view makes them equal again."""

    class Halves(Statistics):
        def forward(self, images, **requests):
            features = [super(Halves, self).forward(half).pooled for half in images.chunk(2, dim=3)]
            return Features(torch.cat(features, dim=1), torch.zeros(len(images), 1, 3), None, (1, 1))

    data = Planted(kinds=("flipped",))
    for mirrored, expected in ((True, 8), (False, 0)):
        found, _ = dupes(Halves(), data, threshold=0.99999, mirrored=mirrored)
        assert len(found.pairs) == expected
        assert all(cosine > 1 - 1e-6 for cosine in found.pairs.values())


def embeddings(vectors, sizes=None, dataset=None, **options):
    count = len(vectors)
    sizes = torch.tensor(sizes or [(8, 8)] * count)
    names = [f"{k}.png" for k in range(count)]
    return Embeddings(torch.tensor(vectors), names, None, sizes, options.get("root"), options.get("meta", {}))


def test_groups_leaks_and_what_is_kept_by_hand():
    angle = lambda degrees: [float(np.cos(np.radians(degrees))), float(np.sin(np.radians(degrees)))]  # noqa: E731
    train = embeddings(
        [angle(0), angle(8), angle(16), angle(60), angle(90), angle(150), angle(151)],
        sizes=[(8, 8), (16, 8), (8, 16), (9, 9), (9, 9), (5, 5), (5, 5)],
    )
    test = embeddings([angle(62), angle(200)])
    found = duplicates.duplicates(train, test, float(np.cos(np.radians(10))))
    # 0-8-16 are a chain, though 0 and 16 are too far apart; 60 leaks; 150 and 151 are equal in size
    assert found.groups == [[0, 1, 2], [3, 7], [5, 6]]
    assert list(found.pairs) == [(0, 1), (1, 2), (3, 7), (5, 6)] and found.leaks == [(3, 7)]
    assert found.pairs[3, 7] == pytest.approx(np.cos(np.radians(2)), abs=1e-7)
    assert found.kept == [1, 4, 5]  # the first of the largest; none of a group with a test image
    assert found.summary() == {
        "threshold": found.threshold, "train": 7, "test": 2, "pairs": 3, "leaks": 1, "groups": 3, "removed": 4
    }  # fmt: skip
    rows = list(found.rows())
    assert [(row["group"], row["set"], row["path"], row["kept"]) for row in rows] == [
        (1, "train", "0.png", "no"),
        (1, "train", "1.png", "yes"),
        (1, "train", "2.png", "no"),
        (2, "train", "3.png", "no"),
        (2, "test", "0.png", "yes"),
        (3, "train", "5.png", "yes"),
        (3, "train", "6.png", "no"),
    ]


def test_a_threshold_that_everything_reaches_is_refused():
    train = embeddings([[1.0, 0.01 * k] for k in range(60)])
    with pytest.raises(UserError, match="more than 1200 pairs of 60 images reach threshold=0.5, too many for copies"):
        duplicates.duplicates(train, None, 0.5)
    for threshold in (0.0, 1.5, -1.0):
        with pytest.raises(UserError, match="is no cosine above 0"):
            duplicates.duplicates(train, None, threshold)


def test_the_threshold_lies_between_copies_and_other_images():
    """Half of the gap below the copies; with overlap, the best balance of misses and false ones."""
    assert copies.separating(torch.tensor([0.9, 0.95, 1.0]), torch.tensor([0.5, 0.8])) == pytest.approx(0.85, abs=2e-4)
    # missing one copy of four (0.25) costs less than one false image of five (0.4)
    others = torch.tensor([0.2, 0.3, 0.3, 0.4, 0.82])
    assert copies.separating(torch.tensor([0.8, 0.9, 0.9, 0.92]), others) == pytest.approx(0.86, abs=2e-4)
    assert copies.separating(torch.tensor([0.1, 0.2]), torch.tensor([0.05])) == copies.LEAST


@pytest.fixture
def folder(tmp_path):
    """Training images in two classes with a copy, a leak into the test images, and names with blanks."""
    shapes = Shapes(count=12, size=48)

    def save(name, image, **options):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name, **options)

    for i in range(8):
        save(f"train/{'big' if i % 2 else 'a b'}/{i}.png", shapes.image(i))
    save("train/big/copy of 0.jpg", resize_image(shapes.image(0), (96, 96)), quality=90)
    for i in range(8, 12):
        save(f"test/big/{i}.png", shapes.image(i))
    save("test/big/leak.jpg", shapes.image(3), quality=85)
    return tmp_path


def test_the_list_of_kept_images_trains(folder):
    found, _ = dupes(Statistics(), folder / "train", folder / "test", threshold=0.999)
    assert len(found.groups) == 2 and len(found.leaks) == 1
    whole = Folder(folder / "train")
    for ending in ("txt", "csv"):
        duplicates.check_list(whole.root, folder / f"keep.{ending}")
        duplicates.write_list(found, folder / f"keep.{ending}")
        kept = ImageList(folder / f"keep.{ending}")
        names = {str(kept.source(i).relative_to(whole.root)) for i in range(len(kept))}
        assert names == set(whole.files) - {"a b/0.png", "big/3.png"}  # the copy of 0 has more pixels
        assert kept.classes == whole.classes
        labels = dict(zip(whole.files, whole.labels.tolist()))
        assert [labels[str(kept.source(i).relative_to(whole.root))] for i in range(len(kept))] == kept.labels.tolist()


def test_pages_and_tables(folder):
    found, _ = dupes(Statistics(), folder / "train", folder / "test", threshold=0.999)
    duplicates.write_groups(found, folder / "groups.csv")
    rows = list(csv.DictReader(io.StringIO((folder / "groups.csv").read_text())))
    assert [(row["group"], row["set"], row["path"], row["kept"]) for row in rows] == [
        ("1", "train", "a b/0.png", "no"),
        ("1", "train", "big/copy of 0.jpg", "yes"),
        ("2", "train", "big/3.png", "no"),
        ("2", "test", "big/leak.jpg", "yes"),
    ]
    duplicates.write_page(found, folder / "page.html", "Copies & <leaks>")
    page = (folder / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4 and "Copies &amp; &lt;leaks&gt;" in page
    assert "http" not in page and "<script" not in page and "prefers-color-scheme: dark" in page
    assert page.index("Group 2: 2 images with test images") < page.index("Group 1: 2 images")


def test_an_embedding_file_gives_the_same_groups(folder):
    net = Statistics()
    embed(net, Folder(folder / "train"), folder / "train.parquet", name="x", world=World())
    plain, _ = dupes(net, folder / "train", threshold=0.999)
    stored, _ = dupes(net, folder / "train.parquet", threshold=0.999)
    assert stored.pairs.keys() == plain.pairs.keys() and stored.groups == plain.groups and stored.kept == plain.kept
    duplicates.write_list(stored, folder / "stored.txt")
    duplicates.write_list(plain, folder / "plain.txt")
    assert (folder / "stored.txt").read_text() == (folder / "plain.txt").read_text()
    (folder / "train").rename(folder / "elsewhere")
    assert len(dupes(net, folder / "train.parquet", threshold=0.999, mirrored=False)[0].groups) == 1
    with pytest.raises(UserError, match="mirrored=true reads them; give mirrored=false"):
        dupes(net, folder / "train.parquet", threshold=0.999)
    with pytest.raises(UserError, match="cannot be measured, since no image can be read; give threshold="):
        dupes(net, folder / "train.parquet")
    net.anchor.data += 1
    with pytest.raises(UserError, match=r"was made by another model \(x\)"):
        dupes(net, folder / "train.parquet", threshold=0.999)


def test_lists_of_what_are_no_files_are_refused_before_anything_is_computed(tmp_path):
    data = Planted()
    data.image = None
    with pytest.raises(UserError, match="no list can name them"):
        dupes(Statistics(), data, keep_list=tmp_path / "keep.txt")
    with pytest.raises(UserError, match="ends in .txt, .lst, .csv"):
        duplicates.check_list(tmp_path, tmp_path / "keep.json")


def test_command_line(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    small = ["data.count=16", "train.epochs=1", "teacher.warmup_temp_epochs=1", "evaluate.limit_bank=null"]
    assert cli.main(["train", "debug/tiny", "--out", "run", *small]) == 0
    capsys.readouterr()
    files = ["--csv", "groups.csv", "--page", "page.html", "--keep", "keep.txt"]
    assert cli.main(["dupes", "run", "train", "test", *files, "threshold=0.9999"]) == 0
    shown = capsys.readouterr().out
    assert "9 training images" in shown and "5 test images" in shown and "page: page.html" in shown
    assert cli.main(["dupes", "run", "train", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["train"] == 9 and set(result["measured"]["found"]) == set(KINDS)
    assert cli.main(["dupes", "run", "shapes", "data.count=20", "data.size=32"]) == 0
    assert "20 training images" in capsys.readouterr().out
    for words in (["--csv", "no/groups.csv"], ["treshold=0.9"], ["engine=annoy"], ["--keep", "keep.json"]):
        assert cli.main(["dupes", "run", "train", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_false_pairs_among_photographs_are_counted():
    """Every image of the pack is another one: what is found beside its known copies is false."""
    data = Folder(packs.unpack("clothing-fixtures"))
    found, measured = dupes(Statistics(), data)
    assert len(found.pairs) <= len(data) / 10, (len(found.pairs), measured)
