"""Faults of localization, discovery and the overlap of masks with objects."""

from support.mutant import Mutant

SETS = "tests/functional/test_level_sets.py"
METRICS = "tests/functional/test_metrics.py -k max_box_acc"
CORLOC = "tests/functional/test_metrics.py -k corloc"
LOCALIZATION = "tests/evaluation/test_localization.py"
DISCOVERY = "tests/evaluation/test_discovery.py"
OVERLAP = "tests/evaluation/test_mask_overlap.py"
LAYOUTS = "tests/data/benchmark_sets/test_benchmark_sets.py"

FAULTS = {
    "holes have no contour": Mutant(
        "functional/level_sets.py", {"((x0 > 0) & (y0 > 0)": "((x0 > width) & (y0 > 0)"}, f"{SETS} -k ring"
    ),
    "contours of 4-connected components": Mutant(
        "functional/level_sets.py", {"1 if connectivity == 8 else 0": "0"}, SETS
    ),
    "largest contour by pixels": Mutant("functional/level_sets.py", {"shared + 0.5 * corners": "shared + 100.0"}, SETS),
    "first of equal contours": Mutant("functional/level_sets.py", {"np.lexsort((first,": "np.lexsort((-first,"}, SETS),
    "boxes end at their contour": Mutant(
        "functional/metrics.py", {"inside + torch.tensor([0, 0, 1, 1])": "inside + torch.tensor([0, 0, 0, 0])"}, METRICS
    ),
    "boxes of localization exclusive": Mutant(
        "functional/metrics.py", {"box_iou(boxes, truth, inclusive=True)": "box_iou(boxes, truth)"}, METRICS
    ),
    "one threshold for all IoUs": Mutant(
        "functional/metrics.py",
        {"accuracy.argmax(dim=0) if level": "accuracy.mean(dim=1).argmax().repeat(3) if level"},
        "tests/functional/test_metrics.py -k own_best_threshold",
    ),
    "score maps scaled before resizing": Mutant(
        "functional/metrics.py",
        {"    low, high = scores.aminmax()\n": "    low, high = score_map.aminmax()\n    scores.clamp_(low, high)\n"},
        "tests/functional/test_metrics.py -k score_maps",
    ),
    "corloc counts images without objects": Mutant("functional/metrics.py", {"        if len(boxes)\n": ""}, CORLOC),
    "corloc with an IoU above one half": Mutant("functional/metrics.py", {">= CORLOC_IOU": "> CORLOC_IOU"}, CORLOC),
    "stated size of boxes ignored": Mutant(
        "evaluation/localization.py",
        {'dataset.box_size(index) if hasattr(dataset, "box_size") else decoded': "decoded"},
        LOCALIZATION,
    ),
    "true boxes of localization reach past the image": Mutant(
        "evaluation/localization.py", {"torch.minimum(boxes, sides - 1)": "boxes"}, LOCALIZATION
    ),
    "thresholds of fullsup ignored": Mutant(
        "evaluation/localization.py", {"level and level[series]": "None"}, LOCALIZATION
    ),
    "keys of lost normalized": Mutant(
        "evaluation/discovery.py",
        {"    keys = keys.double()\n    degree": "    keys = F.normalize(keys.double(), dim=1)\n    degree"},
        DISCOVERY,
    ),
    "lost votes instead of summing": Mutant(
        "evaluation/discovery.py",
        {"keys @ keys[expanded].sum(dim=0) > 0": "(keys @ keys[expanded].T > 0).sum(dim=1) > 0"},
        DISCOVERY,
    ),
    "highest degree is the seed": Mutant(
        "evaluation/discovery.py",
        {"degree.argsort(stable=True)": "degree.argsort(stable=True, descending=True)"},
        DISCOVERY,
    ),
    "dino-seg keeps the least attended": Mutant(
        "evaluation/discovery.py",
        {"attention.double().sort(stable=True)": "attention.double().neg().sort(stable=True)"},
        DISCOVERY,
    ),
    "published fault of dino-seg mended": Mutant(
        "evaluation/discovery.py", {"numbers = range(1, count) if count > 1 else range(count)": "pass"}, DISCOVERY
    ),
    "height and width of patches exchanged": Mutant(
        "evaluation/discovery.py", {"zip(corners, (width, height) * 2)": "zip(corners, (height, width) * 2)"}, DISCOVERY
    ),
    "token cut split at zero": Mutant("evaluation/discovery.py", {"vector > vector.mean()": "vector > 0"}, DISCOVERY),
    "keys of the last block instead of simpool's": Mutant(
        "evaluation/discovery.py",
        {"found = self.encoder.pooling.keys(tokens.patches)": "found = self.encoder.backbone(images, keys=True).keys"},
        DISCOVERY,
    ),
    "padding before normalization": Mutant(
        "evaluation/discovery.py",
        {
            "(0, width - images.shape[-1], 0, height - images.shape[-2]))": (
                "(0, width - images.shape[-1], 0, height - images.shape[-2]), value=1.0)"
            )
        },
        DISCOVERY,
    ),
    "hard objects always counted": Mutant(
        "data/benchmark_sets/boxed.py", {"if not hard and": "if False and"}, DISCOVERY
    ),
    "minima of voc not counted from zero": Mutant(
        "data/benchmark_sets/voc.py",
        {"torch.tensor([1.0, 1.0, 0.0, 0.0])": "torch.tensor([0.0, 0.0, 0.0, 0.0])"},
        LAYOUTS,
    ),
    "recall of masks is their precision": Mutant(
        "evaluation/mask_overlap.py",
        {'add(f"{name}_recall", mask & on_objects, on_objects)': 'add(f"{name}_recall", mask & on_objects, mask)'},
        OVERLAP,
    ),
    "first box of an image only": Mutant(
        "data/benchmark_sets/boxed.py",
        {"boxes_of(dataset, index).round()": "boxes_of(dataset, index)[:1].round()"},
        OVERLAP,
    ),
}
