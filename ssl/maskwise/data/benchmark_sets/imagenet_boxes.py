"""ImageNet's validation images with their boxes (CLS-LOC), one XML file per image."""

from __future__ import annotations

from pathlib import Path

from maskwise.data.benchmark_sets.listed_files import BoxedFiles, find_root
from maskwise.data.benchmark_sets.voc import read_objects
from maskwise.errors import UserError

ANNOTATIONS = ("Annotations/CLS-LOC/val", "Annotations/val", "bboxes/val")
IMAGES = ("Data/CLS-LOC/val", "val")


class ImageNetBoxes(BoxedFiles):
    """Images with boxes whose maxima are pixels of the object."""

    inclusive = True


def matches(folder: Path) -> bool:
    """Return whether a folder, or its ILSVRC, has boxes of the validation images."""
    root = find_root(folder, "ILSVRC")
    return any((root / name).is_dir() for name in ANNOTATIONS) and any((root / name).is_dir() for name in IMAGES)


def read(folder) -> dict:
    """Read `Annotations/CLS-LOC/val/*.xml` and `val/` or `Data/CLS-LOC/val/` -> {"test"} with `.boxes(i)`.

    Images lie in the folder itself or in class folders. Raises UserError for missing files.
    """
    root = find_root(folder, "ILSVRC")
    if not matches(folder):
        raise UserError(f"ImageNet boxes: {root} lacks {ANNOTATIONS[0]} or val; give the folder that has both")
    annotations, images = (
        next(root / name for name in names if (root / name).is_dir()) for names in (ANNOTATIONS, IMAGES)
    )
    tables = {path.stem: path for path in annotations.rglob("*.xml")}
    files = sorted((file for file in images.rglob("*") if file.stem in tables and file.is_file()), key=lambda f: f.name)
    if not files:
        raise UserError(f"ImageNet boxes: no image of {images} has boxes in {annotations}; give those of one release")
    boxes = [read_objects("ImageNet boxes", tables[file.stem])[0] for file in files]
    return {
        "test": ImageNetBoxes("ImageNet boxes", images, [str(file.relative_to(images)) for file in files], boxes=boxes)
    }
