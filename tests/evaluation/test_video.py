"""Video object segmentation: propagation against loops, scores against the toolkit's, a video end to end."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from maskwise import api
from maskwise.data.benchmark_sets import davis
from maskwise.errors import UserError
from maskwise.evaluation import EVALUATIONS, video
from maskwise.functional import metrics
from maskwise.imaging.indexed_png import write_indexed_png
from maskwise.imaging.resize import resize_bilinear
from maskwise.nn.tokens import Features
from support import packs
from support.benchmark_folders import tiny_encoder
from support.planted import Plain

# propagation


def propagated_by_loops(target, context, labels, grid, radius, topk, temperature):
    """The definition in plain Python, patch by patch."""
    (height, width), frames, classes = grid, len(context), labels.shape[1]
    result = torch.zeros(classes, height, width, dtype=torch.float64)
    for i in range(height * width):
        votes = []
        for c in range(frames):
            for j in range(height * width):
                if radius and max(abs(i // width - j // width), abs(i % width - j % width)) > radius:
                    continue
                a, b = target[i], context[c, j]
                cosine = float((a * b).sum() / math.sqrt(float((a * a).sum())) / math.sqrt(float((b * b).sum())))
                votes.append((math.exp(cosine / temperature), labels[c, :, j // width, j % width]))
        votes = sorted(votes, key=lambda vote: -vote[0])[:topk]
        total = sum(weight for weight, _ in votes)
        result[:, i // width, i % width] = sum(weight * label for weight, label in votes) / total
    return result


@pytest.mark.parametrize("radius, topk, frames", [(1, 3, 2), (12, 5, 3), (0, 5, 1), (1, 5, 1), (2, 500, 2)])
def test_propagation_equals_loops(radius, topk, frames, monkeypatch):
    grid, g = (4, 6), torch.Generator().manual_seed(radius + topk)
    target, context = (torch.randn(*n, 24, 8, generator=g, dtype=torch.float64) for n in ((), (frames,)))
    labels = torch.rand(frames, 3, *grid, generator=g, dtype=torch.float64)  # soft, and not normalized
    expected = propagated_by_loops(target, context, labels, grid, radius, topk, 0.1)
    for cells in (1 << 25, 100):  # all targets at once, a few at a time
        monkeypatch.setattr(video, "_CELLS", cells)
        soft = video.propagate_labels(target, context, labels, grid, radius=radius, topk=topk)
        assert torch.allclose(soft, expected, atol=1e-12)


def test_the_votes_of_all_frames_compete():
    """The largest votes over all frames together, not of each frame."""
    target = torch.tensor([[1.0, 0.0]])
    context = torch.tensor([[[1.0, 0.0]], [[1.0, 0.2]], [[0.0, 1.0]]])
    labels = torch.tensor([1.0, 2.0, 4.0]).reshape(3, 1, 1, 1)
    first, second = math.exp(10), math.exp(10 / math.sqrt(1.04))
    two = video.propagate_labels(target, context, labels, (1, 1), topk=2)
    assert float(two) == pytest.approx((first + 2 * second) / (first + second), rel=1e-5)
    assert float(video.propagate_labels(target, context, labels, (1, 1), topk=1)) == pytest.approx(1.0)


# masks and scores


def test_labels_at_the_grid_and_back():
    ids = torch.zeros(40, 60, dtype=torch.int64)
    ids[:20], ids[39, 59] = 2, 3  # the third object is one pixel, which is lost
    small = video.patch_labels(ids, (4, 6))
    assert small.shape == (3, 4, 6) and small.sum(0).eq(1).all() and small[2].sum() == 12 and small[1].sum() == 0
    large = video.hard_labels(small, (64, 96), (40, 60))
    assert torch.equal(large.long(), torch.where(ids == 3, 0, ids)) and large.dtype == torch.uint8


def test_each_label_is_scaled_before_the_largest_is_taken():
    """A faint object wins where it is strongest, as in the released script."""
    soft = torch.full((2, 2, 2), 0.0)
    soft[0], soft[1, 0, 0] = torch.tensor([[0.9, 0.9], [1.0, 1.0]]), 0.1
    assert video.hard_labels(soft, (2, 2), (2, 2)).tolist() == [[1, 0], [0, 0]]
    assert video.hard_labels(torch.ones(1, 2, 2), (2, 2), (2, 2)).tolist() == [[0, 0], [0, 0]]


def test_statistics_by_hand():
    values = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    scores = video.statistics(values)
    # quarters by round(linspace(1, 8, 5)) = 1, 3, 4, 6, 8: frames 1..3 and 6..8
    assert scores["mean"] == pytest.approx(0.55) and scores["recall"] == 4 / 8
    assert scores["decay"] == pytest.approx(0.8 - 0.3)


def test_scores_of_objects_leave_the_first_and_last_frame_out():
    truth = [torch.zeros(20, 20, dtype=torch.uint8) for _ in range(4)]
    for ids in truth:
        ids[2:8, 2:8], ids[12:18, 12:18] = 1, 2
    predicted = [ids.clone() for ids in truth]
    predicted[0][:], predicted[3][:] = 0, 0
    predicted[2][truth[2] == 2] = 0  # the second object is missed once
    scores = video.object_scores(predicted, truth)
    assert scores == {1: {"j": [1.0, 1.0], "f": [1.0, 1.0]}, 2: {"j": [1.0, 0.0], "f": [1.0, 0.0]}}
    predicted[1][0, 0] = 3
    with pytest.raises(UserError, match="have object 3, and the first mask has 2"):
        video.object_scores(predicted, truth)


def test_means_are_over_objects():
    row = {f"{name}_{kind}": 0.0 for name in "jf" for kind in ("mean", "recall", "decay")}
    scores = {"a_1": row | {"j_mean": 90.0}, "b_1": row | {"f_mean": 30.0}, "b_2": row | {"j_mean": 30.0}}
    means = video.object_means(scores)
    assert means["j_mean"] == 40.0 and means["f_mean"] == 10.0 and means["jf_mean"] == 25.0


@pytest.mark.slow
def test_scores_equal_those_of_the_toolkit():
    """Predictions of OSVOS and the numbers of the official code, frame by frame and in the mean."""
    folder = packs.unpack("davis-mini")
    reference = json.loads((folder / "reference_scores.json").read_text())["sequences"]
    sequences = {sequence.name: sequence for sequence in davis.read(folder)["test"]}
    assert sequences.keys() == reference.keys()
    for name, expected in reference.items():
        truth = [sequences[name].mask(i).bool() for i in range(len(sequences[name].frames))]
        files = sorted((folder / "predictions" / "osvos" / name).glob("*.png"))
        predicted = [torch.from_numpy(np.array(Image.open(file)) > 0) for file in files]
        assert len(files) == len(truth) == expected["frames"]
        for key, score in (("J", metrics.jaccard), ("F", metrics.boundary_f)):
            assert [score(p, t) for p, t in zip(predicted, truth)] == pytest.approx(expected[key], abs=2e-6)
        scores = video.object_scores([p.to(torch.uint8) for p in predicted], [t.to(torch.uint8) for t in truth])[1]
        for key, name_ in (("mean_J", "j"), ("mean_F", "f")):
            assert video.statistics(scores[name_])["mean"] == pytest.approx(expected[key], abs=1e-4)


def test_indexed_png_has_the_palette_of_davis(tmp_path):
    ids = np.array([[0, 1, 2], [3, 9, 255]], dtype=np.uint8)
    write_indexed_png(tmp_path / "a" / "00000.png", ids)
    with Image.open(tmp_path / "a" / "00000.png") as picture:
        assert picture.mode == "P" and np.array(picture).tolist() == ids.tolist()
        colors = np.array(picture.convert("RGB")).reshape(-1, 3).tolist()
    assert colors == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [191, 0, 0], [255, 255, 255]]


def test_void_pixels_are_background(tmp_path):
    for ids, expected in (([[0, 255]], [[0, 1]]), ([[2, 255]], [[2, 0]])):
        write_indexed_png(tmp_path / "mask.png", np.array(ids, dtype=np.uint8))
        assert davis.Sequence("a", None, [tmp_path / "mask.png"]).mask(0).tolist() == expected


# frames


def test_sizes_of_frames():
    view = video.ResizedFrame(480, (16, 16), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert view.size((480, 854)) == (480, 832) and view.size((854, 480)) == (832, 480)
    assert view.size((1080, 1920)) == (480, 832) and view.size((480, 910)) == (480, 896)
    assert video.ResizedFrame(480, (14, 14), (), ()).size((480, 854)) == (476, 840)
    white = view(torch.full((3, 480, 854), 255, dtype=torch.uint8), 0)
    assert white[:, 0, 0].tolist() == pytest.approx([0.515 / 0.228, 0.544 / 0.224, 0.594 / 0.225])


def test_bilinear_resizing_equals_opencv():
    cv2 = pytest.importorskip("cv2")
    image = torch.randint(0, 256, (3, 50, 89), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for size in ((48, 64), (100, 120), (25, 30)):
        theirs = cv2.resize(image.permute(1, 2, 0).numpy(), size[::-1])
        ours = resize_bilinear(image, size).permute(1, 2, 0).numpy()
        assert np.abs(theirs.astype(int) - ours.astype(int)).max() <= 1


# end to end


class Colorful(Plain):
    """An encoder whose patch tokens are the mean colors of patches of 16 pixels."""

    patch_size = (16, 16)

    def __init__(self):
        super().__init__(3)

    def forward(self, images, **requests):
        maps = torch.nn.functional.avg_pool2d(images, 16)
        patches = maps.flatten(2).transpose(1, 2) - 0.5
        return Features(patches.mean(1), patches, None, tuple(maps.shape[-2:]))


def moving_squares(root, frames=6, name="squares"):
    """A video of a red and a green square that move over a blue ground by one patch per frame, in DAVIS's layout."""
    for i in range(frames):
        pixels = np.zeros((480, 854, 3), dtype=np.uint8)
        pixels[..., 2] = 200
        ids = np.zeros((480, 854), dtype=np.uint8)
        for label, (top, left) in enumerate([(96, 64 + 16 * i), (288, 480 - 16 * i)], start=1):
            pixels[top : top + 96, left : left + 96] = np.eye(3, dtype=np.uint8)[label - 1] * 220
            ids[top : top + 96, left : left + 96] = label
        folder = root / "JPEGImages" / "480p" / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i:05d}.jpg", quality=95)
        write_indexed_png(root / "Annotations" / "480p" / name / f"{i:05d}.png", ids)
    (root / "ImageSets" / "2017").mkdir(parents=True, exist_ok=True)
    with open(root / "ImageSets" / "2017" / "val.txt", "a") as file:
        file.write(f"{name}\n")
    return root


