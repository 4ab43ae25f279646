"""Embedding of an image set into a file: parts on disk by all ranks, joined by rank 0 in bounded memory."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from maskwise.data.datasets.contents import contents
from maskwise.embedding.formats import DTYPES, SUFFIXES, Block, Writer, kind_of, read_settings
from maskwise.embedding.identity import digest, identities
from maskwise.engine.atomic_file import WRITE_ERRORS, write_atomic, write_error
from maskwise.engine.run_lock import RunLock
from maskwise.errors import UserError
from maskwise.evaluation.features import extract
from maskwise.evaluation.features.feature_names import check
from maskwise.evaluation.features.parts import part_size, read_part, write_part
from maskwise.process.progress import Progress

FORMAT = 1
PART = 4096  # about the rows of a part: the most that a kill loses, and that a rank holds
SEVERAL_ROWS = ("patches", "keys", "attention", "vectors")  # features with more than one row per image
SIZE = "size"  # of the images, among the features of a part
KEY_FILE = "key"


class SizedImages:
    """A dataset that notes height and width of the images it decodes, and counts them; threads may share it."""

    def __init__(self, dataset, progress: Progress):
        self.dataset, self.progress = dataset, progress
        self.sizes: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int):
        """Return one image. Raises CorruptImage."""
        self.progress.add(1)
        image = self.dataset.image(index)
        self.sizes[index] = tuple(image.shape[-2:])
        return image

    def name(self, index: int) -> str:
        """Return the name of one image."""
        return self.dataset.name(index)


def embed(
    encoder,
    dataset,
    to,
    features: Sequence[str] = ("pooled",),
    *,
    name: str,
    world,
    batch_size: int = 256,
    precision: str = "fp32",
    dtype: str = "float32",
) -> dict:
    """Write one row per readable image of a dataset to a Parquet, CSV or NPY file; returns its settings.

    features: names as in `extract`; vectors become columns, one is called `vector`, several have the features' names;
    features with several rows per image (patches, keys, attention, vectors) become memory-mappable NPY files beside the
    file, row by row the same images. name: of the model. Ranks compute whole parts in turn in a shared folder beside
    the file, which an interrupted call leaves and the next one continues; the file does not depend on their number.
    Unreadable images are listed in `NAME.unreadable.csv`. A complete file is left as it is. Raises UserError for
    options that do not fit, a file of other settings, and a disk that refuses.
    """
    path, names = Path(to), tuple(dict.fromkeys(features))
    check_options(path, names, dtype, batch_size)
    check(encoder, names, precision)
    model, data = identities(encoder, dataset, precision)
    key = digest({"format": FORMAT, "data": data, "features": names, "dtype": dtype, "kind": kind_of(path)})
    settings = {
        "format": FORMAT,
        "key": key,
        "model": model,
        "name": name,
        "features": list(names),
        "precision": precision,
        "dtype": dtype,
        "image_size": list(encoder.image_size),
        "root": str(root.resolve()) if (root := getattr(dataset, "root", None)) is not None else None,
        "images": contents(dataset),
        "classes": None if (classes := getattr(dataset, "classes", None)) is None else list(map(str, classes)),
    }
    if (earlier := existing(path, key)) is not None:
        world.barrier()
        return earlier
    folder = path.with_name(f".{path.name}.parts")
    length = batch_size if several(names) else max(1, PART // batch_size) * batch_size
    starts = range(0, len(dataset), length)
    result: dict = {}
    with RunLock(folder, option="--to") as lock:
        prepare(folder, digest([key, batch_size]), lock, world)
        with written_by_all(world, folder):
            compute(encoder, dataset, names, folder, starts, length, world, batch_size, precision)
        with written_by_all(world, path):
            if world.is_main:
                result = join(path, dataset, names, [part_file(folder, start) for start in starts], settings)
                shutil.rmtree(folder, ignore_errors=True)
    return world.gather_objects(result)[0]


@contextlib.contextmanager
def written_by_all(world, place: Path) -> Iterator[None]:
    """Wait for all ranks at the end of the block; raises the same UserError on all where one could not write."""
    problem = ""
    try:
        yield
    except WRITE_ERRORS as error:
        problem = f"{write_error(place, error)}, then give the same command again: it continues"
    except UserError as error:
        problem = str(error)
    world.raise_together(problem)


def check_options(path: Path, names: Sequence[str], dtype: str, batch_size: int) -> None:
    """Raise UserError for a file and features that do not fit each other."""
    kind = kind_of(path)
    if not path.parent.is_dir():
        raise UserError(f"--to {path}: the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise UserError(f"--to {path} is a folder; give a file that ends in {', '.join(SUFFIXES)}")
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype} is unknown; choose {' or '.join(DTYPES)}")
    vectors = [name for name in names if name not in several(names)]
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    if not names:
        raise UserError("features names none; give features=pooled")
    if kind == ".npy" and len(vectors) > 1:
        raise UserError(
            f"an NPY file holds one vector per image, and features names {', '.join(vectors)}; join them as "
            f"features={'+'.join(vectors)}, or give a file that ends in .parquet"
        )


def several(names: Sequence[str]) -> list[str]:
    """Return the features with several rows per image."""
    return [name for name in names if any(name.startswith(kind) for kind in SEVERAL_ROWS)]


def existing(path: Path, key: str) -> dict | None:
    """Return the settings of a file that is complete, None where there is none. Raises UserError for another file."""
    if not path.exists():
        return None
    settings = read_settings(path)
    if settings is None:
        raise UserError(f"--to {path} exists and was not written by `maskwise embed`; remove it, or give another --to")
    if settings["key"] != key:
        raise UserError(
            f"--to {path} holds embeddings of another model ({settings['name']}), other images or other options; "
            "remove it, or give another --to"
        )
    return settings


def prepare(folder: Path, key: str, lock: RunLock, world) -> None:
    """Make and lock the folder of parts on rank 0; parts of other settings are removed."""
    problem = ""
    if world.is_main:
        try:
            folder.mkdir(exist_ok=True)
            lock.acquire()
            file = folder / KEY_FILE
            if not file.is_file() or file.read_text(encoding="utf-8").strip() != key:
                for part in folder.glob("*.safetensors"):
                    part.unlink()
                write_atomic(file, key + "\n")
        except OSError as error:
            problem = write_error(folder, error)
        except UserError as error:
            problem = str(error)
    world.raise_together(problem)


def part_file(folder: Path, start: int) -> Path:
    """Return the file of the part that begins at a row."""
    return folder / f"{start:010d}.safetensors"


def compute(encoder, dataset, names, folder, starts, length, world, batch_size, precision) -> None:
    """Compute this rank's missing parts."""
    mine = [start for number, start in enumerate(starts) if number % world.size == world.rank]
    wanted = (*names, SIZE)
    missing = [start for start in mine if read_part(part_file(folder, start), wanted) is None]
    rows = {start: min(length, len(dataset) - start) for start in mine}
    done = sum(rows.values()) - sum(rows[start] for start in missing)
    with Progress("embedding", sum(rows.values()), done=done) as progress:
        sized = SizedImages(dataset, progress)
        for start in missing:
            values, index, corrupt = extract.extract_rows(
                encoder,
                sized,
                names,
                torch.arange(start, start + rows[start]),
                batch_size=batch_size,
                precision=precision,
            )
            values[SIZE] = torch.tensor([sized.sizes[i] for i in index.tolist()], dtype=torch.int64).reshape(-1, 2)
            sized.sizes.clear()
            write_part(part_file(folder, start), values, index, corrupt)


