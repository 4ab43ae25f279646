"""Tables of attention and patches on the packs: layouts of coco200, rows that go on, and a miniature of the whole."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import maskwise
from launch.reproduce import dense_packs, derived_sets
from launch.reproduce.dense_packs import Measurement
from maskwise.bench import record
from maskwise.data.benchmark_sets import boxed, label_maps
from support import packs

TINY = ("data.count=16", "train.epochs=1", "evaluate.knn_every=0", "evaluate.pictures_every=0")


@pytest.fixture
def coco(tmp_path):
    """The pack's layout with two images: a square and a triangle in the first, nothing in the second."""
    pack = tmp_path / "pack"
    for part in ("train2017", "val2017"):
        (pack / "images" / part).mkdir(parents=True)
        (pack / "semantic_segmentation" / "masks" / part).mkdir(parents=True)
        (pack / "instance_segmentation" / "labels" / part).mkdir(parents=True)
        for name in ("a", "b"):
            Image.new("RGB", (40, 20), (90, 120, 30)).save(pack / "images" / part / f"{name}.jpg")
            Image.new("L", (40, 20), 3).save(pack / "semantic_segmentation" / "masks" / part / f"{name}.png")
    lines = ["7 .25 .1 .5 .1 .5 .6 .25 .6", "2 .5 .5 1 .5 .75 1"]
    (pack / "instance_segmentation" / "labels" / "val2017" / "a.txt").write_text("\n".join(lines))
    return pack


def test_layouts_of_coco200(coco, tmp_path):
    images = boxed.read(derived_sets.coco_boxes(coco, tmp_path / "boxes"))["test"]
    assert len(images) == 2 and len(boxed.boxes_of(images, 1)) == 0
    assert torch.equal(boxed.boxes_of(images, 0), torch.tensor([[10.0, 2, 20, 12], [20, 10, 40, 20]]))
    mask = boxed.object_mask(images, 0, (20, 40))
    assert mask[2:12, 10:20].all() and not mask[:9, 22:].any() and mask[11, 30] and not mask[18, 21]
    maps = label_maps.read(derived_sets.coco_label_maps(coco, tmp_path / "maps"))
    assert {role: len(part) for role, part in maps.items()} == {"train": 2, "test": 2}
    assert derived_sets.coco_boxes(coco, tmp_path / "boxes") == tmp_path / "boxes", "written once"


def test_things_of_coco200_are_the_pixels_of_countable_segments(coco, tmp_path):
    """Segment numbers are R + 256 G + 65536 B: two things, one stuff, and a column of no segment."""
    for part in ("train2017", "val2017"):
        folder = coco / "panoptic_segmentation" / "annotations" / f"panoptic_{part}"
        folder.mkdir(parents=True)
        colors = np.zeros((20, 40, 3), dtype=np.uint8)
        colors[:, 1:10], colors[:, 10:20], colors[:, 20:] = (7, 0, 0), (0, 7, 0), (7, 0, 7)
        named = [
            {"id": 7, "category_id": 1},
            {"id": 7 * 256, "category_id": 9},
            {"id": 7 + 7 * 65536, "category_id": 1},
        ]
        table = {"categories": [{"id": 1, "isthing": 1}, {"id": 9, "isthing": 0}], "annotations": []}
        for name in ("a", "b"):
            Image.fromarray(colors).save(folder / f"{name}.png")
            table["annotations"].append({"file_name": f"{name}.png", "segments_info": named})
        folder.with_suffix(".json").write_text(json.dumps(table))
    things = label_maps.read(derived_sets.coco_things(coco, tmp_path / "things"))
    assert {role: len(part) for role, part in things.items()} == {"train": 2, "test": 2}
    expected = torch.tensor([label_maps.IGNORED] + [1] * 9 + [0] * 10 + [1] * 20).expand(20, 40)
    assert torch.equal(things["test"].label_map(1), expected) and things["test"].class_names == ["stuff", "thing"]
    assert derived_sets.coco_things(coco, tmp_path / "things") == tmp_path / "things", "written once"


@pytest.fixture
def run(tmp_path):
    """A run of 16 drawn images."""
    maskwise.train(maskwise.read_recipe("debug/tiny", *TINY), out=tmp_path / "run", quiet=True)
    return tmp_path / "run"