def test_squares_are_followed(tmp_path):
    root, out = moving_squares(tmp_path / "DAVIS"), tmp_path / "masks"
    report = api.evaluate("video", Colorful(), test=tmp_path, masks=str(out))
    assert report.numbers["j_mean"] > 90 and report.numbers["j_recall"] == 100.0 and abs(report.numbers["j_decay"]) < 5
    assert report.numbers["jf_mean"] == (report.numbers["j_mean"] + report.numbers["f_mean"]) / 2
    assert set(report.protocol["objects"]) == {"squares_1", "squares_2"} and report.protocol["differences"] == []
    files = sorted((out / "squares").iterdir())
    assert [file.name for file in files] == [f"{i:05d}.png" for i in range(6)]
    with Image.open(files[0]) as first, Image.open(root / "Annotations/480p/squares/00000.png") as truth:
        assert np.array_equal(np.array(first), np.array(truth)) and first.mode == "P"
    sequence = davis.read(root)["test"][0]
    predicted = [torch.from_numpy(np.array(Image.open(file))) for file in files]
    scores = video.object_scores(predicted, [sequence.mask(i).to(torch.uint8) for i in range(6)])
    assert report.numbers["j_mean"] == pytest.approx(100 * np.mean([np.mean(row["j"]) for row in scores.values()]))


