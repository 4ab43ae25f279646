import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from functional.test_level_sets import contours_by_scipy, largest_by_scipy
from maskwise.errors import UserError
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
    scores = revisited_map(ranks, ground)
    rules = {
        "easy": (["easy"], ["junk", "hard"]),
        "medium": (["easy", "hard"], ["junk"]),
        "hard": (["hard"], ["junk", "easy"]),
    }
    for level, (wanted, ignored) in rules.items():
        expected = []
        for q, truth in enumerate(ground):
            expected.append(
                ap_by_steps(
                    ranks[:, q].tolist(), sum((truth[k] for k in wanted), []), sum((truth[k] for k in ignored), [])
                )
            )
        assert scores[level]["ap"].tolist() == pytest.approx(expected, abs=1e-12, nan_ok=True)
        finite = [value for value in expected if not math.isnan(value)]
        assert scores[level]["map"] == pytest.approx(sum(finite) / len(finite), abs=1e-12)
    assert math.isnan(scores["hard"]["ap"][2]) and not math.isnan(scores["easy"]["ap"][2])


def test_the_trapezoid_is_not_plain_average_precision():
    """One positive at rank 1 has precision 1/2 there, and half the area."""
    ap, mp = average_precision(torch.tensor([5, 3, 1]), torch.tensor([3]), torch.tensor([]), (1, 2, 10))
    assert ap == pytest.approx(0.25) and mp == [0.0, 0.5, 0.5]
    assert average_precision(torch.tensor([3, 5]), torch.tensor([3]), torch.tensor([]))[0] == 1.0


def test_junk_leaves_the_list_and_missing_positives_count():
    junk = torch.tensor([7, 8])
    assert average_precision(torch.tensor([7, 8, 3]), torch.tensor([3]), junk, (1,)) == (1.0, [1.0])
    assert average_precision(torch.tensor([3, 5]), torch.tensor([3, 9]), junk)[0] == 0.5  # 9 never came
    assert average_precision(torch.tensor([5, 6]), torch.tensor([3]), junk, (1, 5)) == (
        0.0,
        [0.0, 0.0],
    )  # a list cut short


def test_precision_looks_no_further_than_the_last_positive():
    _, mp = average_precision(torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([1, 3]), torch.tensor([]), (1, 5, 10))
    assert mp == pytest.approx([1.0, 2 / 3, 2 / 3])


def recall_by_loop(features, labels, ks, gallery=None):
    queries = torch.nn.functional.normalize(features.double(), dim=1)
    bank, bank_labels = (
        (queries, labels)
        if gallery is None
        else (torch.nn.functional.normalize(gallery[0].double(), dim=1), gallery[1])
    )
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
    """Dropping whatever ranks first would drop the double."""
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert recall_at_k(features, torch.tensor([0, 0, 1]), (1,)) == {1: pytest.approx(200 / 3)}
    assert recall_at_k(torch.ones(4, 2), torch.tensor([0, 1, 2, 3]), (1, 3)) == {
        1: 0.0,
        3: 0.0,
    }  # constant features, no duplicates


def test_constant_features_rank_by_index():
    assert recall_at_k(torch.ones(4, 2), torch.tensor([0, 1, 1, 0]), (1, 2, 3)) == {1: 25.0, 2: 75.0, 3: 100.0}


def test_recall_is_the_hit_rate_of_torchmetrics():
    import maskwise.nn.backbones.timm_registry  # noqa: F401  (torchvision beside a CPU-only torch)

    retrieval = pytest.importorskip("torchmetrics.retrieval")
    g = torch.Generator().manual_seed(2)
    features, labels = torch.randn(30, 4, generator=g), torch.randint(6, (30,), generator=g)
    unit = torch.nn.functional.normalize(features, dim=1)
    similarity = unit @ unit.T
    other = ~torch.eye(30, dtype=torch.bool)
    rows = torch.arange(30)[:, None].expand(30, 30)
    for k in (1, 4):
        hit = retrieval.RetrievalHitRate(top_k=k, empty_target_action="neg")(
            similarity[other], (labels[:, None] == labels)[other], indexes=rows[other]
        )
        assert recall_at_k(features, labels, (k,))[k] == pytest.approx(100 * float(hit), abs=1e-4)


