"""How long the index of a folder takes: `python benchmarks/index.py [FILES] [FOLDERS]`, on empty files in a temporary folder.

Prints one line of JSON: seconds to walk and sort, to open the folder the first time (with the index written) and again (from the index).
"""

import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

from maskwise.data import index
from maskwise.data.datasets import Folder


def timed(call) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return round(time.perf_counter() - start, 2)


def main(files: int, folders: int) -> dict:
    """Make the files, time, take them away."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "images"
        for k in range(folders):
            (root / f"class{k:04d}").mkdir(parents=True)
        for i in range(files):
            os.close(os.open(root / f"class{i % folders:04d}" / f"picture_{i:08d}.jpg", os.O_CREAT | os.O_WRONLY))
        time.sleep(index.SETTLED + 0.5)
        os.environ["MASKWISE_CACHE"] = "none"
        numbers = {"files": files, "folders": folders, "walk": timed(lambda: index.scan(root))}
        os.environ["MASKWISE_CACHE"] = str(Path(place) / "cache")
        return {**numbers, "first": timed(lambda: Folder(root)), "again": timed(lambda: Folder(root)), "machine": f"{os.cpu_count()} cores, {platform.machine()}"}


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:3]]
    print(json.dumps(main(*(given + [1_000_000, 1_000][len(given):]))))
