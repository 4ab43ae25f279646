"""Console messages after each mistake, word for word."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from maskwise import build, cli
from maskwise.export.write import replacing
from maskwise.imaging.drawing import write_png
from maskwise.imaging.formats import common_endings

FORMATS = common_endings()
FOLDER = ["data=folder", "data.path=images", "evaluate.knn_every=0", "train.epochs=2"]


def images(folder: str, count: int) -> None:
    """A folder of small images without classes."""
    Path(folder).mkdir()
    for number in range(count):
        pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        write_png(f"{folder}/{number:03d}.png", pixels.numpy())


@pytest.fixture
def train(capfd, monkeypatch, tmp_path):
    """`maskwise train debug/tiny --out out ...` in an empty folder: (exit status, standard error)."""
    monkeypatch.chdir(tmp_path)

    def of(*words, recipe="debug/tiny", out="out"):
        capfd.readouterr()
        status = cli.main(["train", recipe, "--out", out, *words])
        return status, capfd.readouterr().err

    return of


def refused(train, text: str, *words, **options) -> None:
    """One line, exit status 2 and nothing written."""
    before = sorted(str(path) for path in Path().rglob("*"))
    assert train(*words, **options) == (2, f"maskwise: {text}\n")
    assert sorted(str(path) for path in Path().rglob("*")) == before


def test_an_empty_folder(train):
    Path("images").mkdir()
    refused(train, f"data.path: images is empty; put images in it ({FORMATS})", *FOLDER)


def test_a_folder_of_text_files(train):
    Path("images").mkdir()
    for name in ("a.txt", "b.txt", "notes.md"):
        Path("images", name).write_text("words")
    refused(train, f"data.path: images has no images, only other files (2 .txt, 1 .md); images are {FORMATS}", *FOLDER)


def test_a_missing_path(train):
    refused(train, "data.path: images does not exist; give the folder that holds the images", *FOLDER)


def test_an_unknown_timm_name(train):
    refused(
        train,
        "command line: backbone.name: timm has no model `vit_tinny_patch16_224`; did you mean `vit_tiny_patch16_224`?; "
        "`timm.list_models('vit_*')` lists them; your own is module:Class",
        "backbone=vit_tinny_patch16_224",
    )


def test_a_model_without_patches(train):
    refused(
        train,
        "command line: backbone: crossvit_9_240 is not supported: it returns the tokens of two patch sizes, each with "
        "a class token; the nearest is repvit_m1_0",
        "backbone=crossvit_9_240",
    )


def test_a_batch_larger_than_the_data(train):
    images("images", 12)
    text = "train.batch_size is 64 and there are only 12 images; give train.batch_size=12 or less, or more images"
    refused(train, text, *FOLDER, "train.batch_size=64")


def test_more_ranks_than_images(train, monkeypatch):
    images("images", 12)
    for name, value in {"WORLD_SIZE": "16", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    refused(
        train, "more ranks (16) than images (12); start fewer ranks or give more images", *FOLDER, "train.batch_size=16"
    )


def test_a_typo_in_a_recipe(train):
    Path("mine.yaml").write_text("extends: debug/tiny\nmasking:\n  ratoi: 0.4\n")
    refused(
        train,
        "mine.yaml:3: masking.ratoi: nothing reads this key; did you mean `ratio`?; section masking accepts name, "
        "ratio, var, prob, ratio_per, show_max",
        recipe="mine.yaml",
    )


def test_several_mistakes_in_a_recipe(train):
    Path("mine.yaml").write_text("extends: debug/tiny\nmasking: attmask_hihg\noptimizer:\n  lr: fast\n")
    refused(
        train,
        "mine.yaml: 2 mistakes\n"
        "  mine.yaml:2: masking.name: no masking `attmask_hihg`; did you mean `attmask_high`?; there are none, random, "
        "block, attmask_high, attmask_low, "
        "attmask_hint, and your own as module:Name\n"
        "  mine.yaml:4: optimizer.lr: expects a number, not `fast`",
        recipe="mine.yaml",
    )


def test_missing_recipe(train):
    status, text = train(recipe="debug/tinny")
    assert status == 2 and text.startswith(
        "maskwise: no recipe debug/tinny; did you mean `debug/tiny`?; give a YAML file"
    )


def test_a_temperature_warm_up_longer_than_the_run(train):
    refused(
        train,
        "command line: teacher.warmup_temp_epochs: the temperature warm-up (30 epochs) is longer than the run "
        "(train.epochs is 2); shorten it or lengthen the run",
        "teacher.warmup_temp_epochs=30",
    )
    refused(
        train,
        "teacher.warmup_temp_epochs: the temperature warm-up (30 epochs) is longer than the run (train.steps=4 is 0.5 "
        "epochs of 64 images); "
        "shorten it or lengthen the run",
        "teacher.warmup_temp_epochs=30",
        "train.steps=4",
    )


def test_unwritable_output_folder(train):
    Path("file").write_text("")
    refused(
        train,
        "cannot write into the output folder file/out (Not a directory): choose another with --out",
        out="file/out",
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_a_read_only_output_folder(train):
    Path("closed").mkdir(mode=0o555)
    refused(
        train, "cannot write into the output folder closed (Permission denied): choose another with --out", out="closed"
    )


def test_another_recipe_in_a_run_folder(train):
    (Path("out")).mkdir()
    from maskwise.recipe.reading import read_recipe

    Path("out/recipe.yaml").write_text(read_recipe("debug/tiny", "seed=3").resolved_yaml())
    refused(train, "out was trained with seed=3, not 0: give the same recipe, or another --out")


def test_a_longer_run_in_the_same_run_folder(train):
    Path("r0").mkdir()
    from maskwise.recipe.reading import read_recipe

    Path("r0/recipe.yaml").write_text(read_recipe("debug/tiny", "train.epochs=2").resolved_yaml())
    longer = "r0 was trained with train.epochs=2. To train longer, extend it: maskwise train r0 --epochs 4 --out r1"
    refused(train, longer, "train.epochs=4", out="r0")
    both = "r0 was trained with seed=0, not 1, train.epochs=2, not 4: give the same recipe, or another --out"
    refused(train, both, "train.epochs=4", "seed=1", out="r0")


def test_a_single_image(train):
    images("images", 1)
    text = "train.batch_size is 64 and there is only one image; give train.batch_size=1 or less, or more images"
    refused(train, text, *FOLDER, "train.batch_size=64")


def test_one_unreadable_image_is_reported_and_the_run_continues(train):
    images("images", 24)
    Path("images/005.png").write_bytes(b"not a picture")
    status, text = train(*FOLDER)
    assert status == 0
    assert "1 unreadable images were replaced by others: see out/bad_images.txt\n" in text
    assert Path("out/bad_images.txt").read_text().startswith("005.png\t")


def test_ctrl_c_before_the_run_starts(train, monkeypatch):
    def interrupted(recipe, out, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "train", interrupted)
    assert train() == (
        130,
        "maskwise: stopped by Ctrl-C; saved checkpoints remain, and the same command continues from the last one\n",
    )


@pytest.mark.parametrize(
    ("number", "status", "name"),
    [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM"), (signal.SIGHUP, 129, "SIGHUP")],
)
def test_other_commands_stop_in_one_line(capfd, monkeypatch, tmp_path, number, status, name):
    """An export that is stopped removes what it has written so far."""
    from maskwise.export import release

    def stopped(model, folder, **options):
        with replacing(folder) as temporary:
            (temporary / "model.safetensors").write_text("half")
            signal.raise_signal(number)

    monkeypatch.setattr(release, "export", stopped)
    assert cli.main(["export", "run", "--to", str(tmp_path / "out")]) == status
    assert capfd.readouterr() == ("", f"maskwise: stopped by {name} before the end; give the command again\n")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_saves_and_the_same_command_continues(tmp_path):
    command = [
        sys.executable,
        "-m",
        "maskwise",
        "train",
        "debug/tiny",
        "--out",
        "out",
        "train.epochs=400",
        "evaluate.knn_every=0",
    ]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until = time.time() + 120
    while not (tmp_path / "out" / "checkpoints" / "last").exists() and time.time() < until:
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)
    _, text = running.communicate(timeout=120)
    assert running.returncode == 0
    step = int((tmp_path / "out" / "preempted").read_text())
    assert text.splitlines()[-1] == f"interrupted: saved after step {step} of 3200; the same command continues"
    assert (tmp_path / "out" / "checkpoints" / "last").read_text().strip() == f"step_{step:08d}"
    assert "Traceback" not in text


def test_os_errors_are_one_line(capfd, monkeypatch):
    def refuse(recipe, out, **options):
        raise OSError(30, "Read-only file system", "out/metrics.jsonl")

    monkeypatch.setattr(build, "train", refuse)
    assert cli.main(["train", "debug/tiny", "--out", "out"]) == 2
    assert (
        capfd.readouterr().err
        == "maskwise: out/metrics.jsonl: Read-only file system; give a path that can be read and written\n"
    )


def test_internal_errors_show_their_traceback(monkeypatch):
    monkeypatch.setattr(build, "train", lambda recipe, out, **options: {}["status"])
    with pytest.raises(KeyError):
        cli.main(["train", "debug/tiny", "--out", "out"])