def test_rows_are_measured_once_and_again_for_another_checkpoint_or_option(run, tmp_path, capsys, monkeypatch):
    measured = []

    def measure(measurement, encoder):
        measured.append((measurement.title, type(encoder).__name__))
        numbers = {"max_box_acc_v2": 10.0 * len(measured), "max_box_acc": 2.25, "center_max_box_acc_v2": 50.0}
        return {"numbers": numbers, "images": {"test": 3}, "data_hash": "", "seconds": 1.5}

    monkeypatch.setattr(dense_packs, "unpack", lambda pack, work: work)
    options = {"size": 96}
    boxes = Measurement("boxes", "localization", {"test": [1, 2, 3]}, options)
    monkeypatch.setattr(dense_packs, "measurements", lambda *_: [boxes])
    monkeypatch.setattr(dense_packs, "measure", measure)
    words = ["--packs", str(tmp_path), "--model", f"ours={run}", "--out", str(tmp_path / "dense.md")]
    assert dense_packs.main(words) == 0 and len(measured) == 2
    assert dense_packs.main(words) == 0 and len(measured) == 2, "the same rows are not measured again"
    page = (tmp_path / "dense.md").read_text()
    assert "| ours | 10.0 | 2.2 | 2 |" in page and "| untrained, cls | 20.0 | 2.2 | 2 |" in page
    assert "The same for all: center_max_box_acc_v2 50.0." in page and "boxes: localization (3 test images)" in page
    last = run / "checkpoints" / "last"
    step = last.read_text().strip()
    (run / "checkpoints" / step).rename(run / "checkpoints" / "step_00000001")
    last.write_text("step_00000001\n")
    monkeypatch.setattr(dense_packs.maskwise, "load", lambda run: torch.nn.Identity())
    monkeypatch.setattr(torch.nn.Identity, "image_size", 32, raising=False)
    monkeypatch.setattr(torch.nn.Identity, "crop_pct", 1.0, raising=False)
    assert dense_packs.main(words) == 0 and measured[2:] == [("boxes", "Identity")], "only the other checkpoint"
    options["size"] = 64
    assert dense_packs.main(words) == 0 and len(measured) == 5, "another option"
    rows = json.loads((tmp_path / "dense.json").read_text())["rows"]
    assert sorted((row["encoder"], row["step"]) for row in rows) == [("ours", "step_00000001"), ("untrained, cls", "")]
    third = Measurement("maps", "knn_segmentation", {"test": [1]}, {})
    monkeypatch.setattr(dense_packs, "measurements", lambda *_: [third, boxes])
    results = {
        "ours": {"miou": 1.0, "macc": 2.0, "aacc": 3.0},
        "untrained, cls": {"miou": 4.0, "macc": 5.0, "aacc": 6.0},
    }

    def backwards(plan, todo, processes):
        assert processes == 2 and plan.models == (("ours", run),) and plan.scale == 1.0
        for key, number, name in reversed(todo):
            assert number == 0, "boxes are measured already"
            yield key | {"numbers": results[name], "images": {"test": 1}, "data_hash": "", "seconds": 2.5}

    monkeypatch.setattr(dense_packs, "side_by_side", backwards)
    assert dense_packs.main([*words, "--processes", "2"]) == 0 and len(measured) == 5
    rows = json.loads((tmp_path / "dense.json").read_text())["rows"]
    names = ["ours", "untrained, cls"]
    assert [(row["data"], row["encoder"]) for row in rows] == [(d, n) for d in ("maps", "boxes") for n in names]
    assert [row["numbers"].get("miou") for row in rows] == [1.0, 4.0, None, None]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        dense_packs.main([*words[:3], f"ours={tmp_path / 'nowhere'}", *words[4:]])
    assert "no finished checkpoint" in capsys.readouterr().err


