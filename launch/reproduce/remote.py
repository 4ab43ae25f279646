"""Time the loader on tar files of a bucket beside local ones: `python -m launch.reproduce.remote --json FILE`.

moto serves the bucket on this machine behind a proxy that adds latency to each answer, in a process of its own but on
the same cores, so that the numbers of a bucket are lower bounds. Images per second of whole batches (the default crops)
and of reading encoded images alone, without the cache of ranges, while filling it, and from it.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from maskwise.bench import record
from maskwise.bench.baselines import natural_jpegs
from maskwise.data.datasets.tar import Tar
from maskwise.data.loader import batches
from maskwise.data.multicrop import MultiCrop
from maskwise.storage.options import RemoteOptions

LATENCIES = (0, 10, 50)  # milliseconds
BATCH = 16
TESTS = Path(__file__).parents[2] / "tests"  # support.object_store runs moto


def serve(folder: Path, delay: float, pipe) -> None:
    """Run the bucket until the pipe closes."""
    from support.object_store import running_store

    with running_store() as (proxy, client):
        for file in sorted(folder.glob("*.tar")):
            client.upload_file(str(file), "images", file.name)
        proxy.delay = delay
        pipe.send({name: os.environ[name] for name in os.environ if name.startswith("AWS_")})
        pipe.recv()


def pack(folder: Path, count: int) -> None:
    """Write images into two tar files."""
    natural_jpegs.write(folder / "jpegs", count)
    files = sorted((folder / "jpegs").glob("*/*.jpg"))
    for k in range(2):
        with tarfile.open(folder / f"train-{k:04d}.tar", "w") as tar:
            for file in files[k::2]:
                tar.add(file, f"{file.parent.name}/{file.name}")


def speeds(data: Tar, workers: int) -> dict[str, float]:
    """Return images per second of reading alone, and of batches."""
    rows = list(range(len(data)))
    begin = time.perf_counter()
    data.expect(rows)
    for row in rows:
        data.source(row)
    read = time.perf_counter() - begin
    steps = 2 * len(data) // BATCH
    begin = time.perf_counter()
    for _ in batches(data, MultiCrop(), batch_size=BATCH, total_steps=steps, workers=workers, cache="none"):
        pass
    whole = time.perf_counter() - begin
    return {"read": round(len(rows) / read, 1), "batches": round(steps * BATCH / whole, 1)}


def bucket(folder: Path, latency: int, workers: int) -> dict:
    """Return the speeds of a bucket with a latency in ms."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(folder, latency / 1000, theirs), daemon=True
    )
    server.start()
    os.environ.update(ours.recv())
    found: dict = {"latency_ms": latency}
    for name, options in {
        "one_read_in_flight": RemoteOptions(reads=1, cache=0),
        "sixteen_reads_in_flight": RemoteOptions(cache=0),
        "filling_the_cache": RemoteOptions(),
        "from_the_cache": RemoteOptions(),
    }.items():
        begin = time.perf_counter()
        data = Tar("s3://images", remote=options)
        opened = time.perf_counter() - begin
        found[name] = {"open_seconds": round(opened, 3), **speeds(data, workers)}
    ours.send(None)
    server.join(30)
    return found


def main(count: int, workers: int) -> dict:
    """Measure local tar files and buckets, local ones again at the end."""
    sys.path.insert(0, str(TESTS))
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pack(folder, count)
        result: dict = {"images": count, "batch": BATCH, "workers": workers, "local": [speeds(Tar(folder), workers)]}
        result["buckets"] = []
        for latency in LATENCIES:
            os.environ["MASKWISE_CACHE"] = str(folder / f"cache{latency}")
            from maskwise.storage import store

            store._forget()  # another endpoint
            result["buckets"].append(bucket(folder, latency, workers))
        result["local"].append(speeds(Tar(folder), workers))
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--note", help="a line for the record, such as what else ran on these cores")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    about = record.describe()
    if given.note:
        about["note"] = given.note
    measured = main(given.images, given.workers)
    if given.json:
        record.write(given.json, {"record": about, **measured})
    print(json.dumps(measured, indent=1))
