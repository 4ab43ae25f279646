"""Files deleted or changed after listing: equal handling and equal batches from any worker."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets.test_tar import pack, png
from data.test_loader import CROPS, assert_same
from maskwise.data.datasets.folder import Folder
from maskwise.data.datasets.tar import Tar
from maskwise.data.decoding.image import CorruptImage
from maskwise.data.loader import batches
from maskwise.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for k in range(40):
        place = tmp_path / "set" / f"class{k % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(
            place / f"{k:02d}.jpg"
        )
    return tmp_path / "set"


def damage(folder):
    """Damage six files after they were listed; return their names."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg"))[::7]
    gone, garbage, cut, directory, pipe, link = (folder / name for name in names)
    gone.unlink()
    garbage.write_bytes(b"\xff\xd8" + os.urandom(500))
    cut.write_bytes(cut.read_bytes()[:300])
    directory.unlink(), directory.mkdir()
    pipe.unlink(), os.mkfifo(pipe)
    link.unlink(), link.symlink_to(link)
    return set(names)


@pytest.mark.parametrize("jpeg_scaling", [False, True])
def test_files_damaged_after_listing_are_replaced_equally_by_all_workers(folder, jpeg_scaling):
    data = Folder(folder)
    names, taken = damage(folder), []
    for workers in (0, 2):
        stream = batches(
            data, CROPS, batch_size=20, total_steps=4, seed=1, cache="none", workers=workers, jpeg_scaling=jpeg_scaling
        )
        taken.append(list(stream))
        assert set(stream.corrupt) == names and stream.replaced == 12 and all(stream.corrupt.values())
        assert stream.corrupt[min(names)].startswith("[Errno 2] No such file")
    assert_same(*taken)


def test_two_ranks_list_the_same_corrupt_files_as_one_process(folder):
    data = Folder(folder)
    names = damage(folder)
    result, views = set(), []
    for rank in range(2):
        stream = batches(data, CROPS, batch_size=20, total_steps=2, seed=1, cache="none", rank=rank, world_size=2)
        views.append([batch.global_crops for batch in stream])
        result |= set(stream.corrupt)
    assert result == names
    whole = list(batches(data, CROPS, batch_size=20, total_steps=2, seed=1, cache="none"))
    for step, batch in enumerate(whole):
        both = [views[rank][step].unflatten(0, (2, 10)) for rank in range(2)]
        assert torch.equal(batch.global_crops, torch.cat(both, 1).flatten(0, 1))


def test_files_damaged_during_iteration(folder):
    data = Folder(folder)
    stream = batches(data, CROPS, batch_size=20, total_steps=6, seed=1, cache="none")
    next(stream), next(stream)
    assert not stream.corrupt
    names = damage(folder)
    next(stream), next(stream)
    assert set(stream.corrupt) == names
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="100 images in a row"):
        next(stream)
    assert len(stream.corrupt) == 40


def test_cached_images_survive_deleted_files(folder):
    data = Folder(folder)
    stream = batches(data, CROPS, batch_size=20, total_steps=6, seed=1)
    next(stream), next(stream)  # one epoch: every image is cached
    shutil.rmtree(folder)
    assert len(list(stream)) == 4 and not stream.corrupt


def test_fingerprints_with_missing_files(folder):
    data = Folder(folder)
    before = data.fingerprint(), data.stamp()
    damage(folder)
    assert data.fingerprint() != before[0] and data.stamp() != before[1]


def test_devices_and_giant_files_are_refused(tmp_path):
    from maskwise.data.decoding.image import MAX_BYTES, decode

    with open(tmp_path / "giant.jpg", "wb") as file:
        file.truncate(MAX_BYTES + 1)  # a sparse file
    with pytest.raises(CorruptImage, match="images have at most"):
        decode(tmp_path / "giant.jpg")
    with pytest.raises(CorruptImage, match="not a regular file"):
        decode("/dev/zero")


def test_tar_files_deleted_or_truncated_after_listing(tmp_path):
    for number in range(2):
        pack(tmp_path / f"{number}.tar", {f"{k}.png": png(10 * number + k, (30, 30)) for k in range(8)})
    data = Tar(tmp_path)
    (tmp_path / "0.tar").unlink()
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[: int(data.places[12, 1]) + 5])
    stream = batches(data, CROPS, batch_size=8, total_steps=4, cache="none", workers=1)
    assert len(list(stream)) == 4 and len(stream.corrupt) == 12
    reasons = set(stream.corrupt.values())
    assert reasons == {"No such file or directory", "1.tar ends within it"}


@pytest.mark.slow
def test_a_whole_run_with_missing_files(tmp_path, monkeypatch, capfd):
    """Train and evaluate with two of sixty listed files missing, and check the report of unreadable images."""
    import json

    from maskwise import cli

    monkeypatch.chdir(tmp_path)
    rows = ["path,label,split"]
    for k in range(72):
        if k not in (7, 33, 65):
            Image.fromarray(np.random.default_rng(k).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(f"{k}.png")
        rows.append(f"{k}.png,{k % 2},{'train' if k < 60 else 'test'}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    words = [
        "data=list",
        "data.path=list.csv",
        "data.split=train",
        "data.test_split=test",
        "train.epochs=2",
        "evaluate.knn_every=1",
        "evaluate.k=[5]",
        "speed.workers=1",
    ]
    assert cli.main(["train", "debug/tiny", "--out", "out", *words]) == 0
    assert [line.split("\t")[0] for line in (tmp_path / "out" / "bad_images.txt").read_text().splitlines()] == [
        "33.png",
        "7.png",
    ]
    stderr = capfd.readouterr().err
    assert "2 unreadable images were replaced by others: see out/bad_images.txt" in stderr
    report = json.loads(next((tmp_path / "out" / "reports").glob("knn_step_*")).read_text())
    assert set(report["corrupt"]) == {"7.png", "33.png", "65.png"}
