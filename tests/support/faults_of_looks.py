"""Faults of `maskwise look`: maps that are not the model's, masks that are not the maskings', pages that lose data."""

from support.mutant import Mutant

MAPS = "tests/evaluation/look/test_maps.py"
CODES = "tests/evaluation/look/test_codes.py"
PAGE = "tests/evaluation/look/test_page.py"
SHEET = "tests/evaluation/look/test_sheet.py"
VIDEO = "tests/data/decoding/test_video.py"

FAULTS = {
    "whole image made square": Mutant(
        "evaluation/look/maps.py",
        {"for length, unit in zip(size, units)": "for length, unit in zip(size[:1] * 2, units)"},
        MAPS,
    ),
    "blocks of a look in reverse": Mutant(
        "evaluation/look/maps.py", {"in enumerate(rows)]": "in enumerate(rows.flip(0))]"}, MAPS
    ),
    "masks of a look by another number": Mutant(
        "evaluation/look/maps.py", {"torch.full((count,), number)": "torch.full((count,), 0)"}, MAPS
    ),
    "patches of SimPool without the final norm": Mutant(
        "evaluation/look/maps.py", {"patches = encoder.norm(patches)": "pass"}, MAPS
    ),
    "smallest directions of tokens": Mutant(
        "evaluation/look/codes.py", {"vectors.flip(1)[:, : min": "vectors[:, : min"}, CODES
    ),
    "components of each image alone": Mutant(
        "evaluation/look/codes.py", {"covariance += centered.T @ centered": "covariance = centered.T @ centered"}, CODES
    ),
    "maps of a page without the root": Mutant(
        "evaluation/look/page.py", {"(maps.clamp(min=0) / most).sqrt()": "(maps.clamp(min=0) / most)"}, PAGE
    ),
    "masks of a page not as changes": Mutant("evaluation/look/page.py", {"bits[1:] ^ bits[:-1]": "bits[1:]"}, PAGE),
    "first blocks of a page instead of the last": Mutant(
        "evaluation/look/page.py", {"for layer in reversed(layers):": "for layer in layers:"}, PAGE
    ),
    "data can end the script": Mutant("evaluation/look/page.py", {'.replace("<", "\\\\u003c")': ""}, PAGE),
    "similarity to another patch": Mutant(
        "evaluation/look/sheet.py", {"row * grid[1] + column": "column * grid[0] + row"}, SHEET
    ),
    "mask of a sheet at another ratio": Mutant(
        "evaluation/look/sheet.py",
        {"round(ratio * (len(RATIOS) - 1))": "round((1 - ratio) * (len(RATIOS) - 1))"},
        SHEET,
    ),
    "boxes of a panel not scaled": Mutant("imaging/panels.py", {"np.array(box) * scale": "np.array(box)"}, SHEET),
    "frames from the beginning": Mutant(
        "data/decoding/video.py", {"round(i * (total - 1) / max(1, limit - 1))": "i"}, VIDEO
    ),
    "blue and red of a video exchanged": Mutant(
        "data/decoding/video.py", {"cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)": "frame"}, VIDEO
    ),
}
