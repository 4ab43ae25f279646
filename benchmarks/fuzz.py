"""Two thousand damaged image files through the real loader: `python -m benchmarks.fuzz [--each 200] [--seed 0] [--json FILE]`.

The files of damage.py and what is expected of each are written first; then a child whose memory is limited reads them, one by one
and in batches through a data worker. Told are crashes, hangs, files that ended otherwise than expected, the slowest file, and how much
memory reading took beyond what the program itself needs.
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

ROOT = Path(__file__).resolve().parents[1]
ROOM = 2 << 30  # bytes of address space for reading, beyond the program's own
SLOW = 5.0  # seconds for one file


def read_one_by_one(folder: Path, skip: int) -> None:
    """The child: a line of JSON before and after each file, so that whoever finds it dead knows over which."""
    import hashlib
    import resource

    from maskwise.data.decode import CorruptImage
    from maskwise.data.listed import Listed
    from maskwise.data.reader import Decoded

    data = Listed(folder / "list.csv")
    reader, before = Decoded(data), peak()
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (virtual + ROOM, virtual + ROOM))
    for index in range(skip, len(data)):
        print(json.dumps({"begin": index}), flush=True)
        start, line = time.perf_counter(), {"index": index}
        try:
            pixels = reader.image(index)
            line |= {"verdict": "readable", "shape": list(pixels.shape), "pixels": hashlib.sha256(pixels.contiguous().numpy()).hexdigest()}
        except CorruptImage as error:
            line |= {"verdict": "refused", "reason": error.reason}
        except BaseException as error:  # what the loader should have made a CorruptImage of
            line |= {"verdict": f"{type(error).__name__}: {error}"}
        print(json.dumps({**line, "seconds": round(time.perf_counter() - start, 4), "grown": peak() - before}), flush=True)


def peak() -> int:
    """Bytes that this process has held at most."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_in_batches(folder: Path) -> None:
    """The child: all files as two batches of a run with a data worker; prints who was unreadable."""
    from maskwise.data.listed import Listed
    from maskwise.data.loader import batches
    from maskwise.data.multicrop import MultiCrop

    data = Listed(folder / "list.csv")
    crops = MultiCrop(global_size=16, local_size=8, local_number=2)
    stream = batches(data, crops, batch_size=len(data) // 2, total_steps=2, workers=1, cache="none")
    taken = sum(len(batch) for batch in stream)
    print(json.dumps({"taken": taken, "corrupt": sorted(stream.corrupt), "replaced": stream.replaced}), flush=True)


def child(mode: str, folder: Path, *more: str, seconds: float) -> tuple[list[dict], str]:
    """The lines a child printed, and how it ended: "", "hang" or "crash (status)"."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "ssl"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.fuzz", mode, str(folder), *more]
    running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        text, ended = running.communicate(timeout=seconds)[0], ""
    except subprocess.TimeoutExpired:
        running.kill()
        text, ended = running.communicate()[0], "hang"
    if not ended and running.returncode:
        ended = f"crash ({running.returncode})"
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")], ended


def verdicts(folder: Path, count: int, seconds: float) -> list[dict]:
    """What became of each of `count` files; a child that dies or hangs over one is followed by another that begins behind it."""
    found: dict[int, dict] = {}
    while len(found) < count:
        lines, ended = child("--one-by-one", folder, str(len(found)), seconds=seconds)
        found |= {line["index"]: line for line in lines if "index" in line}
        if len(found) < count:
            found[len(found)] = {"index": len(found), "verdict": ended or "no answer", "seconds": seconds, "grown": 0}
    return [found[index] for index in range(count)]


def judge(rows: list[dict], ends: list[dict], sound: dict[str, str]) -> list[str]:
    """A line for each file that ended otherwise than was written down, or whose pixels are not those of the sound file it holds."""
    from benchmarks.damage import UNCHANGED

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


def run(each: int, seed: int, folder: Path, seconds: float = 600.0) -> dict:
    """Make the corpus, read it, judge it."""
    import hashlib

    from benchmarks import damage
    from maskwise.data.decode import decode

    begin = time.perf_counter()
    rows = damage.write(folder, each, seed)
    (folder / "list.csv").write_text("".join(f"{name}\n" for name in ["path", *(row["path"] for row in rows)]))
    sound = {path.name: hashlib.sha256(decode(path).contiguous().numpy()).hexdigest() for path in sorted((folder / "sound").iterdir())}
    made = time.perf_counter()
    ends = verdicts(folder, len(rows), seconds)
    wrong = judge(rows, ends, sound)
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
            "files": len(mine), **{f"expected {name}": count for name, count in Counter(row["verdict"] for row, _ in mine).items()},
            **dict(Counter(end["verdict"] for _, end in mine)), "slowest": max(end["seconds"] for _, end in mine),
        }  # fmt: skip
    return {
        "files": len(rows), "seed": seed, "kinds": table, "wrong": wrong, "readable": len(rows) - len(refused), "refused": len(refused),
        "slowest_seconds": max(end["seconds"] for end in ends), "grown_mib": round(max(end["grown"] for end in ends) / 2**20, 1),
        "seconds": {"making": round(made - begin, 1), "reading": round(time.perf_counter() - made, 1)},
        "expectations_sha256": hashlib.sha256((folder / "expectations.csv").read_bytes()).hexdigest(),
    }  # fmt: skip


def main(words: list[str] | None = None) -> int:
    """Make, read, judge, print; 1 where a file ended otherwise than expected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=200, help="files of each of the ten kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as place:
        result = run(options.each, options.seed, Path(place))
    for line in result["wrong"]:
        print(line)
    print(f"{result['files']} files: {result['readable']} readable, {result['refused']} refused, {len(result['wrong'])} otherwise than expected; "
          f"slowest {result['slowest_seconds']} s, memory grown by {result['grown_mib']} MiB")  # fmt: skip
    if options.json:
        import PIL
        import torch

        from maskwise.bench import machine

        Path(options.json).write_text(json.dumps({"machine": machine.about(torch.device("cpu")), "pillow": PIL.__version__, **result}, indent=1) + "\n")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one-by-one"]:
        read_one_by_one(Path(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1:2] == ["--in-batches"]:
        read_in_batches(Path(sys.argv[2]))
    else:
        raise SystemExit(main())
