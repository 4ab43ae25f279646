"""Continuing a run: what may change between its starts, and images that changed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import maskwise
from maskwise.engine.run_log import read_metrics
from maskwise.engine.trainer import Trainer
from maskwise.errors import UserError
from maskwise.recipe.reading import read_recipe

SMALL = ("train.batch_size=4", "train.epochs=3", "optimizer.warmup_epochs=1", "teacher.warmup_temp_epochs=0")
SMALL = (*SMALL, "train.log_every=1", "evaluate.knn_every=0", "evaluate.pictures_every=0")


def photos(root, count=8, first=0, size=36):
    Path(root).mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(Path(root) / f"{number:03d}.png")
    return root


def recipe(*overrides, path="photos", base="debug/tiny"):
    data = () if path is None else ("data=folder", f"data.path={path}")
    return read_recipe(base, *data, *(SMALL if base == "debug/tiny" else ()), *overrides)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in an empty folder, with one thread."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def stop_at(monkeypatch):
    """Return a function that trains and is stopped at a step."""
    step = Trainer.step

    def train(at, made, out="run", **options):
        import os
        import signal

        def interrupted(trainer, *arguments, **more):
            if trainer.step_index == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(trainer, *arguments, **more)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", interrupted)
            return maskwise.train(made, out=out, quiet=True, **options)

    return train


def refused(made, out="run", **options) -> str:
    before = {path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        maskwise.train(made, out=out, quiet=True, **options)
    assert before == {path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}
    assert "\n" not in str(caught.value)
    return str(caught.value)


def record(out="run"):
    return json.loads((Path(out) / "run.json").read_text())


def weights(out):
    last = Path(out) / "checkpoints" / (Path(out) / "checkpoints" / "last").read_text().strip()
    return load_file(last / "model.safetensors")


def rates(out="run"):
    return [line["lr"] for line in read_metrics(Path(out) / "metrics.jsonl") if "loss" in line]


def test_images_that_were_added_are_noticed(stop_at):
    photos("photos", 8)
    maskwise.train(recipe(), out="run", quiet=True)
    assert record()["data"]["count"] == record()["images"] == 8 and len(record()["data"]["names"]) == 16
    photos("photos", 12, first=8)
    assert refused(recipe()) == (
        "the images in photos have changed since run was trained on them (20 images, not 8): bring the earlier images "
        "back, give another --out, or continue with these by --accept-changed-data (the length of an epoch stays)"
    )
    done = maskwise.train(recipe(), out="run", quiet=True, accept_changed_data=True)
    assert (done["status"], done["step"]) == ("complete", 6)  # 3 epochs of 2 steps, not of 5


def swap():
    """Exchange two files of the same size."""
    assert Path("photos/000.png").stat().st_size == Path("photos/001.png").stat().st_size
    first, second = Path("photos/000.png").read_bytes(), Path("photos/001.png").read_bytes()
    Path("photos/000.png").write_bytes(second)
    Path("photos/001.png").write_bytes(first)


CHANGES = {
    "other file names": (
        lambda: Path("photos/000.png").rename("photos/first.png"),
        lambda: Path("photos/first.png").rename("photos/000.png"),
    ),
    "files of other sizes": (lambda: photos("photos", 1, size=50), lambda: photos("photos", 1)),
    "other contents": (swap, swap),
}


@pytest.mark.parametrize("words", CHANGES)
def test_other_images_of_the_same_number_are_noticed(words):
    photos("photos", 8)
    maskwise.train(recipe(), out="run", quiet=True)
    change, back = CHANGES[words]
    change()
    assert f"({words})" in refused(recipe())
    back()
    assert maskwise.train(recipe(), out="run", quiet=True)["status"] == "complete"


def test_a_run_on_changed_images_keeps_its_schedules(stop_at):
    photos("photos", 8)
    maskwise.train(recipe(), out="whole", quiet=True)
    stop_at(2, recipe())
    photos("photos", 12, first=8)
    result = stop_at(4, recipe(), accept_changed_data=True)
    assert (result["status"], result["step"]) == ("preempted", 5)
    assert [start.get("data", {}).get("count") for start in record()["starts"]] == [None, 20]
    assert maskwise.train(recipe(), out="run", quiet=True)["status"] == "complete"  # these images are now the run's
    assert rates("run") == rates("whole") and len(rates()) == 6
    assert [line["epoch"] for line in read_metrics("run/metrics.jsonl") if "loss" in line] == [0, 0, 1, 1, 2, 2]
    photos("photos", 1, first=50)
    assert "(21 images, not 20)" in refused(recipe())


def test_fewer_images_than_an_epoch_had(stop_at):
    photos("photos", 12)
    stop_at(2, recipe())
    for number in range(4, 12):
        Path(f"photos/{number:03d}.png").unlink()
    assert maskwise.train(recipe(), out="run", quiet=True, accept_changed_data=True)["step"] == 9
    Path("photos/003.png").unlink()
    text = refused(recipe(), accept_changed_data=True)
    assert text.startswith("train.batch_size is 4 and there are only 3 images")


def test_moved_images_continue_the_run_bit_for_bit(stop_at, folder, monkeypatch):
    photos("photos", 8)
    maskwise.train(recipe(), out="whole", quiet=True)
    stop_at(2, recipe())
    shutil.move("photos", "moved")
    assert maskwise.train(recipe(path="moved"), out="run", quiet=True)["status"] == "complete"
    expected, found = weights("whole"), weights("run")
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    assert record()["starts"][1]["changed"] == {"data.path": ["photos", "moved"]}
    assert read_recipe("run").values["data.path"] == "moved"  # for evaluations of the run's own data
    (folder / "below").mkdir()
    monkeypatch.chdir(folder / "below")
    assert maskwise.train(recipe(path="../moved"), out="../run", quiet=True)["status"] == "complete"


def test_another_folder_is_refused():
    photos("a/photos", 8)
    photos("b/photos", 8, first=20)
    maskwise.train(recipe(path="a/photos"), out="run", quiet=True)
    text = "run was trained on the images in a/photos, and b/photos has others (other file names): bring"
    assert refused(recipe(path="b/photos")).startswith(text)


FREE = {
    "data.corrupt_ceiling": "0.5",
    "train.log_every": "2",
    "train.save_every": "3",
    "train.keep": "0",
    "train.max_bad_steps": "7",
    "evaluate.k": "[5]",
    "evaluate.crop_pct": "1.0",
    "evaluate.pictures_every": "1",
    "speed.workers": "1",
}


def test_what_changes_nothing_computed_may_change(stop_at, capsys):
    photos("photos", 8)
    maskwise.train(recipe(), out="whole", quiet=True)
    stop_at(1, recipe())
    changed = recipe(*(f"{key}={value}" for key, value in FREE.items()))
    capsys.readouterr()
    assert maskwise.train(changed, out="run")["status"] == "complete"
    expected, found = weights("whole"), weights("run")
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    listed = record()["starts"][1]["changed"]
    assert listed.keys() == FREE.keys() - {"speed.workers"} and listed["train.log_every"] == ["1", "2"]
    assert "changed since the last start: data.corrupt_ceiling 0.01 -> 0.5, train.log_every 1 -> 2" in (
        capsys.readouterr().err
    )
    assert read_recipe("run").train.log_every == 2
    steps = sorted(path.name for path in Path("run/checkpoints").glob("step_*"))
    assert steps == ["step_00000002", "step_00000003", "step_00000006"]  # train.keep=0 keeps all
    assert "changed" not in record()["starts"][0]


def test_a_run_stopped_by_its_ceiling_continues_with_a_higher_one():
    photos("photos", 20)
    for number in range(6):
        Path(f"photos/{number:03d}.png").write_bytes(b"no image")
    text = refused_here(recipe())
    assert "more than data.corrupt_ceiling=0.01" in text and ": raise data.corrupt_ceiling, or repair or remove" in text
    assert maskwise.train(recipe("data.corrupt_ceiling=1"), out="run", quiet=True)["status"] == "complete"


def refused_here(made) -> str:
    with pytest.raises(UserError) as caught:
        maskwise.train(made, out="run", quiet=True)
    return str(caught.value)


def test_repaired_images_are_accepted():
    photos("photos", 20)
    for number in range(6):
        Path(f"photos/{number:03d}.png").write_bytes(b"no image")
    assert "continue with --accept-changed-data" in refused_here(recipe())
    photos("photos", 6)
    assert maskwise.train(recipe(), out="run", quiet=True, accept_changed_data=True)["status"] == "complete"


@pytest.mark.parametrize("change", ["seed=1", "optimizer.lr=1", "train.batch_size=2", "data.max_pixels=1000"])
def test_what_changes_the_computation_is_refused(change):
    photos("photos", 8)
    maskwise.train(recipe(), out="run", quiet=True)
    key, value = change.split("=")
    assert f"{key}=" in refused(recipe(change)) and f"not {value}" in refused(recipe(change))


def test_a_run_of_an_earlier_version_knows_the_number_of_images_only():
    photos("photos", 8)
    maskwise.train(recipe(), out="run", quiet=True)
    early = record()
    del early["data"]
    Path("run/run.json").write_text(json.dumps(early))
    assert maskwise.train(recipe(), out="run", quiet=True)["status"] == "complete"
    photos("moved", 8)
    assert refused(recipe(path="moved")) == (
        "run was trained with data.path=photos, not moved: give the same recipe, or another --out"
    )
    photos("photos", 1, first=8)
    assert "(9 images, not 8)" in refused(recipe())


def test_a_moved_start_model_is_the_same_model():
    photos("photos", 8)
    maskwise.train(recipe("train.epochs=1"), out="first", quiet=True)
    maskwise.export("first", "exported", heads=True, say=None)
    maskwise.train(recipe("method.start_from=exported"), out="run", quiet=True)
    shutil.copytree("exported", "elsewhere/exported")
    moved = recipe("method.start_from=elsewhere/exported")
    assert maskwise.train(moved, out="run", quiet=True)["status"] == "complete"
    maskwise.train(recipe("train.epochs=1", "seed=1"), out="second", quiet=True)
    assert refused(recipe("method.start_from=second")).startswith(
        "run was trained with method.start_from=exported, not"
    )


def test_classes_of_a_supervised_run():
    for name in ("cats", "dogs"):
        photos(f"photos/{name}", 4)
    base = "debug/tiny_supervised"
    overrides = ("data=folder", "data.path=photos", "train.batch_size=4", "evaluate.top1_every=0")
    made = read_recipe(base, *overrides, "train.epochs=1")
    maskwise.train(made, out="run", quiet=True)
    assert record()["data"].keys() == {"count", "names", "sizes", "bytes", "classes", "labels"}
    photos("photos/cats", 2, first=4)
    assert maskwise.train(made, out="run", quiet=True, accept_changed_data=True)["status"] == "complete"
    Path("photos/dogs").rename("photos/eels")
    assert refused(made, accept_changed_data=True) == (
        "run was trained on other classes than these: give another --out"
    )
