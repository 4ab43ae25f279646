"""Time the index of a large folder of empty files: `python -m launch.reproduce.index [FILES] [FOLDERS] --json FILE`.

Seconds to walk and sort, to open the folder first (writing the index) and again (reading it).
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from maskwise.bench import record
from maskwise.data.datasets import folder_index
from maskwise.data.datasets.folder import Folder


def timed(call) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    call()
    return round(time.perf_counter() - start, 2)


def main(files: int, folders: int) -> dict:
    """Write the files to a temporary folder and time the index."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        for k in range(folders):
            (root / f"class{k:04d}").mkdir(parents=True)
        for i in range(files):
            os.close(os.open(root / f"class{i % folders:04d}" / f"picture_{i:08d}.jpg", os.O_CREAT | os.O_WRONLY))
        time.sleep(folder_index.SETTLED + 0.5)
        os.environ["MASKWISE_CACHE"] = "none"
        numbers = {"files": files, "folders": folders, "walk": timed(lambda: folder_index.scan(root))}
        os.environ["MASKWISE_CACHE"] = str(Path(folder) / "cache")
        return {**numbers, "first": timed(lambda: Folder(root)), "again": timed(lambda: Folder(root))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=int, nargs="?", default=1_000_000)
    parser.add_argument("folders", type=int, nargs="?", default=1_000)
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    about = record.describe()
    result = main(given.files, given.folders)
    if given.json:
        record.write(given.json, {"record": about, **result})
    print(json.dumps(result))
