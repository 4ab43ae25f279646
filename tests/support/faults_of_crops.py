"""Faults of training crops that are not square, for tests/mutants.py."""

from support.mutant import Mutant

CROPS = "tests/data/test_multicrop.py -k square"
RUNS = "tests/runs/test_crop_sizes.py"

FAULTS = {
    "height and width of global crops swapped": Mutant(
        "data/multicrop.py", {"= pair(options.global_size), pair(": "= pair(options.global_size)[::-1], pair("}, CROPS
    ),
    "aspect ratio of the region follows the crop": Mutant(
        "data/multicrop.py",
        {"np.log(self.ratio)\n": "np.log(self.ratio) + np.log(self.global_size[1] / self.global_size[0])\n"},
        CROPS,
    ),
    "decoded at a fraction of the shorter side": Mutant(
        "data/multicrop.py",
        {"(boxes[:, 2:] // sizes).min()": "(boxes[:, 2:] // sizes.min(1, keepdims=True)).min()"},
        "tests/data/test_multicrop.py -k fraction",
    ),
    "boxes erased within a square only": Mutant(
        "data/augmentation/random_erasing.py",
        {"limit = torch.tensor(pair(size))": "limit = torch.tensor(min(pair(size)))"},
        "tests/data/augmentation/test_supervised_crop.py -k loop",
    ),
    "strength of a policy by the longer side": Mutant(
        "data/augmentation/supervised_crop.py",
        {"min(self.global_size), tuple(mean": "max(self.global_size), tuple(mean"},
        "tests/data/augmentation/test_supervised_crop.py -k timm",
    ),
    "rows padded as for a square grid": Mutant(
        "build/self_supervised.py",
        {"grid_for(pair(recipe.crops.global_size))": "grid_for(pair(recipe.crops.global_size)[:1] * 2)"},
        f"{RUNS} -k padding",
    ),
    "crops checked as squares": Mutant(
        "recipe/consistency.py",
        {"backbone.check_size(pair(values[key]))": "backbone.check_size((max(pair(values[key])),) * 2)"},
        f"{RUNS} -k checked",
    ),
    "pictures of a sheet squashed to squares": Mutant(
        "imaging/drawing.py",
        {"tall = max(1, round(tile * first.shape[0] / first.shape[1]))": "tall = tile"},
        "tests/imaging/test_drawing.py -k aspect",
    ),
}
