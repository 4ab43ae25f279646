"""Files of earlier versions, as tests/fixtures/old stores them."""

import shutil
from pathlib import Path

OLD = Path(__file__).parents[1] / "fixtures" / "old"
PACKED = ("last", "preempted", "metrics.jsonl", "bad_batches.jsonl", "README.md")  # stored with .txt appended


def restored(kind: str, name: str) -> Path:
    """Copy a stored folder into the working folder, with the original file names."""
    source, target = OLD / kind / name, Path(name).resolve()
    for file in (path for path in source.rglob("*") if path.is_file()):
        plain = file.name.removesuffix(".txt")
        place = target / file.relative_to(source).parent / (plain if plain in PACKED else file.name)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    return target
