"""Faults of evaluations and of their data: protocols that are not followed although the report says so."""

from support.mutant import Mutant

RETRIEVAL = "tests/evaluation/test_retrieval.py"
CLUSTERING = "tests/evaluation/test_clustering.py"
MASKED = "tests/evaluation/test_masked.py"
COPIES = "tests/evaluation/test_copy_detection.py"
ROBUSTNESS = "tests/evaluation/test_robustness.py"
FINETUNE = "tests/evaluation/test_finetune.py -k first_step"
SHEETS = "tests/evaluation/suite/test_attention_sheets.py -k by_hand"
WSOL = "tests/data/benchmark_sets/test_benchmark_sets.py -k wsol"
BACKGROUNDS = "tests/evaluation/test_backgrounds.py"

FAULTS = {
    "official query not cut to its box": Mutant(
        "evaluation/retrieval.py", {'boxes if crop and role == "query" else None': "None"}, RETRIEVAL
    ),
    "query of the papers cut to its box": Mutant(
        "evaluation/retrieval.py", {'"papers": (False, 224)': '"papers": (True, 224)'}, RETRIEVAL
    ),
    "database cut to the boxes of queries": Mutant(
        "evaluation/retrieval.py",
        {'boxes if crop and role == "query" else None': "boxes * 4 if crop else None"},
        RETRIEVAL,
    ),
    "size of the papers 1024": Mutant(
        "evaluation/retrieval.py", {'"papers": (False, 224)': '"papers": (False, 1024)'}, RETRIEVAL
    ),
    "official size 224": Mutant(
        "evaluation/retrieval.py", {'"official": (True, 1024)': '"official": (True, 224)'}, RETRIEVAL
    ),
    "given size of retrieval ignored": Mutant(
        "evaluation/retrieval.py", {"Downscaled(chosen.long_side or longest": "Downscaled(longest"}, RETRIEVAL
    ),
    "several scales ignored": Mutant(
        "evaluation/retrieval.py", {"if chosen.multi_scale else encoder": "if False else encoder"}, RETRIEVAL
    ),
    "every variant of IN-9 scores the original": Mutant(
        "evaluation/backgrounds.py",
        {"scorer.score(dataset, view)": 'scorer.score(variants["original"], view)'},
        BACKGROUNDS,
    ),
    "every variant of IN-9 reads the original": Mutant(
        "data/benchmark_sets/in9.py",
        {'_variant(root / name / "val") for': '_variant(root / "original" / "val") for'},
        BACKGROUNDS,
    ),
    "clustering without L2": Mutant(
        "evaluation/clustering.py", {"kmeans(F.normalize(rows, dim=1).to(device)": "kmeans(rows.to(device)"}, CLUSTERING
    ),
    "worst restart kept": Mutant("evaluation/clustering.py", {"total < best[1]": "total > best[1]"}, CLUSTERING),
    "last restart kept": Mutant(
        "evaluation/clustering.py", {"if best is None or total < best[1]:": "if True:"}, CLUSTERING
    ),
    "smallest logit of the head": Mutant(
        "evaluation/clustering.py",
        {"head(part.to(device)).argmax(dim=1)": "head(part.to(device)).argmin(dim=1)"},
        CLUSTERING,
    ),
    "guide of masked accuracy ignored": Mutant(
        "evaluation/masked.py", {"encoder if chosen.guide is None else chosen.guide": "encoder"}, MASKED
    ),
    "least attended patches blackened": Mutant(
        "evaluation/masked.py",
        {"attention_mask(salience, ratio, mode=mode)": 'attention_mask(salience, ratio, mode="low")'},
        MASKED,
    ),
    "nothing blackened": Mutant(
        "evaluation/masked.py", {"scorer.score(test, MaskedOut(crop, mask, grid))": "scorer.score(test)"}, MASKED
    ),
    "whitening ignored": Mutant(
        "evaluation/copy_detection.py", {"rows if rotation is None else (rows - mean) @ rotation": "rows"}, COPIES
    ),
    "whitening=false ignored": Mutant(
        "evaluation/copy_detection.py",
        {'"whitening" in data if chosen.whitening is None else chosen.whitening': '"whitening" in data'},
        COPIES,
    ),
    "whitening rotates without scaling": Mutant(
        "evaluation/copy_detection.py", {"vectors[:, varying] * values[varying].rsqrt()": "vectors[:, varying]"}, COPIES
    ),
    "distractors left out": Mutant(
        "evaluation/copy_detection.py",
        {"bank, labels = torch.cat([bank, distractors])": "bank, labels = torch.cat([bank, distractors * 0])"},
        COPIES,
    ),
    "all ranks of copies count": Mutant("evaluation/copy_detection.py", {"[: chosen.top]": ""}, COPIES),
    "scores of shifted images not restricted": Mutant(
        "evaluation/robustness.py", {"top1(restricted(shifted.scores, present)": "top1(shifted.scores"}, ROBUSTNESS
    ),
    "scores of clean images not restricted": Mutant(
        "evaluation/robustness.py",
        {"top1(restricted(clean.scores[same], present)": "top1(clean.scores[same]"},
        ROBUSTNESS,
    ),
    "no score is restricted": Mutant(
        "evaluation/robustness.py", {'torch.full_like(scores, -float("inf"))': "scores.clone()"}, ROBUSTNESS
    ),
    "drop from all clean images": Mutant(
        "evaluation/robustness.py", {"same = torch.isin(truth, present)": "same = truth >= 0"}, ROBUSTNESS
    ),
    "images without ReaL labels are wrong": Mutant(
        "evaluation/robustness.py", {"zip(best, sets) if len(labels)]": "zip(best, sets)]"}, ROBUSTNESS
    ),
    "layer decay of fine-tuning ignored": Mutant(
        "evaluation/finetune.py",
        {'chosen["weight_decay"], chosen["layer_decay"])': 'chosen["weight_decay"])'},
        FINETUNE,
    ),
    "learning rates of layers ignored": Mutant("evaluation/finetune.py", {'lr * group["lr_scale"]': "lr"}, FINETUNE),
    "attention of a sheet transposed": Mutant(
        "evaluation/suite/attention_sheets.py",
        {"v[i].reshape(map_grid).numpy()": "v[i].reshape(map_grid).T.numpy()"},
        SHEETS,
    ),
    "mask of a sheet transposed": Mutant(
        "evaluation/suite/attention_sheets.py",
        {"mask[i].reshape(grid).numpy()": "mask[i].reshape(grid).T.numpy()"},
        SHEETS,
    ),
    "mask of a sheet inverted": Mutant(
        "evaluation/suite/attention_sheets.py",
        {"mask[i].reshape(grid).numpy()": "(~mask[i]).reshape(grid).numpy()"},
        SHEETS,
    ),
    "masked patches shown": Mutant(
        "imaging/drawing.py", {"np.where(cover, (1 - alpha)": "np.where(~cover, (1 - alpha)"}, SHEETS
    ),
    "heat from bright to dark": Mutant(
        "imaging/drawing.py", {"(finite - low) / (high - low)": "(high - finite) / (high - low)"}, SHEETS
    ),
    "x and y of boxes exchanged": Mutant(
        "data/benchmark_sets/wsol.py", {"[float(side) for side in box]": "[float(box[k]) for k in (1, 0, 3, 2)]"}, WSOL
    ),
    "width and height of sizes exchanged": Mutant(
        "data/benchmark_sets/wsol.py", {"(int(words[1]), int(words[2]))": "(int(words[2]), int(words[1]))"}, WSOL
    ),
    "only the last box of an image": Mutant(
        "data/benchmark_sets/wsol.py",
        {"boxes[name].append([float(side) for side in box])": "boxes[name] = [[float(side) for side in box]]"},
        WSOL,
    ),
    # what passed unseen because a test was skipped, or its run revealed no hint
    "timm's Eva refused": Mutant(
        "nn/backbones/families/eva.py",
        {"model_class = eva.Eva": "model_class = type(None)"},
        "tests/export/formats/test_backbone_files.py -k dinov3_runs",
    ),
    "rotary pairs of DINOv3 turned backwards": Mutant(
        "nn/backbones/families/eva.py",
        {"(x * cos + crossed * sin)": "(x * cos - crossed * sin)"},
        "tests/export/formats/test_backbone_files.py -k dinov3_runs",
    ),
    "another hint in runs": Mutant(
        "functional/masks.py",
        {
            "argsort(noise.masked_fill(outside, torch.inf), dim=1, stable=True)": (
                "argsort(noise.masked_fill(outside, -torch.inf), dim=1, stable=True, descending=True)"
            )
        },
        "tests/runs/test_golden.py",
    ),
    "no hint in runs": Mutant(
        "methods/masking.py",
        {"self.show_max * second for second": "0.0 * second for second"},
        "tests/runs/test_golden.py",
    ),
    "hints keyed by position in the batch": Mutant(
        "methods/masking.py",
        {"hint_keys = keys.of(keyed_random.HINT)": "hint_keys = torch.arange(len(attention))"},
        "tests/runs/test_two_ranks.py",
    ),
    "whitened pixels not scaled": Mutant(
        "functional/whitening/features.py",
        {"return self.components / self.variances.sqrt()": "return self.components"},
        "tests/evaluation/test_baselines.py -k raw_pixels_are_wrong",
    ),
    "covariance about the first chunk": Mutant(
        "functional/whitening/features.py",
        {" - torch.outer(offset, offset)": ""},
        "tests/functional/whitening/test_whitening.py",
    ),
    "whitening fitted to the test images": Mutant(
        "evaluation/knn.py",
        {"fit_whitening(train.pooled,": "fit_whitening(test.pooled,"},
        "tests/evaluation/test_baselines.py -k sees_the_training",
    ),
    "as many whitened dimensions as images": Mutant(
        "evaluation/features/whitened_pixels.py",
        {"max(1, count // IMAGES_PER_DIM)": "count"},
        "tests/evaluation/test_baselines.py -k dimensions_follow",
    ),
    "baselines measured at every start": Mutant(
        "build/baselines.py", {" and not self.stored()": ""}, "tests/build/test_baselines.py -k continued"
    ),
}
