"""The index of a folder: what it finds, what it remembers and what makes it look again."""

import os
import time

import numpy as np
import pytest

from maskwise.data import index
from maskwise.data.datasets import Folder, by_subfolder
from maskwise.data.names import Names


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "REMEMBERED_FROM", 4)
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
    """Folders as they look some time after their last change."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (time.time() - 60,) * 2)


def test_names_are_a_list():
    words = ["a/1.jpg", "", "b/ü \udcff.png", "c"]
    names = Names.of(words)
    assert list(names) == words and len(names) == 4 and names[2] == words[2] and names[-1] == "c" and names[1:3] == words[1:3]
    with pytest.raises(IndexError):
        names[4]
    assert not Names.of([])


def test_a_walk_agrees_with_os_walk(tree):
    names, others = index.scan(tree)
    expected = sorted(
        os.path.relpath(os.path.join(folder, file), tree) for folder, _, files in os.walk(tree) for file in files
        if file.lower().endswith(index.EXTENSIONS) and "/." not in os.path.join(folder, file)
    )  # fmt: skip
    assert list(names) == expected and dict(others) == {".txt": 1}


def test_classes_are_in_the_order_of_their_names(tree):
    names, labels = by_subfolder(list(index.scan(tree)[0]))
    assert names == ["a", "a b", "b"] and [names[k] for k in labels] == [file.split("/")[0] for file in index.scan(tree)[0]]


def test_a_large_folder_is_remembered_and_seen_again_when_it_changes(tree, cache, monkeypatch):
    first, _ = index.scan(tree)
    assert len(list(cache.rglob("*.npz"))) == 1
    walks = []
    plain = index.walk
    monkeypatch.setattr(index, "walk", lambda *given: walks.append(1) or plain(*given))
    again, others = index.scan(tree)
    assert list(again) == list(first) and others[".txt"] == 1 and not walks
    (tree / "a" / "deep" / "new.jpg").touch()
    assert "a/deep/new.jpg" in list(index.scan(tree)[0]) and len(walks) == 1
    at_rest(tree)
    index.scan(tree)
    (tree / "b" / "1.jpg").unlink()
    assert "b/1.jpg" not in list(index.scan(tree)[0])
    at_rest(tree)
    index.scan(tree)
    (tree / "b").rename(tree / "c")
    assert "c/2.jpg" in list(index.scan(tree)[0])


def test_a_folder_that_changed_this_moment_is_not_remembered(tree, cache):
    (tree / "b" / "3.jpg").touch()
    index.scan(tree)
    assert not list(cache.rglob("*.npz"))


def test_small_folders_and_those_who_do_not_want_it_leave_no_trace(tree, cache, monkeypatch):
    monkeypatch.setattr(index, "REMEMBERED_FROM", 100)
    index.scan(tree)
    monkeypatch.setattr(index, "REMEMBERED_FROM", 1)
    monkeypatch.setenv("MASKWISE_CACHE", "none")
    index.scan(tree)
    assert not cache.exists()


def test_a_damaged_index_is_made_anew(tree, cache):
    index.scan(tree)
    file = next(cache.rglob("*.npz"))
    file.write_bytes(file.read_bytes()[:50])
    assert len(index.scan(tree)[0]) == 5


def test_a_link_that_leads_back_ends(tree):
    (tree / "b" / "up").symlink_to(tree)
    assert len(index.scan(tree)[0]) == 5


def test_a_hundred_thousand_files_are_remembered_in_a_moment(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKWISE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "images"
    for k in range(100):
        (root / f"c{k:03d}").mkdir(parents=True)
    at_rest(root)
    files = sorted(f"c{k % 100:03d}/{k:07d}.jpg" for k in range(100_000))
    stamps = {"": root.stat().st_mtime_ns, **{f"c{k:03d}/": (root / f"c{k:03d}").stat().st_mtime_ns for k in range(100)}}
    monkeypatch.setattr(index, "walk", lambda *given: (list(files), index.Counter(), stamps))
    index.scan(root)
    monkeypatch.delattr(index, "walk")
    data = Folder(root)
    assert len(data) == 100_000 and np.bincount(data.labels.numpy()).tolist() == [1000] * 100 and data.name(99_999) == files[-1]
