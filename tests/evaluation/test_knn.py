import math

import pytest
import torch

from maskwise.errors import UserError
from maskwise.evaluation import EVALUATIONS
from maskwise.evaluation import knn as knn_module
from maskwise.evaluation.features import extract
from maskwise.evaluation.knn import accuracies, few_shot_indices, knn, knn_classify, nearest, votes
from maskwise.evaluation.report import Report
from support import packs


def golden(dtype):
    bank = torch.tensor([0.0, 0.1, 0.2, 0.5, 0.55, 0.6], dtype=dtype)
    queries = torch.tensor([0.28, 0.33, 0.36, 0.40], dtype=dtype)
    return (
        torch.stack([bank.cos(), bank.sin()], 1),
        torch.tensor([0, 0, 0, 1, 1, 1]),
        torch.stack([queries.cos(), queries.sin()], 1),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_votes(dtype):
    bank, labels, queries = golden(dtype)
    similarity, index = nearest(bank, queries, 4)
    expected = [(2799332.8, 2087896.9), (2517155.5, 2436630.0), (1333406.6, 3691734.0), (1203748.3, 4056975.0)]
    for row, pair in zip(votes(similarity, labels[index], 2).tolist(), expected):
        assert row == pytest.approx(pair, rel=1e-6)
    assert knn_classify(bank, labels, queries, 4)[:, 0].tolist() == [0, 0, 1, 1]


def by_loop(bank, labels, queries, k, temperature, classes):
    """A second derivation, in Python floats."""
    ranking = []
    unit = lambda v: [x / math.sqrt(sum(y * y for y in v)) for x in v]
    bank = [unit(v) for v in bank.tolist()]
    for query in queries.tolist():
        query = unit(query)
        near = sorted(range(len(bank)), key=lambda i: -sum(a * b for a, b in zip(bank[i], query)))[:k]
        score = [0.0] * classes
        for i in near:
            score[labels[i]] += math.exp(sum(a * b for a, b in zip(bank[i], query)) / temperature)
        ranking.append(sorted(range(classes), key=lambda c: -score[c]))
    return ranking


@pytest.mark.parametrize("n, q, k, classes", [(1, 1, 1, 1), (3, 2, 200, 4), (40, 7, 5, 3), (60, 20, 20, 30)])
def test_against_a_loop(n, q, k, classes):
    g = torch.Generator().manual_seed(n)
    bank, queries = (torch.randn(rows, 6, generator=g, dtype=torch.float64) for rows in (n, q))
    labels = torch.randint(classes, (n,), generator=g)
    classified = knn_classify(bank, labels, queries, k, 0.07, classes)
    assert classified.shape == (q, classes) and classified.dtype == torch.int64
    assert classified.tolist() == by_loop(bank, labels.tolist(), queries, min(k, n), 0.07, classes)


def test_classes_without_a_vote_come_last_in_index_order():
    bank, labels = torch.tensor([[1.0, 0.0], [-1.0, 0.1]]), torch.tensor([4, 2])
    assert knn_classify(bank, labels, torch.tensor([[1.0, 0.0]]), 1, num_classes=7).tolist() == [[4, 0, 1, 2, 3, 5, 6]]
    # A vote of almost zero weight is still a vote.
    assert knn_classify(bank, labels, torch.tensor([[1.0, 0.0]]), 2, 0.001, num_classes=6).tolist() == [
        [4, 2, 0, 1, 3, 5]
    ]
    assert knn_classify(bank, labels, torch.tensor([[1.0, 0.0]]), 1).shape == (1, 5)


def test_scale_and_order_of_the_bank_do_not_matter():
    g = torch.Generator().manual_seed(0)
    bank, queries, labels = (
        torch.randn(300, 16, generator=g),
        torch.randn(50, 16, generator=g),
        torch.randint(10, (300,), generator=g),
    )
    plain = knn_classify(bank, labels, queries, 20)
    shuffle = torch.randperm(300, generator=g)
    assert torch.equal(plain, knn_classify(bank[shuffle], labels[shuffle], queries, 20))
    assert torch.equal(plain, knn_classify(bank * 8, labels, queries / 4, 20))
    assert torch.equal(plain, knn_classify(bank * torch.rand(300, 1, generator=g).add(0.5), labels, queries, 20))


def test_chunks_of_bank_and_queries_do_not_change_results(monkeypatch):
    g = torch.Generator().manual_seed(0)
    bank, queries, labels = (
        torch.randn(500, 8, generator=g),
        torch.randn(60, 8, generator=g),
        torch.randint(9, (500,), generator=g),
    )
    whole, near = knn_classify(bank, labels, queries, 30), nearest(bank, queries, 30)[1]
    monkeypatch.setattr(knn_module, "_CELLS", 100)
    monkeypatch.setattr(knn_module, "_PIECE", 64)
    assert torch.equal(whole, knn_classify(bank, labels, queries, 30))
    assert torch.equal(near, nearest(bank, queries, 30)[1])


def test_no_query_and_no_bank():
    assert knn_classify(torch.randn(3, 2), torch.tensor([0, 1, 1]), torch.zeros(0, 2), 5).shape == (0, 2)
    with pytest.raises(UserError, match="at least one training image"):
        knn_classify(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), torch.randn(1, 2), 5)


