"""Listing folders: files found, caching, and invalidation of the cache."""

import os
import time

import numpy as np
import pytest

from maskwise.data.datasets import folder_index
from maskwise.data.datasets.folder import Folder, by_subfolder
from maskwise.data.datasets.left_out import image_endings
from maskwise.data.datasets.packed_strings import PackedStrings
from maskwise.errors import UserError

ENDINGS = image_endings()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folder_index, "CACHE_FROM", 4)
    return tmp_path / "cache"


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "images"
    for name in ("b/1.jpg", "b/2.jpg", "a/x.PNG", "a/deep/y.webp", "a b/z.jpg", "a/notes.txt", ".hid/q.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    at_rest(root)
    return root


def at_rest(root):
    """Set the time stamps of all folders to some time ago."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (time.time() - 60,) * 2)


def test_packed_strings_behave_as_a_list():
    words = ["a/1.jpg", "", "b/ü \udcff.png", "c"]
    names = PackedStrings.of(words)
    assert (
        list(names) == words
        and len(names) == 4
        and names[2] == words[2]
        and names[-1] == "c"
        and names[1:3] == words[1:3]
    )
    with pytest.raises(IndexError):
        names[4]
    assert not PackedStrings.of([])


def test_walk_agrees_with_os_walk(tree):
    names, others = folder_index.scan(tree, ENDINGS)
    expected = sorted(
        os.path.relpath(os.path.join(folder, file), tree)
        for folder, _, files in os.walk(tree)
        for file in files
        if file.lower().endswith(ENDINGS) and "/." not in os.path.join(folder, file)
    )
    assert list(names) == expected and dict(others) == {".txt": 1}


def test_classes_are_sorted_by_name(tree):
    names, labels = by_subfolder(list(folder_index.scan(tree, ENDINGS)[0]))
    assert names == ["a", "a b", "b"] and [names[k] for k in labels] == [
        file.split("/")[0] for file in folder_index.scan(tree, ENDINGS)[0]
    ]


def test_large_folders_are_cached_until_they_change(tree, cache, monkeypatch):
    first, _ = folder_index.scan(tree, ENDINGS)
    assert len(list(cache.rglob("*.npz"))) == 1
    walks = []
    plain = folder_index.walk
    monkeypatch.setattr(folder_index, "walk", lambda *given: walks.append(1) or plain(*given))
    again, others = folder_index.scan(tree, ENDINGS)
    assert list(again) == list(first) and others[".txt"] == 1 and not walks
    (tree / "a" / "deep" / "new.jpg").touch()
    assert "a/deep/new.jpg" in list(folder_index.scan(tree, ENDINGS)[0]) and len(walks) == 1
    at_rest(tree)
    folder_index.scan(tree, ENDINGS)
    (tree / "b" / "1.jpg").unlink()
    assert "b/1.jpg" not in list(folder_index.scan(tree, ENDINGS)[0])
    at_rest(tree)
    folder_index.scan(tree, ENDINGS)
    (tree / "b").rename(tree / "c")
    assert "c/2.jpg" in list(folder_index.scan(tree, ENDINGS)[0])


def test_a_recently_changed_folder_is_not_cached(tree, cache):
    (tree / "b" / "3.jpg").touch()
    folder_index.scan(tree, ENDINGS)
    assert not list(cache.rglob("*.npz"))


def test_small_folders_and_disabled_caching_write_no_cache(tree, cache, monkeypatch):
    monkeypatch.setattr(folder_index, "CACHE_FROM", 100)
    folder_index.scan(tree, ENDINGS)
    monkeypatch.setattr(folder_index, "CACHE_FROM", 1)
    monkeypatch.setenv("MASKWISE_CACHE", "none")
    folder_index.scan(tree, ENDINGS)
    assert not cache.exists()


def test_a_damaged_cache_is_rebuilt(tree, cache):
    folder_index.scan(tree, ENDINGS)
    file = next(cache.rglob("*.npz"))
    file.write_bytes(file.read_bytes()[:50])
    assert len(folder_index.scan(tree, ENDINGS)[0]) == 5


def test_circular_links_end(tree):
    (tree / "b" / "up").symlink_to(tree)
    assert len(folder_index.scan(tree, ENDINGS)[0]) == 5


def test_a_hundred_thousand_files_load_quickly_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKWISE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "images"
    for k in range(100):
        (root / f"c{k:03d}").mkdir(parents=True)
    at_rest(root)
    files = sorted(f"c{k % 100:03d}/{k:07d}.jpg" for k in range(100_000))
    stamps = {
        "": root.stat().st_mtime_ns,
        **{f"c{k:03d}/": (root / f"c{k:03d}").stat().st_mtime_ns for k in range(100)},
    }
    monkeypatch.setattr(folder_index, "walk", lambda *given: (list(files), folder_index.Counter(), stamps))
    folder_index.scan(root, ENDINGS)
    monkeypatch.delattr(folder_index, "walk")
    data = Folder(root)
    assert (
        len(data) == 100_000
        and np.bincount(data.labels.numpy()).tolist() == [1000] * 100
        and data.name(99_999) == files[-1]
    )


@pytest.mark.parametrize(
    "names",
    [
        ("recipe.yaml", "run.json", "pictures/masks.png"),
        ("recipe.yaml", "checkpoints/last", "pictures/masks.png"),  # run.json is lost
        ("config.json", "README.md", "model.safetensors", "attention.png"),
        ("table.md", "reports/knn.json", "tensorboard/events", "pictures/in9.png"),
    ],
)
def test_folders_that_maskwise_wrote_are_left_out(tree, cache, names):
    before, _ = folder_index.scan(tree)
    for name in names:
        (tree / "b" / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / "b" / "run" / name).touch()
    at_rest(tree)
    for _ in range(2):  # the second time from the cache
        files, others = folder_index.scan(tree)
        assert list(files) == list(before) and others[folder_index.OWN] == 1
    assert Folder(tree).classes == ["a", "a b", "b"]
    with pytest.raises(UserError, match="run is a folder of a run, an export or evaluations; give the"):
        Folder(tree / "b" / "run")


def test_a_recipe_beside_images_hides_nothing(tree):
    (tree / "b" / "recipe.yaml").touch()
    (tree / "b" / "config.json").touch()
    assert len(folder_index.scan(tree)[0]) == 5
