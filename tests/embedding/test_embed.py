"""Embedding files: rows against plain extraction in three formats, other readers, interruptions, ranks, memory."""

import csv
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pandas
import polars
import pytest
import torch

from maskwise import cli
from maskwise.distributed.world import World
from maskwise.embedding import embed as embedding
from maskwise.embedding.reader import open_embeddings
from maskwise.engine.run_lock import RunLock
from maskwise.errors import UserError
from maskwise.evaluation.features import extract
from support import pair
from support.tiny_sets import Colors, tiny_encoder

BROKEN = (3, 8, 9)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(embedding, "PART", 8)


def encoder(seed=0):
    return tiny_encoder("simpool", class_token=True, seed=seed)


def embed(data, to, features=("pooled",), net=None, **options):
    options = {"name": "tiny", "world": World(), "batch_size": 4, **options}
    return embedding.embed(net or encoder(), data, to, features, **options)


def expected(data, names, **options):
    return extract.extract(encoder(), data, names, batch_size=4, **options)


def test_parquet_opens_in_pandas_and_polars_with_the_rows_of_the_dataset(tmp_path):
    data, names = Colors(45, broken=BROKEN), ("pooled+patch_mean", "cls2", "patches")
    settings = embed(data, tmp_path / "x.parquet", names)
    bank = expected(data, names)
    tables = (pandas.read_parquet(tmp_path / "x.parquet"), polars.read_parquet(tmp_path / "x.parquet").to_pandas())
    for table in tables:
        assert list(table) == ["path", "label", "class_name", "width", "height", "pooled+patch_mean", "cls2"]
        assert list(table["path"]) == [f"{i}.png" for i in range(45) if i not in BROKEN]
        assert list(table["label"]) == bank.labels.tolist()
        assert list(table["class_name"]) == [f"c{label}" for label in bank.labels]
        assert set(table["width"]) == {16} and list(table["height"]) == [16 + i % 3 for i in bank.index.tolist()]
        for name in names[:2]:
            assert np.array_equal(np.stack(list(table[name])), bank[name].numpy())
    patches = np.load(tmp_path / "x.parquet.patches.npy", mmap_mode="r")
    assert np.array_equal(patches, bank["patches"].numpy()) and isinstance(patches, np.memmap)
    assert settings["dimensions"] == {"pooled+patch_mean": [48], "cls2": [48], "patches": [4, 24]}
    rows = (tmp_path / "x.parquet.unreadable.csv").read_text().splitlines()
    assert rows == ["path,reason", "3.png,cut short", "8.png,cut short", "9.png,cut short"]
    assert not list(tmp_path.glob(".*"))  # neither parts nor locks are left


@pytest.mark.parametrize("ending", ["parquet", "csv", "npy"])
def test_every_format_reads_back_as_it_was_computed(tmp_path, ending):
    data = Colors(21, broken=BROKEN)
    file = tmp_path / f"x.{ending}"
    embed(data, file)
    read, bank = open_embeddings(file), expected(data, "pooled")
    assert torch.equal(read.vectors, bank.pooled) and torch.equal(read.labels, bank.labels)
    assert read.paths == [data.name(i) for i in bank.index.tolist()]
    assert read.sizes.tolist() == [[16, 16 + i % 3] for i in bank.index.tolist()]