def test_each_backbone_with_each_pooling_has_its_untrained_network(run, tmp_path):
    resnet = ("backbone=resnet18", "backbone.channels=[8,8]", "backbone.layers=[1,1]")
    for name, *more in (
        ("simpool", "pooling.name=simpool"),
        ("again", "seed=1"),
        ("resnet", *resnet, "pooling.name=gap"),
        ("resnet_simpool", *resnet, "pooling.name=simpool"),
    ):
        words = (*TINY, "method.name=dino", "masking.name=none", "train.steps=1", *more)
        maskwise.train(maskwise.read_recipe("debug/tiny", *words), out=tmp_path / name, quiet=True)
    names = ("simpool", "again", "resnet", "resnet_simpool")
    found = dense_packs.encoders({"cls": run, **{name: tmp_path / name for name in names}})
    kinds = ["untrained, cls", "untrained, simpool", "untrained, gap", "untrained resnet18, simpool"]
    assert list(found) == ["cls", *names, *kinds]
    for trained, untrained in (("again", kinds[0]), ("resnet_simpool", kinds[3])):
        assert found[trained][0].state_dict().keys() <= found[untrained][0].state_dict().keys()


def test_numbers_of_a_coarser_grid_are_shown_for_each_encoder():
    """Chance depends on the grid alone: one line for equal grids, a column for others."""
    masks = {"attmask_high": 40.0, "attmask_hint": 41.0, "block": 42.0, "random": 43.0, "chance": 44.25, "best": 90.0}
    row = {"data": "images", "evaluation": "mask_overlap", "images": {"test": 2}, "seconds": 0.4}
    rows = [{"encoder": name, **row, "numbers": dict(masks)} for name in ("one", "other")]
    stored = {"record": record.describe(seed=0, command="dense"), "scale": 1.0, "encoders": {}, "rows": rows}
    assert "The same for all: block 42.0, random 43.0, chance 44.2, best 90.0." in dense_packs.table(stored)
    rows[1]["numbers"]["chance"] = 30.0
    page = dense_packs.table(stored)
    assert "| encoder | attmask_high | attmask_hint | chance | seconds |" in page
    assert "| other | 40.0 | 41.0 | 30.0 | 0 |" in page and "The same for all: block 42.0, random 43.0, best" in page


@pytest.mark.slow
def test_every_measurement_of_the_packs_in_miniature(run, tmp_path):
    """Ten images of each role: each evaluation gives the numbers that the table shows."""
    folder = packs.unpack("coco200")
    chosen = {name: packs.unpack(name) for name in dense_packs.PACKS}
    assert chosen["coco200"] == folder
    every = dense_packs.measurements(chosen, tmp_path, 0.01, [])
    assert {m.evaluation for m in every} == set(dense_packs.SHOWN)
    encoder = maskwise.load(run).eval()
    for measurement in every:
        if measurement.evaluation == "video":
            measurement = Measurement("davis", "video", measurement.data, {"short_side": 64})
        options = dict(measurement.options)
        if measurement.evaluation == "linear_segmentation":
            options["iterations"] = 3
        if measurement.evaluation == "discovery":
            options["long_side"] = 96
        row = dense_packs.measure(
            Measurement(measurement.title, measurement.evaluation, measurement.data, options), encoder
        )
        shown = [row["numbers"][name] for name in dense_packs.SHOWN[measurement.evaluation]]
        assert np.isfinite(shown).all() and min(shown) >= 0, (measurement.title, measurement.evaluation, row["numbers"])
        if measurement.evaluation != "video":
            assert set(row["images"].values()) <= {10, 40}, "a hundredth of 4,000 images, else ten"


@pytest.mark.slow
def test_rows_measured_side_by_side_equal_those_of_one_process(run, tmp_path):
    """Both the trained and the untrained network are the same ones in each process."""
    for name in dense_packs.PACKS:
        packs.archive(name)
    plan = dense_packs.Plan(
        (("ours", run),), packs.archive("coco200").parent, tmp_path / "work", 0.01, ("mask_overlap",), 1
    )
    every, networks = dense_packs.opened(plan)
    todo = [({"encoder": name, "number": i}, i, name) for i in range(len(every)) for name in networks]
    found = {(row["encoder"], row["number"]): row["numbers"] for row in dense_packs.side_by_side(plan, todo, 2)}
    assert len(every) == 2 and len(found) == 4
    for key, number, name in todo:
        assert found[name, number] == dense_packs.measure(every[number], networks[name][0])["numbers"], key
