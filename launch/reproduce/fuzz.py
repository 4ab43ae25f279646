"""Read two thousand damaged image files with the loader: `python -m launch.reproduce.fuzz [--each 200] [--json FILE]`.

The files of damage.py and their expected outcomes are written first; then a child process with limited memory reads
them, one by one and in batches through a data worker. Reported are crashes, hangs, unexpected outcomes, the slowest
file, and the memory that reading took beyond that of the program.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOM = 2 << 30  # bytes of address space for reading, beyond the program's own
SLOW = 5.0  # seconds for one file


def read_one_by_one(folder: Path, skip: int) -> None:
    """Read in the child process; print JSON before and after each file, so that a crash is attributed to a file."""
    import hashlib
    import resource

    from maskwise.data.datasets.list_file import ImageList
    from maskwise.data.decoding.image import CorruptImage
    from maskwise.data.reader import DecodedDataset

    data = ImageList(folder / "list.csv")
    reader, before = DecodedDataset(data), peak()
    virtual = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (virtual + ROOM, virtual + ROOM))
    for index in range(skip, len(data)):
        print(json.dumps({"begin": index}), flush=True)
        start, line = time.perf_counter(), {"index": index}
        try:
            pixels = reader.image(index)
            line |= {
                "verdict": "readable",
                "shape": list(pixels.shape),
                "pixels": hashlib.sha256(pixels.contiguous().numpy()).hexdigest(),
            }
        except CorruptImage as error:
            line |= {"verdict": "refused", "reason": error.reason}
        except BaseException as error:  # the loader should have raised CorruptImage
            line |= {"verdict": f"{type(error).__name__}: {error}"}
        print(
            json.dumps({**line, "seconds": round(time.perf_counter() - start, 4), "grown": peak() - before}), flush=True
        )


def peak() -> int:
    """Return the peak memory of this process in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_in_batches(folder: Path) -> None:
    """The child: all files as two batches of a run with a data worker; prints who was unreadable."""
    from maskwise.data.datasets.list_file import ImageList
    from maskwise.data.loader import batches
    from maskwise.data.multicrop import MultiCrop

    data = ImageList(folder / "list.csv")
    crops = MultiCrop(global_size=16, local_size=8, local_number=2)
    stream = batches(data, crops, batch_size=len(data) // 2, total_steps=2, workers=1, cache="none")
    taken = sum(len(batch) for batch in stream)
    print(json.dumps({"taken": taken, "corrupt": sorted(stream.corrupt), "replaced": stream.replaced}), flush=True)


def child(mode: str, folder: Path, *more: str, seconds: float) -> tuple[list[dict], str]:
    """The lines a child printed, and how it ended: "", "hang" or "crash (status)"."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "ssl"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch.reproduce.fuzz", mode, str(folder), *more]
    running = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )
    try:
        text, ended = running.communicate(timeout=seconds)[0], ""
    except subprocess.TimeoutExpired:
        running.kill()
        text, ended = running.communicate()[0], "hang"
    if not ended and running.returncode:
        ended = f"crash ({running.returncode})"
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")], ended


def verdicts(folder: Path, count: int, seconds: float) -> list[dict]:
    """Return the outcome of each of `count` files; a child that crashes or hangs is replaced by another."""
    outcomes: dict[int, dict] = {}
    while len(outcomes) < count:
        lines, ended = child("--one-by-one", folder, str(len(outcomes)), seconds=seconds)
        outcomes |= {line["index"]: line for line in lines if "index" in line}
        if len(outcomes) < count:
            outcomes[len(outcomes)] = {
                "index": len(outcomes),
                "verdict": ended or "no answer",
                "seconds": seconds,
                "grown": 0,
            }
    return [outcomes[index] for index in range(count)]


def unexpected(rows: list[dict], ends: list[dict], sound: dict[str, str]) -> list[str]:
    """Return a line per file with an unexpected outcome, or with pixels that differ from those of its intact file."""
    from launch.reproduce.damage import UNCHANGED

    wrong = []
    for row, end in zip(rows, ends):
        if end["verdict"] not in (("readable", "refused") if row["verdict"] == "either" else (row["verdict"],)):
            wrong.append(f"{row['path']}: {end['verdict']} ({end.get('reason', '')}), expected {row['verdict']}")
        elif row["kind"] in UNCHANGED and end["pixels"] != sound[row["base"]]:
            wrong.append(f"{row['path']}: other pixels than the sound file's")
        elif end["seconds"] > SLOW:
            wrong.append(f"{row['path']}: took {end['seconds']} s")
        elif "MemoryError" in end.get("reason", ""):
            wrong.append(f"{row['path']}: refused only by the limit of memory")
    return wrong


def run(count: int, seed: int, folder: Path, seconds: float = 600.0) -> dict:
    """Write the corpus, read it, compare with the expected outcomes."""
    import hashlib

    from launch.reproduce import damage
    from maskwise.data.decoding.image import decode

    begin = time.perf_counter()
    rows = damage.write(folder, count, seed)
    names = ["path", *(row["path"] for row in rows)]
    (folder / "list.csv").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    sound = {
        path.name: hashlib.sha256(decode(path).contiguous().numpy()).hexdigest()
        for path in sorted((folder / "sound").iterdir())
    }
    made = time.perf_counter()
    ends = verdicts(folder, len(rows), seconds)
    wrong = unexpected(rows, ends, sound)
    lines, ended = child("--in-batches", folder, seconds=seconds)
    refused = sorted(row["path"] for row, end in zip(rows, ends) if end["verdict"] == "refused")
    if ended or not lines:
        wrong.append(f"in batches: {ended or 'no answer'}")
    elif lines[0]["corrupt"] != refused or lines[0]["taken"] != len(rows) // 2 * 2:
        wrong.append(f"in batches: {len(lines[0]['corrupt'])} refused, one by one {len(refused)}")
    table = {}
    for kind in damage.KINDS:
        mine = [(row, end) for row, end in zip(rows, ends) if row["kind"] == kind]
        table[kind] = {
            "files": len(mine),
            **{f"expected {name}": count for name, count in Counter(row["verdict"] for row, _ in mine).items()},
            **dict(Counter(end["verdict"] for _, end in mine)),
            "slowest": max(end["seconds"] for _, end in mine),
        }
    return {
        "files": len(rows),
        "seed": seed,
        "kinds": table,
        "wrong": wrong,
        "readable": len(rows) - len(refused),
        "refused": len(refused),
        "slowest_seconds": max(end["seconds"] for end in ends),
        "grown_mib": round(max(end["grown"] for end in ends) / 2**20, 1),
        "seconds": {"making": round(made - begin, 1), "reading": round(time.perf_counter() - made, 1)},
        "expectations_sha256": hashlib.sha256((folder / "expectations.csv").read_bytes()).hexdigest(),
    }


def main(words: list[str] | None = None) -> int:
    """Write, read, compare, print; return 1 if an outcome is unexpected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=200, help="files of each of the ten kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as place:
        result = run(options.each, options.seed, Path(place))
    for line in result["wrong"]:
        print(line)
    print(
        f"{result['files']} files: {result['readable']} readable, {result['refused']} refused, "
        f"{len(result['wrong'])} otherwise than expected; "
        f"slowest {result['slowest_seconds']} s, memory grown by {result['grown_mib']} MiB"
    )
    if options.json:
        import PIL

        from maskwise.bench import record

        record.write(options.json, {"record": record.describe(seed=options.seed), "pillow": PIL.__version__, **result})
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one-by-one"]:
        read_one_by_one(Path(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1:2] == ["--in-batches"]:
        read_in_batches(Path(sys.argv[2]))
    else:
        raise SystemExit(main())
