"""Ranks that were started with something else: one line before the first step, on all ranks."""

import os
import socket
import sys

import pytest

from maskwise import cli
from maskwise.build import dataset
from maskwise.build.rank_agreement import check_ranks, described, difference
from maskwise.distributed.world import World
from maskwise.errors import UserError
from maskwise.recipe.reading import read_recipe
from support import pair

SMALL = ("data.count=16", "train.epochs=1", "teacher.warmup_temp_epochs=1", "evaluate.knn_every=0")


def recipe(difference):
    """The line on another recipe."""
    return f"was started with another recipe than rank 0 ({difference}): start all ranks with the same command"


def start(*overrides, versions=("1", "2")):
    """What a rank reports of its start with these overrides."""
    read = read_recipe("debug/tiny", *SMALL, *overrides)
    return {
        "host": "node2",
        "versions": versions,
        "recipe": dict(read.values),
        "images": described(dataset(read)),
        "test images": described(dataset(read, "test")),
    }


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ((), ""),
        (("speed.workers=3", "speed.threads=2"), ""),
        (("optimizer.lr=0.25",), recipe("optimizer.lr 0.25 instead of 0.016")),
        (("masking.ratio=0.25",), recipe("masking.ratio 0.25 instead of 0.3")),
        (("crops.local_number=3",), recipe("crops.local_number 3 instead of 2")),
        (("speed.shard=fsdp",), recipe("speed.shard fsdp instead of none")),
        (
            ("seed=1", "optimizer.clip=2", "crops.local_number=3", "optimizer.lr=0.25"),
            recipe(
                "seed 1 instead of 0, crops.local_number 3 instead of 2, optimizer.lr 0.25 instead of 0.016 and 1 more"
            ),
        ),
    ],
    ids=str,
)
def test_other_recipes_are_named_by_their_keys(overrides, text):
    assert difference(start(), start(*overrides)) == text


def test_other_images_and_versions_are_named():
    first, rule = start(), "data.path must hold the same files on all machines"
    fewer = first | {"images": first["images"] | {"count": 15}}
    assert difference(first, fewer) == f"has other images than rank 0 (15, not 16): {rule}"
    fitted = fewer | {"recipe": {**first["recipe"], "optimizer.warmup_epochs": 0.5}}
    assert difference(first, fitted) == difference(first, fewer)
    assert difference(start("data.count=24"), first) == recipe("data.count 16 instead of 24")
    renamed = first | {"images": first["images"] | {"names": "a"}}
    assert difference(first | {"images": first["images"] | {"names": "b"}}, renamed) == (
        f"has other images than rank 0 (other file names): {rule}"
    )
    relabeled = first | {"test images": first["test images"] | {"labels": "a"}}
    assert difference(first, relabeled) == f"has other test images than rank 0 (other labels): {rule}"
    absent = first | {"test images": described(None)}
    count = first["test images"]["count"]
    assert difference(first, absent) == f"has other test images than rank 0 (0, not {count}): {rule}"
    assert difference(first, start(versions=("1", "3"))) == (
        "runs maskwise 1 with torch 3, rank 0 maskwise 1 with torch 2: install the same on all machines"
    )


def test_folders_are_described_by_names_and_labels(tmp_path):
    from maskwise.data.datasets import DATASETS

    described_sets = []
    for number, name in enumerate(("a/0.png", "a/1.png", "b/0.png")):
        for image in ("a/2.png", name):
            (tmp_path / str(number) / image).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / str(number) / image).write_bytes(b"x")
        described_sets.append(described(DATASETS["folder"](path=tmp_path / str(number))))
    assert [images["count"] for images in described_sets] == [2, 2, 2]
    first, renamed, other_class = described_sets
    assert first["labels"] == renamed["labels"] != other_class["labels"]
    assert len({images["names"] for images in described_sets}) == 3


def test_single_process_compares_nothing():
    check_ranks(None, None, None, World())


class Other(World):
    """Two ranks, of which rank 1 was started with another seed."""

    def gather_objects(self, value):
        if isinstance(value, str):
            return [value, value]
        return [value, value | {"host": "node2", "recipe": {**value["recipe"], "seed": 7}}]


def test_all_ranks_raise_the_same_line():
    read = read_recipe("debug/tiny", *SMALL)
    for rank in range(2):
        with pytest.raises(UserError, match=r"^rank 1 on node2 was started .* \(seed 7 instead of 0\): start"):
            check_ranks(read, dataset(read), None, Other(rank, 2))


def test_two_ranks_with_different_learning_rates_end_before_training(tmp_path):
    ranks = pair.start(__file__, tmp_path / "run")
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    lines = [line for text in errors for line in text.splitlines() if line.startswith("maskwise: ")]
    expected = f"rank 1 on {socket.gethostname()} {recipe('optimizer.lr 0.25 instead of 0.016')}"
    assert len(lines) == 1 and lines[0].endswith(expected), errors
    assert [rank.returncode for rank in ranks] == [2, 2] and not (tmp_path / "run").exists()


if __name__ == "__main__":
    other = ["optimizer.lr=0.25"] if os.environ["RANK"] == "1" else []
    sys.exit(cli.main(["train", "debug/tiny", "--out", sys.argv[1], *SMALL, *other]))