def test_the_first_frame_and_the_last_ones_vote(tmp_path, monkeypatch):
    moving_squares(tmp_path, frames=6)
    seen, original = [], video.propagate_labels

    def spy(target, context, labels, grid, **options):
        seen.append((len(context), options))
        return original(target, context, labels, grid, **options)

    monkeypatch.setattr(video, "propagate_labels", spy)
    report = api.evaluate("video", Colorful(), test=tmp_path, previous=3, topk=4)
    assert [count for count, _ in seen] == [1, 2, 3, 4, 4]
    assert seen[0][1] == {"radius": 12, "topk": 4, "temperature": 0.1}
    assert report.protocol["differences"] == ["previous=3 instead of 7", "topk=4 instead of 5"]


def test_an_encoder_of_patches(tmp_path):
    """A Vision Transformer on two videos; ranks share the videos."""
    for name in ("one", "two"):
        moving_squares(tmp_path, frames=4, name=name)
    data = davis.read(tmp_path)
    report = EVALUATIONS["video"](tiny_encoder(), data, short_side=64)
    assert set(report.protocol["objects"]) == {"one_1", "one_2", "two_1", "two_2"}
    assert report.numbers["j_mean"] > 0 and report.protocol["differences"] == ["short_side=64 instead of 480"]

    class Second:
        rank, size = 1, 2

        def gather_objects(self, value):
            return [value]

    half = EVALUATIONS["video"](tiny_encoder(), data, Second(), short_side=64)
    assert {name: row for name, row in report.protocol["objects"].items() if name in half.protocol["objects"]} == (
        half.protocol["objects"]
    )
    assert set(half.protocol["objects"]) == {"two_1", "two_2"}


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="these are no videos; give test=FOLDER in the layout of DAVIS"):
        EVALUATIONS["video"](tiny_encoder(), {"test": [1]})
    moving_squares(tmp_path, frames=3)
    (tmp_path / "JPEGImages/480p/squares/00001.jpg").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="squares has frames that cannot be read: 00001.jpg"):
        api.evaluate("video", tiny_encoder(), test=tmp_path, short_side=64)
    with pytest.raises(UserError, match="radius is -1"):
        api.evaluate("video", tiny_encoder(), test=tmp_path, radius=-1)


def test_soft_labels_vote_in_later_frames(tmp_path, monkeypatch):
    moving_squares(tmp_path, frames=4)
    given, made, original = [], [], video.propagate_labels

    def spy(target, context, labels, grid, **options):
        given.append(labels)
        made.append(original(target, context, labels, grid, **options))
        return made[-1]

    monkeypatch.setattr(video, "propagate_labels", spy)
    api.evaluate("video", Colorful(), test=tmp_path, topk=1500)  # more than a square has
    assert torch.equal(given[2], torch.stack([given[0][0], made[0], made[1]]))
    assert ((made[0] > 0.01) & (made[0] < 0.99)).any()