def test_numpy_and_csv_readers_need_nothing_of_this_package(tmp_path):
    data = Colors(21, broken=BROKEN)
    embed(data, tmp_path / "x.npy", ("patches",))
    embed(data, tmp_path / "x.csv")
    bank = expected(data, ("pooled", "patches"))
    assert np.array_equal(np.load(tmp_path / "x.npy"), bank["patches"].numpy())
    with open(tmp_path / "x.npy.index.csv", newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [data.name(i) for i in bank.index.tolist()]
    table = pandas.read_csv(tmp_path / "x.csv")
    vectors = table[[f"vector_{k}" for k in range(24)]].to_numpy(np.float32)
    assert np.array_equal(vectors, bank.pooled.numpy()) and list(table["label"]) == bank.labels.tolist()


def test_bf16_and_float16(tmp_path):
    data = Colors(9)
    embed(data, tmp_path / "half.parquet", precision="bf16", dtype="float16")
    bank = expected(data, "pooled", precision="bf16")
    assert bank.pooled.dtype == torch.bfloat16
    read = open_embeddings(tmp_path / "half.parquet")
    assert torch.equal(read.vectors, bank.pooled.half().float()) and read.meta["precision"] == "bf16"


class Interrupted(Colors):
    """Images of which the one at `stop` ends the program."""

    stop, end = 30, KeyboardInterrupt

    def image(self, i):
        if i == self.stop:
            raise self.end
        return super().image(i)


@pytest.mark.parametrize("ending", ["parquet", "csv", "npy"])
def test_an_interrupted_embedding_continues_with_the_same_bytes(tmp_path, ending):
    plain, file = tmp_path / f"plain.{ending}", tmp_path / f"x.{ending}"
    embed(Colors(45, broken=BROKEN), plain)
    with pytest.raises(KeyboardInterrupt):
        embed(Interrupted(45, broken=BROKEN), file)
    assert not file.exists() and sorted(path.name for path in tmp_path.glob(f".x.{ending}.parts/*.safetensors"))
    data = Colors(45, broken=BROKEN)
    embed(data, file)
    assert data.reads == 45 - 24  # three parts of eight were complete
    assert file.read_bytes() == plain.read_bytes() and not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_killed_process_continues_too(tmp_path):
    code = (
        "import os; from embedding.test_embed import *; "
        "Interrupted.end = property(lambda self: os.kill(os.getpid(), 9)); "
        f"embedding.PART = 8; embed(Interrupted(45), {str(tmp_path / 'x.parquet')!r})"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    data = Colors(45)
    embed(data, tmp_path / "x.parquet")
    embed(Colors(45), tmp_path / "plain.parquet")
    assert data.reads < 45 and (tmp_path / "x.parquet").read_bytes() == (tmp_path / "plain.parquet").read_bytes()


def test_a_damaged_part_is_computed_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        embed(Interrupted(45), tmp_path / "x.parquet")
    part = min((tmp_path / ".x.parquet.parts").glob("*.safetensors"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    data = Colors(45)
    embed(data, tmp_path / "x.parquet")
    assert data.reads == 45 - 16


def test_parts_of_another_model_are_not_used(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        embed(Interrupted(45), tmp_path / "x.parquet", net=encoder(seed=1))
    data = Colors(45)
    embed(data, tmp_path / "x.parquet")
    assert data.reads == 45
    assert torch.equal(open_embeddings(tmp_path / "x.parquet").vectors, expected(Colors(45), "pooled").pooled)


def test_a_complete_file_is_left_as_it_is_and_another_is_not_overwritten(tmp_path):
    file = tmp_path / "x.parquet"
    first = embed(Colors(9), file)
    data = Colors(9)
    assert embed(data, file) == first and data.reads == 0
    for options in ({"net": encoder(seed=1)}, {"features": ("patch_mean",)}, {"dtype": "float16"}):
        with pytest.raises(UserError, match=r"another model \(tiny\), other images or other options; remove it"):
            embed(Colors(9), file, **options)
    with pytest.raises(UserError, match="other images"):
        embed(Colors(10), file)
    (tmp_path / "own.csv").write_text("path\n")
    with pytest.raises(UserError, match="was not written by `maskwise embed`"):
        embed(Colors(9), tmp_path / "own.csv")


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("x.txt", {}, "ends in .parquet, .csv or .npy"),
        ("no/x.csv", {}, "no does not exist; make it first"),
        ("x.npy", {"features": ("pooled", "cls2")}, r"features=pooled\+cls2"),
        ("x.csv", {"dtype": "int8"}, "dtype=int8 is unknown; choose float32 or float16"),
        ("x.csv", {"features": ("pooled", "nothing")}, "no feature 'nothing'"),
    ],
)
def test_refusals_come_before_any_image(tmp_path, name, options, message):
    data = Colors(9)
    with pytest.raises(UserError, match=message):
        embed(data, tmp_path / name, **options)
    assert data.reads == 0 and not list(tmp_path.iterdir())


def test_no_readable_image_is_an_error(tmp_path):
    with pytest.raises(UserError, match="none of the 9 images can be read"):
        embed(Colors(9, broken=range(9)), tmp_path / "x.csv")
    assert not (tmp_path / "x.csv").exists()


def test_two_processes_do_not_write_one_file(tmp_path):
    (tmp_path / ".x.csv.parts").mkdir()
    with RunLock(tmp_path / ".x.csv.parts") as lock:
        lock.acquire()
        with pytest.raises(UserError, match="is writing into .*wait for its end, stop it, or give another --to"):
            embed(Colors(9), tmp_path / "x.csv")


def of_rank(folder):
    """Embed as one of two ranks."""
    torch.set_num_threads(1)
    world = World.start("cpu")
    embedding.PART = 8
    for ending in ("parquet", "npy"):
        embed(Colors(45, broken=BROKEN), os.path.join(folder, f"x.{ending}"), ("pooled",), world=world)
    world.close()


def test_two_ranks_write_the_bytes_of_one(tmp_path):
    pair.end(pair.start("-c", f"from embedding.test_embed import of_rank; of_rank({str(tmp_path)!r})"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for ending in ("parquet", "npy"):
        embed(Colors(45, broken=BROKEN), tmp_path / f"one.{ending}")
        assert (tmp_path / f"x.{ending}").read_bytes() == (tmp_path / f"one.{ending}").read_bytes()
    torch.set_num_threads(threads)


def peak_of(folder, count, ending):
    """Embed `count` images as 4,096 numbers each in a process of its own; its peak memory in bytes."""
    code = f"""
import resource, torch
from maskwise.distributed.world import World
from maskwise.embedding.embed import embed
from support.planted import Lookup, Pictures, gray
class Same(Pictures):
    def __len__(self): return {count}
    def image(self, i): return self.images[0]
net = Lookup(torch.rand(256, 4096))
embed(net, Same([gray(7)]), {os.path.join(folder, f"{count}.{ending}")!r}, name="x", world=World(), batch_size=64)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@pytest.mark.parametrize("count", [45, 450])
def test_one_part_at_a_time_is_joined(tmp_path, monkeypatch, count):
    sizes, write = [], embedding.Writer.write

    def counted(self, block):
        sizes.append(len(block.paths))
        write(self, block)

    monkeypatch.setattr(embedding.Writer, "write", counted)
    embed(Colors(count), tmp_path / "x.parquet")
    assert sum(sizes) == count and max(sizes) == 8


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["parquet", "npy"])
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, ending):
    few, many = (peak_of(tmp_path, count, ending) for count in (8192, 24576))
    assert many - few < 96 << 20, "the vectors of 16,384 more images are 256 MiB"


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["data.count=16", "train.epochs=1", "teacher.warmup_temp_epochs=1", "evaluate.limit_bank=null"]
    assert cli.main(["train", "debug/tiny", "--out", "run", *small]) == 0
    capsys.readouterr()
    words = [
        "embed",
        "run",
        "shapes",
        "--to",
        "x.parquet",
        "data.count=20",
        "data.size=40",
        "features=[pooled,patches]",
    ]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == "20 images, pooled 48, patches 16x48: x.parquet\n"
    assert cli.main([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["rows"], shown["unreadable"], shown["name"]) == (20, 0, "run")
    assert len(pandas.read_parquet("x.parquet")) == 20
    for wrong, message in (
        (["data.cont=3"], "data.name=shapes has no option cont; did you mean `count`?"),
        (["data.name=nothing"], "data.name=nothing is unknown; choose folder"),
        (["precision=fp8"], "precision"),
        (["speed=3"], "embed has no option speed"),
    ):
        assert cli.main(["embed", "run", "shapes", "--to", "y.csv", *wrong]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not list(tmp_path.glob("*y.csv*")), error