def test_group_scatter_by_hand():
    """Two groups of two tokens, two classes: (0, 0), (2, 0) and (5, 6), (5, 2); then the same values twice."""
    values = torch.tensor([[[[0.0, 0.0], [2.0, 0.0]], [[5.0, 6.0], [5.0, 2.0]]]])
    within, between = metrics.group_scatter(values.double())
    # means (1, 0) and (5, 4), whole mean (3, 2); squares within 1, 1, 4, 4, between 4 + 4, 4 + 4, per 2 coordinates
    assert within.tolist() == [(1 + 1 + 4 + 4) / 4 / 2] and between.tolist() == [(8 + 8) / 2 / 2]
    drawn = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    within, between = metrics.group_scatter(drawn)
    whole = (drawn - drawn.mean((1, 2), keepdim=True)).square().mean((1, 2, 3))
    torch.testing.assert_close(within + between, whole)
    assert metrics.group_scatter(drawn[:, :, :1])[0].tolist() == [0.0] * 3


# masks


def shifted_squares(offset=0):
    """A square of 12 x 12 pixels on 40 x 60, moved to the right."""
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[10:22, 20 + offset : 32 + offset] = True
    return mask


def test_jaccard_by_hand():
    empty = torch.zeros(40, 60, dtype=torch.bool)
    assert metrics.jaccard(shifted_squares(), shifted_squares(4)) == (8 * 12) / (16 * 12)
    assert metrics.jaccard(empty, empty) == 1.0 and metrics.jaccard(empty, shifted_squares()) == 0.0


def test_boundary_f_by_hand():
    empty, square = torch.zeros(40, 60, dtype=torch.bool), shifted_squares()
    assert metrics.boundary_f(square, square) == 1.0
    assert metrics.boundary_f(empty, empty) == 1.0
    assert metrics.boundary_f(empty, square) == metrics.boundary_f(square, empty) == 0.0
    assert metrics.boundary_f(~empty, empty) == 1.0  # two masks without a boundary
    # ceil(.008 * 72.1) = 1 pixel. Boundary: rows 9, 21 of columns 19..31, columns 19, 31 of rows 9..21: 48 pixels.
    # At most 1 from that of columns 21..33 are 12 of 13 in each row, and (10, 31), (20, 31) below and above these.
    assert metrics.boundary_f(square, shifted_squares(2)) == pytest.approx(26 / 48)
    assert metrics.boundary_f(square, shifted_squares(1)) == 1.0
    assert metrics.boundary_f(square, shifted_squares(2), bound=0.02) == 1.0  # 2 pixels