def test_top_five_counts_the_first_min_5_k():
    bank, labels = torch.eye(8), torch.arange(8)
    queries = torch.eye(8)[[3]] + 0.01
    accuracy = accuracies(bank, labels, queries, torch.tensor([0]), (1, 8))
    assert accuracy == {1: {1: 0.0, 5: 0.0}, 8: {1: 0.0, 5: 100.0}}


def test_few_shot_takes_files_in_their_order():
    """Few-shot protocol of AttMask."""
    labels = torch.tensor([1, 0, 1, 0, 0, 1, 2, 1])
    assert few_shot_indices(labels, 2, 0).tolist() == [0, 1, 2, 3, 6]
    assert few_shot_indices(labels, 1, 1).tolist() == [2, 3]
    assert few_shot_indices(labels, 2, 2).tolist() == [4, 5, 7]
    assert few_shot_indices(labels, 5, 9).tolist() == []
    grouped = torch.arange(1000).repeat_interleave(30)
    assert few_shot_indices(grouped, 5, 10).tolist() == [30 * c + i for c in range(1000) for i in range(10, 15)]


class Vectors:
    """Images of one color each; the class decides the color."""

    def __init__(self, n, classes=3, seed=0):
        self.labels, self.classes = torch.arange(n) % classes, [str(c) for c in range(classes)]
        noise = torch.randint(0, 40, (n, 3), generator=torch.Generator().manual_seed(seed))
        self.colors = (
            noise + 60 * torch.eye(3, dtype=torch.int64)[self.labels % 3] * (1 + self.labels[:, None] // 3)
        ).to(torch.uint8)

    def __len__(self):
        return len(self.labels)

    def image(self, i):
        return self.colors[i].view(3, 1, 1).expand(3, 5 + i % 3, 6)

    def name(self, i):
        return f"{i}.png"

    def fingerprint(self):
        return str(self.colors.sum().item())


class Colors(torch.nn.Module):
    """An encoder whose feature is the mean color."""

    mean, std, dim = torch.full((3,), 0.5), torch.full((3,), 0.25), 3

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(3))

    def transform(self, image):
        return image[:, :4, :4].float() / 255 - 0.2

    def forward(self, images, mask=None, *, attention=True, keys=False, layers=()):
        patches = images.flatten(2).transpose(1, 2) @ self.weight
        return type("Features", (), {"pooled": patches.mean(1), "patches": patches})()


def test_the_evaluation_end_to_end(tmp_path):
    report = knn(
        Colors(), {"train": Vectors(30), "test": Vectors(9, seed=1)}, k=[1, 10, 200], pixels=4, few_shot=(1, 5)
    )
    assert report.numbers["top1"] == report.numbers["pooled_top1_k1"] == 100.0
    assert {
        f"{name}_top{top}_k{k}" for name in ("pooled", "patch_mean", "pixels") for top in (1, 5) for k in (1, 10, 30)
    } <= set(report.numbers)
    assert report.numbers["pooled_few_shot_1"] == 100.0
    assert (
        report.protocol["k"] == [1, 10, 30]
        and report.protocol["k_asked"] == [1, 10, 200]
        and report.protocol["queries"] == 9
    )
    assert report.cost["images"] == 39 and report.cost["seconds"] >= 0 and len(report.data_hash) == 64
    again = Report.load(report.save(tmp_path / "reports" / "knn.json"))
    assert again.numbers == report.numbers and again.data_hash == report.data_hash
    assert EVALUATIONS["knn"].run is knn


