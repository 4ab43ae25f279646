import math

import pytest
import torch
from maskwise.functional import metrics
from maskwise.functional.metrics import average_precision, recall_at_k, revisited_map


def ap_by_steps(ranks, positives, ignored):
    """The area under the precision-recall polygon, walked image by image."""
    if not positives:
        return math.nan
    area = recall = 0.0
    hits = seen = 0
    precision = 1.0
    for image in ranks:
        if image in ignored:
            continue
        seen += 1
        hits += image in positives
        new_recall, new_precision = hits / len(positives), hits / seen
        area += (new_recall - recall) * (precision + new_precision) / 2
        recall, precision = new_recall, new_precision
    return area


def truths(count, g):
    order = torch.randperm(count, generator=g).tolist()
    return {"easy": order[:4], "hard": order[4:9], "junk": order[9:14]}


def test_revisited_against_walking_the_curve():
    g = torch.Generator().manual_seed(0)
    ranks = torch.stack([torch.randperm(40, generator=g) for _ in range(6)], dim=1)
    ground = [truths(40, g) for _ in range(6)]
    ground[2]["hard"] = []  # hard is undefined for this query
    ground[4] = {"easy": [], "hard": [], "junk": [1]}
    found = revisited_map(ranks, ground)
    rules = {"easy": (["easy"], ["junk", "hard"]), "medium": (["easy", "hard"], ["junk"]), "hard": (["hard"], ["junk", "easy"])}
    for level, (wanted, ignored) in rules.items():
        expected = []
        for q, truth in enumerate(ground):
            expected.append(ap_by_steps(ranks[:, q].tolist(), sum((truth[k] for k in wanted), []), sum((truth[k] for k in ignored), [])))
        assert found[level]["ap"].tolist() == pytest.approx(expected, abs=1e-12, nan_ok=True)
        kept = [value for value in expected if not math.isnan(value)]
        assert found[level]["map"] == pytest.approx(sum(kept) / len(kept), abs=1e-12)
    assert math.isnan(found["hard"]["ap"][2]) and not math.isnan(found["easy"]["ap"][2])


def test_the_trapezoid_is_not_plain_average_precision():
    """evaluation.md 0.5: one positive at rank 1 has precision 1/2 there, and half the area."""
    ap, mp = average_precision(torch.tensor([5, 3, 1]), torch.tensor([3]), torch.tensor([]), (1, 2, 10))
    assert ap == pytest.approx(0.25) and mp == [0.0, 0.5, 0.5]
    assert average_precision(torch.tensor([3, 5]), torch.tensor([3]), torch.tensor([]))[0] == 1.0


def test_junk_leaves_the_list_and_missing_positives_count():
    junk = torch.tensor([7, 8])
    assert average_precision(torch.tensor([7, 8, 3]), torch.tensor([3]), junk, (1,)) == (1.0, [1.0])
    assert average_precision(torch.tensor([3, 5]), torch.tensor([3, 9]), junk)[0] == 0.5  # 9 never came
    assert average_precision(torch.tensor([5, 6]), torch.tensor([3]), junk, (1, 5)) == (0.0, [0.0, 0.0])  # a list cut short


def test_precision_looks_no_further_than_the_last_positive():
    _, mp = average_precision(torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([1, 3]), torch.tensor([]), (1, 5, 10))
    assert mp == pytest.approx([1.0, 2 / 3, 2 / 3])


def recall_by_loop(features, labels, ks, gallery=None):
    queries = torch.nn.functional.normalize(features.double(), dim=1)
    bank, bank_labels = (queries, labels) if gallery is None else (torch.nn.functional.normalize(gallery[0].double(), dim=1), gallery[1])
    hits = dict.fromkeys(ks, 0)
    for i, query in enumerate(queries):
        others = [j for j in range(len(bank)) if gallery is not None or j != i]
        near = sorted(others, key=lambda j: (-float(query @ bank[j]), j))
        for k in ks:
            hits[k] += any(bank_labels[j] == labels[i] for j in near[:k])
    return {k: 100 * count / len(queries) for k, count in hits.items()}


def test_recall_against_a_loop(monkeypatch):
    g = torch.Generator().manual_seed(1)
    features, labels = torch.randn(60, 5, generator=g, dtype=torch.float64), torch.randint(12, (60,), generator=g)
    gallery = torch.randn(30, 5, generator=g, dtype=torch.float64), torch.randint(12, (30,), generator=g)
    for bank in (None, gallery):
        expected = recall_by_loop(features, labels, (1, 2, 4, 10), bank)
        assert recall_at_k(features, labels, (1, 2, 4, 10), bank) == pytest.approx(expected)
        monkeypatch.setattr(metrics, "_CELLS", 100)
        assert recall_at_k(features, labels, (1, 2, 4, 10), bank) == pytest.approx(expected)
        monkeypatch.undo()


def test_a_query_is_left_out_by_its_index_even_beside_its_double():
    """evaluation.md 9: dropping whatever ranks first would drop the double."""
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert recall_at_k(features, torch.tensor([0, 0, 1]), (1,)) == {1: pytest.approx(200 / 3)}
    assert recall_at_k(torch.ones(4, 2), torch.tensor([0, 1, 2, 3]), (1, 3)) == {1: 0.0, 3: 0.0}  # constant features, nobody alike


def test_constant_features_rank_by_index():
    assert recall_at_k(torch.ones(4, 2), torch.tensor([0, 1, 1, 0]), (1, 2, 3)) == {1: 25.0, 2: 75.0, 3: 100.0}


def test_recall_is_the_hit_rate_of_torchmetrics():
    import maskwise.nn.backbone  # noqa: F401  (torchvision beside a CPU-only torch)

    retrieval = pytest.importorskip("torchmetrics.retrieval")
    g = torch.Generator().manual_seed(2)
    features, labels = torch.randn(30, 4, generator=g), torch.randint(6, (30,), generator=g)
    unit = torch.nn.functional.normalize(features, dim=1)
    similarity = unit @ unit.T
    other = ~torch.eye(30, dtype=torch.bool)
    rows = torch.arange(30)[:, None].expand(30, 30)
    for k in (1, 4):
        hit = retrieval.RetrievalHitRate(top_k=k, empty_target_action="neg")(similarity[other], (labels[:, None] == labels)[other], indexes=rows[other])
        assert recall_at_k(features, labels, (k,))[k] == pytest.approx(100 * float(hit), abs=1e-4)