def test_mask_boundary_at_the_edges():
    mask = torch.tensor([[0, 0, 1], [0, 0, 0], [1, 0, 1]]).bool()
    assert metrics.mask_boundary(mask).int().tolist() == [[0, 1, 1], [1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("radius", [0, 1, 3, 8, 40])
def test_dilation_equals_scipy(radius):
    ndimage = pytest.importorskip("scipy.ndimage")
    mask = torch.rand(33, 47, generator=torch.Generator().manual_seed(radius)) > 0.99
    y, x = torch.meshgrid(*[torch.arange(-radius, radius + 1)] * 2, indexing="ij")
    disk = (y**2 + x**2 <= radius**2).numpy()
    expected = ndimage.binary_dilation(mask.numpy(), structure=disk)
    assert metrics.dilate_disk(mask, radius).numpy().tolist() == expected.tolist()


def test_boundary_f_equals_a_second_derivation():
    """Distances between all pairs of boundary pixels, in float64, as the definition states."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(6):
        noise = torch.rand(2, 1, 9, 13, generator=generator)
        first, second = torch.nn.functional.interpolate(noise, size=(90, 130), mode="bicubic")[:, 0] > 0.5
        edges = []
        for mask in (first.tolist(), second.tolist()):
            edge = set()
            for row in range(90):
                for column in range(130):
                    others = [(row, column + 1), (row + 1, column), (row + 1, column + 1)]
                    if any(a < 90 and b < 130 and mask[a][b] != mask[row][column] for a, b in others):
                        edge.add((row, column))
            edges.append(torch.tensor(sorted(edge), dtype=torch.float64))
        distance = torch.cdist(*edges, compute_mode="donot_use_mm_for_euclid_dist")
        radius = 2  # ceil(.008 * 158.1)
        precision = (distance.amin(dim=1) <= radius).double().mean()
        recall = (distance.amin(dim=0) <= radius).double().mean()
        expected = float(2 * precision * recall / (precision + recall))
        assert metrics.boundary_f(first, second) == pytest.approx(expected, abs=1e-12)


def test_segmentation_scores_by_hand():
    confusion = torch.tensor([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    confusion[0, 2] = 2  # class 2 is predicted and never true, class 3 neither
    scores = metrics.segmentation_scores(confusion)
    assert scores["iou"][:3].tolist() == pytest.approx([6 / 11, 3 / 6, 0]) and scores["iou"][3].isnan()
    assert scores["miou"] == pytest.approx((6 / 11 + 3 / 6 + 0) / 3)
    assert scores["macc"] == pytest.approx((6 / 10 + 3 / 4) / 2)  # of the two classes that are there
    assert scores["aacc"] == pytest.approx(9 / 14)
    missed = metrics.segmentation_scores(torch.tensor([[6, 2, 2], [1, 3, 0]]))  # a column of no class
    assert missed["iou"].tolist() == pytest.approx([6 / 11, 3 / 6]) and missed["aacc"] == pytest.approx(9 / 14)


def test_segmentation_scores_equal_libraries():
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    truth, predicted = torch.randint(0, 5, (2, 4000), generator=generator)
    predicted = torch.where(torch.rand(4000, generator=generator) < 0.6, truth, predicted)
    table = torch.tensor(sklearn.confusion_matrix(truth, predicted))
    scores = metrics.segmentation_scores(table)
    assert scores["miou"] == pytest.approx(sklearn.jaccard_score(truth, predicted, average="macro"))
    assert scores["macc"] == pytest.approx(sklearn.recall_score(truth, predicted, average="macro"))
    assert scores["aacc"] == pytest.approx(sklearn.accuracy_score(truth, predicted))


def inclusive_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    shared = max(0, width) * max(0, height)
    areas = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
    return shared / (sum(areas) - shared)


def box_accuracy_by_thresholds(score_maps, boxes, largest_only):
    """1000 thresholds, one after the other, on SciPy's components; {iou: per cent}."""
    hits = {iou: np.zeros(1000) for iou in (0.3, 0.5, 0.7)}
    for score_map, truth in zip(score_maps, boxes):
        m = score_map.numpy()
        m = (m - m.min()) / (m.max() - m.min()) if m.max() > m.min() else np.zeros_like(m)
        levels = (m * 255).astype(np.uint8)
        best = {}
        for k, threshold in enumerate(np.arange(0, 1, 0.001)):
            level = int(threshold * levels.max())
            if level not in best:
                inside = levels > level
                found = contours_by_scipy(inside) or [(0, 0, -1, -1)]
                if largest_only and inside.any():
                    found = [largest_by_scipy(inside)]
                ends = [(x0, y0, min(x1 + 1, 223), min(y1 + 1, 223)) for x0, y0, x1, y1 in found]
                best[level] = max(inclusive_iou(box, other) for box in ends for other in truth.tolist())
            for iou, count in hits.items():
                count[k] += best[level] >= iou
    return {iou: 100 * count.max() / len(boxes) for iou, count in hits.items()}


@pytest.mark.parametrize("version", (1, 2))
def test_max_box_acc_is_that_of_a_thousand_thresholds(version):
    g = torch.Generator().manual_seed(3)
    maps = F.interpolate(torch.rand(6, 1, 3, 3, generator=g).double(), (224, 224), mode="bicubic")[:, 0]
    maps[5] = 0.25  # constant: no contour, one box of the first pixel
    corners = torch.randint(0, 120, (6, 2, 2), generator=g)
    boxes = list(torch.cat([corners, corners + torch.randint(40, 100, (6, 2, 2), generator=g)], dim=2))
    expected = box_accuracy_by_thresholds(maps, boxes, version == 1)
    result = metrics.max_box_acc(maps, boxes, version=version)
    assert {iou: result[iou] for iou in expected} == pytest.approx(expected)
    assert result["mean"] == pytest.approx(sum(expected.values()) / 3) and 0 < result["mean"] < 100


def test_max_box_acc_by_hand():
    score = torch.zeros(1, 224, 224)
    score[0, 20:100, 10:60] = 1.0  # its box ends one pixel behind: 10, 20, 60, 100 with 51 x 81 pixels
    assert metrics.max_box_acc(score, [torch.tensor([[10, 20, 60, 100]])]) == {
        "mean": 100,
        0.3: 100,
        0.5: 100,
        0.7: 100,
    }
    score[0, 110:, 224 - 70 :] = 0.4  # touches the right and lower edges: no pixel behind them
    far = torch.tensor([[200.0, 0.0, 210.0, 9.0], [154.0, 110.0, 223.0, 223.0]])
    assert metrics.max_box_acc(score, [far])["mean"] == 100, "any contour with any box"
    assert metrics.max_box_acc(score, [far], version=1)["mean"] == 100, "below .4 the second is the largest"
    score[0, 110:, 224 - 70 :] = 0.0
    assert metrics.max_box_acc(score, [far])["mean"] == 0
    # 51 x 81 pixels in 51 x 115.7: an IoU of .7 exactly, counted with inclusive pixels
    narrow = torch.zeros(1, 224, 224)
    narrow[0, 0:69, 0:9] = 1.0  # box 0..9, 0..69: 10 x 70
    assert metrics.max_box_acc(narrow, [torch.tensor([[0, 0, 9, 99]])])[0.7] == 100
    assert metrics.max_box_acc(narrow, [torch.tensor([[0, 0, 9, 100]])])[0.7] == 0


def test_each_iou_has_its_own_best_threshold_over_all_images():
    maps, box = torch.zeros(2, 224, 224), torch.tensor([[0, 0, 99, 99]])
    maps[0, :70, :70], maps[0, 70:99, :99] = 1.0, 0.3  # 71 x 71 pixels above .3, the whole box below
    maps[0, :70, 70:99] = 0.3
    maps[1, :70, :70] = 1.0
    maps[1, :223, :223] = maps[1, :223, :223].clamp(min=0.3)  # 71 x 71 above .3, the whole image below
    result = metrics.max_box_acc(maps, [box, box])
    assert result == {"mean": pytest.approx((100 + 100 + 50) / 3), 0.3: 100, 0.5: 100, 0.7: 50}


def test_score_maps_are_scaled_after_resizing_and_constant_ones_are_empty():
    rough = torch.tensor([[0.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    levels = metrics.quantized(rough)
    assert levels.shape == (224, 224) and levels.dtype == torch.uint8
    assert int(levels.min()) == 0 and int(levels.max()) == 255, "the cubic kernel under- and overshoots"
    resized = F.interpolate(rough[None, None], (224, 224), mode="bicubic")[0, 0]
    assert int(levels[200, 200]) == int(255 * (0 - resized.min()) / (resized.max() - resized.min())) > 0
    for empty in (torch.full((3, 3), 0.7), torch.tensor([[1.0, math.nan], [0.0, 0.0]])):
        assert metrics.quantized(empty).sum() == 0
        assert metrics.max_box_acc(empty[None], [torch.tensor([[0, 0, 0, 0]])])["mean"] == 100, "one box 0, 0, 0, 0"
        assert metrics.max_box_acc(empty[None], [torch.tensor([[5, 5, 9, 9]])])["mean"] == 0
    with pytest.raises(UserError, match="version is 3"):
        metrics.max_box_acc(rough[None], [torch.tensor([[0, 0, 9, 9]])], version=3)


def test_corloc_by_hand():
    truth = [
        torch.tensor([[0, 0, 10, 10], [50, 50, 60, 60]]),
        torch.tensor([[0.0, 0.0, 10.0, 10.0]]),
        torch.tensor([[0, 0, 9, 9]]),
        torch.zeros(0, 4),  # left out
    ]
    predicted = torch.tensor([[50, 50, 60, 65], [0, 0, 10, 5], [0, 0, 10, 20], [0, 0, 10, 10]])
    assert metrics.corloc(predicted, truth) == pytest.approx(200 / 3), (
        "an IoU of exactly .5 counts, pixels are exclusive"
    )
    assert math.isnan(metrics.corloc(torch.zeros(1, 4), [torch.zeros(0, 4)]))
    assert metrics.corloc(torch.zeros(1, 4), [torch.tensor([[0, 0, 0, 0]])]) == 0, "an empty box finds nothing"


def test_box_iou_is_torchvisions():
    from torchvision.ops import box_iou

    g = torch.Generator().manual_seed(1)
    corners = torch.rand(2, 9, 2, 2, generator=g, dtype=torch.float64).cumsum(2)
    a, b = corners.flatten(2)
    assert torch.allclose(metrics.box_iou(a, b), box_iou(a, b))
    assert torch.allclose(
        metrics.box_iou(a, b, inclusive=True), box_iou(a + torch.tensor([0, 0, 1, 1]), b + torch.tensor([0, 0, 1, 1]))
    )