def test_data_hash_depends_on_train_and_test():
    one, other = Vectors(12), Vectors(12, seed=5)
    hashes = [
        knn(Colors(), {"train": train, "test": one}, k=5, feature="pooled").data_hash for train in (one, one, other)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_tiny_set_and_class_without_training_images():
    report = knn(Colors(), {"train": Vectors(2, classes=2), "test": Vectors(1, classes=1)}, k=(10, 20))
    assert report.numbers["top1"] == 100.0 and report.protocol["k"] == [2]
    strange = Vectors(4, classes=1)
    strange.labels = strange.labels + 7
    with pytest.raises(UserError, match="k-NN: the test images have 1 class unknown to the training images: 7;"):
        knn(Colors(), {"train": Vectors(6), "test": strange}, k=3)
    strange.classes = None
    assert knn(Colors(), {"train": Vectors(6), "test": strange}, k=3, feature="pooled").numbers["top1"] == 0.0


class Half:
    """Rank r of 2; its sums are stored for the other."""

    size = 2

    def __init__(self, rank):
        self.rank, self.sums = rank, []

    def all_sum(self, tensor):
        self.sums.append(tensor)
        return tensor


def test_ranks_share_the_queries():
    g = torch.Generator().manual_seed(0)
    bank, labels, queries, truth = (
        torch.randn(50, 4, generator=g),
        torch.randint(5, (50,), generator=g),
        torch.randn(21, 4, generator=g),
        torch.randint(5, (21,), generator=g),
    )
    halves = [Half(0), Half(1)]
    for half in halves:
        accuracies(bank, labels, queries, truth, (1, 7), world=half)
    hits, total = (sum(pair) for pair in zip(*(half.sums for half in halves)))
    whole = accuracies(bank, labels, queries, truth, (1, 7))
    assert total.item() == 21
    assert (100 * hits / total).flatten().tolist() == pytest.approx([whole[k][top] for k in (1, 7) for top in (1, 5)])


@pytest.mark.parametrize(
    "options, word",
    [
        ({"k": 0}, "k >= 1"),
        ({"k": []}, "k >= 1"),
        ({"feature": "cls"}, "pooled or patch_mean"),
        ({"feature": ()}, "no feature"),
        ({"temperature": 0}, "above 0"),
        ({"few_shot": 3}, "1, 5, 10, 20"),
    ],
)
def test_mistakes_are_refused(options, word):
    with pytest.raises(UserError, match=word) as raised:
        knn(Colors(), {"train": Vectors(6), "test": Vectors(3)}, **options)
    assert "\n" not in str(raised.value)


def test_sets_without_labels_are_refused():
    bare = Vectors(6)
    bare.labels = None
    for data in ({"train": bare, "test": Vectors(3)}, {"train": Vectors(3), "test": bare}, {"train": Vectors(3)}):
        with pytest.raises(UserError, match="needs labels"):
            knn(Colors(), data)


def test_reports_that_cannot_be_written_or_read(tmp_path):
    (tmp_path / "file").write_text("x")
    report = Report({"a": float("nan"), "b": (1, torch.tensor(2.5))}, {}, "", {})
    with pytest.raises(UserError, match="cannot write"):
        report.save(tmp_path / "file" / "report.json")
    with pytest.raises(UserError, match="is not a report"):
        Report.load(tmp_path / "file")
    assert Report.load(report.save(tmp_path / "report.json")).numbers == {"a": None, "b": [1, 2.5]}


@pytest.mark.slow
def test_raw_pixels_on_cifar():
    """Baseline: 39.3 % of 2,000 test images by 10,000 training images, k = 20."""
    from maskwise.data.datasets.folder import Folder

    folder = packs.unpack("cifar10-jpeg-small")
    train, test = (extract.pixels(Folder(folder, split=split), 32) for split in ("train", "val"))
    assert accuracies(train.pooled, train.labels, test.pooled, test.labels, (20,))[20][1] == pytest.approx(
        39.3, abs=0.1
    )