def join(path: Path, dataset, names: Sequence[str], parts: Sequence[Path], settings: dict) -> dict:
    """Write the rows of all parts into the file, one part at a time; returns the settings with the number of rows."""
    rows, shapes = 0, {}
    for part in parts:
        count, found = part_size(part)
        rows += count
        shapes |= found if count else {}
    listed, unreadable = several(names), {}
    columns = [name for name in names if name not in listed]
    title = {name: "vector" if len(columns) == 1 else name for name in columns}
    if rows:
        settings = {
            **settings,
            "rows": rows,
            "columns": {title[name]: name for name in columns},
            "dimensions": {name: list(shapes[name]) for name in names},
        }
        sizes = ({title[name]: shapes[name] for name in columns}, {name: shapes[name] for name in listed})
        writer = Writer(path, settings, *sizes, rows)
    else:
        writer = None
    try:
        for part in parts:
            read = read_part(part, (*names, SIZE))
            if read is None:
                part.unlink(missing_ok=True)
                raise UserError(f"{part} became unreadable while it was joined; give the same command again")
            values, index, corrupt = read
            unreadable |= corrupt
            if len(index):
                writer.write(block_of(dataset, values, index.tolist(), title, listed))
        extract.require_images(rows, dataset, unreadable)
        writer.finish(unreadable)
    finally:
        if writer is not None:
            writer.discard()
    return settings


def block_of(dataset, values: dict, index: list[int], title: dict[str, str], listed: Sequence[str]) -> Block:
    """Return the rows of a part with the names, labels and sizes of their images."""
    labels = class_names = None
    if dataset.labels is not None:
        labels = torch.as_tensor(dataset.labels)[torch.tensor(index)].tolist()
        classes = getattr(dataset, "classes", None)
        class_names = [str(classes[label]) for label in labels] if classes is not None else None
    arrays = {name: values[name].float().numpy() for name in (*title, *listed)}
    heights, widths = values[SIZE].T.tolist()
    return Block(
        [dataset.name(i) for i in index],
        labels,
        class_names,
        widths,
        heights,
        {column: arrays[name] for name, column in title.items()},
        {name: arrays[name] for name in listed},
    )
