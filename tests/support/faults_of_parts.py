"""Faults of single lines in every folder of the package."""

from support.mutant import Mutant

METRICS = "tests/functional/test_metrics.py"
KNN = "tests/evaluation/test_knn.py"
SETS = "tests/data/benchmark_sets/test_benchmark_sets.py"
OPTIM = "tests/engine/test_optim.py"
ALARMS = "tests/engine/test_collapse_alarms.py"
ADVICE = "tests/doctor/test_advice.py"
DOCTOR = "tests/doctor/test_diagnose.py"
CLOSED_FORMS = "tests/nn/pooling/test_closed_forms.py"
SIMPOOL = "tests/nn/pooling/test_simpool.py"
GENERIC = "tests/nn/backbones/test_generic.py"
RANKS = "tests/build/test_rank_agreement.py"

STEM = "tests/nn/backbones/families/test_conv_stem.py"
ROWS = "tests/nn/backbones/test_class_rows.py"

FAULTS = {
    # stems
    "stem without padding": Mutant(
        "nn/backbones/families/conv_stem.py", {"0 if kernel == stride else kernel // 2": "0"}, f"{STEM} -k timms_own"
    ),
    # the class token alone after the last block
    "drop path of all tokens for a few": Mutant(
        "nn/backbones/transformer_blocks.py",
        {"first_rows(factor, used, shapes)": "factor[: len(first_rows(x, used, shapes))]"},
        ROWS,
    ),
    "rotation of the last tokens for the first": Mutant(
        "nn/backbones/families/eva.py", {"rope[..., : rows[0], :]": "rope[..., -rows[0] :, :]"}, ROWS
    ),
    "patches of local crops computed": Mutant(
        "methods/student_teacher.py",
        {"patches=(reads_patches, False)": "patches=None", "drop_key=local_keys, patches=False": "drop_key=local_keys"},
        ROWS,
    ),
    "dropout drawn for the class token alone": Mutant(
        "nn/backbones/transformer.py", {" or (self.training and has_dropout(self.blocks[-1]))": ""}, ROWS
    ),
    "masked tokens left as they are": Mutant(
        "nn/backbones/transformer.py", {"x = torch.where(mask.unsqueeze(-1), token, x)": "x = x"}, f"{STEM} -k masked"
    ),
    "patch of a stem from a rounded ratio": Mutant(
        "nn/backbones/families/conv_stem.py", {"    embed.feature_ratio = (stem.patch, stem.patch)": "    pass"}, STEM
    ),
    "whitening without the mean": Mutant(
        "functional/whitening/patches.py",
        {" - torch.outer(mean, mean)": ""},
        "tests/functional/whitening/test_patch_whitening.py",
    ),
    "whitening by the eigenvalue, not its root": Mutant(
        "functional/whitening/patches.py",
        {"(values.clamp_min(0) + eps).sqrt()": "(values.clamp_min(0) + eps)"},
        "tests/functional/whitening/test_patch_whitening.py",
    ),
    "whitening learned again when a run continues": Mutant(
        "build/whitening.py",
        {' or directories(folder / "checkpoints")': ""},
        "tests/build/test_whitening.py -k learned_once",
    ),
    # distillation
    "the teacher learns": Mutant(
        "methods/distill.py",
        {'object.__setattr__(self, "source", source.eval().requires_grad_(False))': "self.source = source.eval()"},
        "tests/methods/test_distill.py -k micro",
    ),
    "another teacher accepted": Mutant(
        "methods/distill.py", {"if digest is not None and not": "if False and not"}, "tests/methods/test_distill.py"
    ),
    "teacher in the student's normalization": Mutant(
        "functional/distillation.py",
        {"    return images * (std / new_std)": "    return images + 0 * (std / new_std)"},
        "tests/methods/test_distill.py -k spelled",
    ),
    "patches compared on corners": Mutant(
        "functional/distillation.py",
        {'"bilinear", align_corners=False': '"bilinear", align_corners=True'},
        "tests/functional/test_distillation.py",
    ),
    "loss on all patches in place of the masked": Mutant(
        "methods/distill.py",
        {'masked = self.patches == "masked"': "masked = False"},
        "tests/methods/test_distill.py -k spelled",
    ),
    "running statistics of the average left behind": Mutant(
        "functional/ema.py", {"**dict(network.named_buffers())": ""}, "tests/methods/test_distill.py -k convolutional"
    ),
    # functional
    "KoLeo pushes one end only": Mutant(
        "functional/koleo.py", {"unit.gather(1": "unit.detach().gather(1"}, "tests/functional/test_koleo.py"
    ),
    "KoLeo compares an image with itself": Mutant(
        "functional/koleo.py", {".fill_(-torch.inf)": ".clone()"}, "tests/functional/test_koleo.py"
    ),
    "KoLeo of one rank": Mutant(
        "methods/koleo.py", {"whole = all_sum(slots)": "whole = slots"}, "tests/methods/test_koleo.py"
    ),
    "KoLeo of one micro-batch": Mutant(
        "methods/student_teacher.py", {"len(outputs) > 1:": "False:"}, "tests/engine/test_accumulate.py -k 0.5"
    ),
    "KoLeo with the mean over views": Mutant(
        "methods/student_teacher.py", {"self.koleo * views * ": "self.koleo * "}, "tests/methods/test_koleo.py"
    ),
    "visible patches before the masks": Mutant(
        "methods/patches.py", {"    if not started:\n": "    if False:\n"}, "tests/methods/test_visible_patches.py"
    ),
    "visible patches counted as the masked ones": Mutant(
        "methods/patches.py",
        {"masks.mask.numel() - masks.num_masked": "masks.num_masked"},
        "tests/methods/test_visible_patches.py",
    ),
    "average precision without the trapezoid": Mutant(
        "functional/metrics.py", {"((before + (j + 1) / (r + 1)) / 2).sum()": "((j + 1) / (r + 1)).sum()"}, METRICS
    ),
    "ignored images counted as wrong": Mutant(
        "functional/metrics.py", {"ranks[~torch.isin(ranks, ignored)]": "ranks"}, METRICS
    ),
    "medium without the hard images": Mutant(
        "functional/metrics.py",
        {'"medium": (("easy", "hard"), ("junk",))': '"medium": (("easy",), ("junk", "hard"))'},
        METRICS,
    ),
    "recall finds the query itself": Mutant(
        "functional/metrics.py", {"rows if gallery is None else None)": "None)"}, METRICS
    ),
    "bias and error of tokens exchanged": Mutant(
        "functional/metrics.py",
        {'"bias": joint != labels': '"bias": predictions != labels[:, None]'},
        "tests/evaluation/multi_token/test_analysis.py -k by_hand",
    ),
    "cosine ends a step early": Mutant(
        "functional/schedules.py",
        {"(step - warmup) / (total - warmup)": "(step - warmup) / (total - warmup - 1)"},
        "tests/functional/test_schedules.py",
    ),
    "temperature reached an epoch late": Mutant(
        "functional/schedules.py",
        {"(epoch - hold) / max(1, warm_epochs - 1)": "(epoch - hold) / warm_epochs"},
        "tests/functional/test_schedules.py",
    ),
    "center with momentum and 1 - momentum swapped": Mutant(
        "functional/targets.py",
        {"center * momentum + batch_mean * (1 - momentum)": "center * (1 - momentum) + batch_mean * momentum"},
        "tests/functional/test_targets.py",
    ),
    "center added to the logits": Mutant(
        "functional/targets.py",
        {"(at_least_float32(logits) - center) / temp": "(at_least_float32(logits) + center) / temp"},
        "tests/functional/test_targets.py",
    ),
    "one iteration of Sinkhorn": Mutant(
        "functional/targets.py",
        {"for _ in range(iterations):": "for _ in range(1):"},
        "tests/functional/test_targets.py",
    ),
    "smoothing over the other classes": Mutant(
        "functional/classification.py",
        {"* (1 - smoothing) + smoothing / classes": "* (1 - smoothing) + smoothing / (classes - 1)"},
        "tests/functional/test_classification.py",
    ),
    "divergence of views from the last": Mutant(
        "functional/classification.py",
        {"probs.mean(dim=0).clamp(1e-7, 1)": "probs[-1].clamp(1e-7, 1)"},
        "tests/functional/test_classification.py",
    ),
    "tokens learn from the averaged token": Mutant(
        "functional/map_losses.py",
        {'if teacher == "tokens" else divergence': 'if teacher != "tokens" else divergence'},
        "tests/functional/test_map_losses.py",
    ),
    "gradient through the joint prediction of groups": Mutant(
        "functional/map_losses.py", {"fixed = groups.detach()": "fixed = groups"}, "tests/functional/test_map_losses.py"
    ),
    "keys independent of the order of their parts": Mutant(
        "functional/keyed_random.py",
        {"state = _scramble(state * _LINK + int(part) + _GAMMA)": "state = state + _scramble(int(part) + _GAMMA)"},
        "tests/functional/test_keyed_random.py",
    ),
    "a block covers the whole grid": Mutant(
        "functional/block_mask.py",
        {"if h >= height or w >= width:": "if h > height or w > width:"},
        "tests/functional/test_masks.py",
    ),
    "blocks beyond the target": Mutant(
        "functional/block_mask.py", {"if 0 < new <= remaining:": "if 0 < new:"}, "tests/functional/test_masks.py"
    ),
    "duplicates of a feature with itself": Mutant(
        "functional/collapse.py",
        {".sum() - len(unit)).clamp_min(0)": ".sum()).clamp_min(0)"},
        "tests/functional/test_collapse.py",
    ),
    # imaging
    "rows and columns of a rotation exchanged": Mutant(
        "imaging/pil.py",
        {"6: (True, False, True)": "6: (True, True, False)"},
        "tests/data/decoding/test_image.py tests/imaging/test_pil.py",
    ),
    "long side to the size": Mutant(
        "imaging/resize.py",
        {"if height <= width else": "if height > width else"},
        "tests/imaging/test_resize.py tests/nn/test_transform.py",
    ),
    "wide images cut to 8 bits": Mutant(
        "imaging/pil.py",
        {"(wide(image) >> 8).astype": "wide(image).clip(0, 255).astype"},
        "tests/imaging/test_pil.py tests/data/decoding/test_image.py",
    ),
    "patches enlarged across": Mutant(
        "imaging/drawing.py",
        {"return picture[rows][:, columns]": "return picture[rows][:, columns[::-1]]"},
        "tests/imaging/test_drawing.py",
    ),
    "bars from the smallest": Mutant(
        "imaging/charts.py", {"np.argsort(-values, kind": "np.argsort(values, kind"}, "tests/imaging/test_charts.py"
    ),
    # data
    "crops of another epoch": Mutant(
        "data/multicrop.py",
        {"(stream, self.seed, epoch, samples": "(stream, self.seed, 0, samples"},
        "tests/data/test_multicrop.py",
    ),
    "height over width of crops for width over height": Mutant(
        "data/multicrop.py",
        {"heights, widths = np.rint(": "widths, heights = np.rint("},
        "tests/data/test_multicrop.py",
    ),
    "solarization of the first view": Mutant(
        "data/multicrop.py",
        {"[0.0, options.solarize_prob][:global_number]": "[options.solarize_prob, 0.0][:global_number]"},
        "tests/data/test_multicrop.py",
    ),
    "crops never flipped": Mutant(
        "data/multicrop.py",
        {
            "antialias=True)\n    return out.copy_(view.flip(-1) if flip else view)": (
                "antialias=True)\n    return out.copy_(view)"
            )
        },
        "tests/data/test_multicrop.py",
    ),
    "ranks read the same images": Mutant(
        "data/loader.py",
        {"place * share.batch_size + share.rank * share.images": "place * share.batch_size"},
        "tests/data/test_loader.py",
    ),
    "one order for all epochs": Mutant(
        "data/loader.py",
        {"epoch_order(share.seed, epoch, count": "epoch_order(share.seed, 0, count"},
        "tests/data/test_loader.py",
    ),
    "label of the drawn image": Mutant(
        "data/loader.py",
        {"labels[torch.tensor(reader.read)]": "labels[index % len(self.dataset)]"},
        "tests/data/test_loader.py",
    ),
    "subset in another order": Mutant(
        "data/datasets/subset.py",
        {"torch.as_tensor(dataset.labels)[rows]": "torch.as_tensor(dataset.labels)[rows.sort().values]"},
        "tests/data/datasets/test_subset.py",
    ),
    "boxes of COCO as width and height": Mutant(
        "data/benchmark_sets/coco.py",
        {"round(x + width), round(y + height)": "round(width), round(height)"},
        SETS + " -k coco",
    ),
    "crowds kept": Mutant(
        "data/benchmark_sets/coco.py", {'if not entry.get("iscrowd"):': "if True:"}, SETS + " -k coco"
    ),
    "class 100 of CUB in the test set": Mutant(
        "data/benchmark_sets/cub.py", {"if classes[key] > 100": "if classes[key] >= 100"}, SETS + " -k cub"
    ),
    "boxes of CUB as width and height": Mutant(
        "data/benchmark_sets/cub.py", {"sides[..., :2] + sides[..., 2:]]": "sides[..., 2:]]"}, SETS + " -k cub"
    ),
    "queries and gallery of In-Shop exchanged": Mutant(
        "data/benchmark_sets/inshop.py",
        {'(("test", "query"), ("gallery", "gallery"))': '(("test", "gallery"), ("gallery", "query"))'},
        SETS + " -k inshop",
    ),
    "mixture's share of labels reversed": Mutant(
        "data/augmentation/mixup.py",
        {"share * pairs + (1 - share) * pairs.flip(1)": "(1 - share) * pairs + share * pairs.flip(1)"},
        "tests/data/augmentation/test_supervised_crop.py tests/methods/test_supervised.py",
    ),
    "erased at other places": Mutant(
        "data/augmentation/random_erasing.py",
        {"(across >= left) & (across < left + box_width)": "(across >= top) & (across < top + box_width)"},
        "tests/data/augmentation/test_supervised_crop.py",
    ),
    # nn
    "dropout of a whole network kept": Mutant(
        "nn/backbones/generic.py", {"setattr(module, rate, 0.0)": "pass"}, f"{GENERIC} -k dropout"
    ),
    "prefix tokens of a whole network among the patches": Mutant(
        "nn/backbones/network_output.py",
        {"return output[:, self.prefix :], output[:, : self.prefix]": "return output, output[:, : self.prefix]"},
        f"{GENERIC} -k poolings",
    ),
    "norm in timm's head lost": Mutant(
        "nn/backbones/generic.py",
        {"if found is None else (found, place)": "if True else None"},
        f"{GENERIC} -k final_norm",
    ),
    "caches of a trial kept": Mutant(
        "nn/backbones/network_output.py",
        {"module.train(True)  # timm's attention drops cached biases here": "pass"},
        f"{GENERIC} -k caches",
    ),
    "class attention trained without a gradient": Mutant(
        "nn/backbones/generic.py", {"if options.class_token is False:": "if False:"}, f"{GENERIC} -k poolings"
    ),
    "a key of SimPool without the norm": Mutant(
        "nn/pooling/simpool.py",
        {"(query_on_patches, patches.transpose(1, 2))": "(query_on_patches, x.transpose(1, 2))"},
        SIMPOOL,
    ),
    "SimPool without the root": Mutant(
        "nn/pooling/simpool.py", {"mean.pow(1 / gamma) * top[:, 0]": "mean * top[:, 0]"}, SIMPOOL
    ),
    "minimum over channels apart": Mutant(
        "nn/pooling/simpool.py",
        {"values - values.flatten(1).min(dim=1).values[:, None, None]": "values - values.amin(dim=1, keepdim=True)"},
        SIMPOOL,
    ),
    "GeM of negative values": Mutant(
        "nn/pooling/simple.py",
        {"power_mean(uniform, x.clamp_min(FLOOR), exponent)": "power_mean(uniform, x.abs(), exponent)"},
        CLOSED_FORMS,
    ),
    "log-sum in place of log-mean": Mutant(
        "nn/pooling/simple.py",
        {"torch.logsumexp(r * x, dim=1) - math.log(x.shape[1])": "torch.logsumexp(r * x, dim=1)"},
        CLOSED_FORMS,
    ),
    "HOW with padding in the averages": Mutant(
        "nn/pooling/how.py", {"count_include_pad=False": "count_include_pad=True"}, CLOSED_FORMS
    ),
    "bottleneck not normalized": Mutant(
        "nn/heads.py", {"return F.normalize(z, dim=-1).reshape(": "return z.reshape("}, "tests/nn/test_heads.py"
    ),
    "smallest of several logits": Mutant(
        "nn/classifiers.py",
        {"(self.dropout(features.vectors, drop_key)).amax(": "(self.dropout(features.vectors, drop_key)).amin("},
        "tests/nn/test_classifiers.py",
    ),
    "drop path without rescaling": Mutant(
        "nn/backbones/drop_path.py",
        {"((uniform < keep) / keep)": "(uniform < keep)"},
        "tests/nn/backbones/test_drop_path.py",
    ),
    "one drop-path rate for all blocks": Mutant(
        "nn/backbones/drop_path.py",
        {"keep = 1 - self.rate * block / max(1, self.depth - 1)": "keep = 1 - self.rate * torch.ones_like(block)"},
        "tests/nn/backbones/test_drop_path.py",
    ),
    # methods
    "pixel loss without its weight": Mutant(
        "methods/mst.py", {"self.pixel_weight * pixel_loss": "pixel_loss"}, "tests/methods/test_mst.py"
    ),
    "squared for absolute differences": Mutant(
        "methods/mst.py", {'"l1": F.l1_loss': '"l1": F.mse_loss'}, "tests/methods/test_mst.py"
    ),
    "loss between views without its weight": Mutant(
        "methods/dino.py", {"self.lambda1 * cls_loss": "cls_loss"}, "tests/methods/test_dino.py"
    ),
    "centers of the last micro-batch": Mutant(
        "methods/centers.py",
        {"[total + new for total, new in zip(self._sums, mean_logits)]": "[2 * new for new in mean_logits]"},
        "tests/engine/test_accumulate.py tests/methods/test_ibot.py",
    ),
    # engine
    "SGD without momentum": Mutant(
        "engine/optim.py", {'moved = mu * group["momentum"] + direction': "moved = direction"}, OPTIM
    ),
    "Nesterov's step for plain SGD": Mutant(
        "engine/optim.py", {'if group.get("nesterov") else moved': "if True else moved"}, OPTIM
    ),
    "LAMB without trust": Mutant(
        "engine/lamb.py",
        {'update.mul_(trust.clamp(max=1.0) if group["trust_clip"] else trust)': "pass"},
        "tests/engine/test_lamb.py",
    ),
    "LAMB without the limit of gradients": Mutant(
        "engine/lamb.py",
        {"(norm / self.max_grad_norm).clamp(min=1.0)": "torch.ones_like(norm)"},
        "tests/engine/test_lamb.py",
    ),
    "k-NN alarm in the first half": Mutant(
        "engine/collapse_alarms.py", {"not below or 2 * step < self.total_steps or": "not below or"}, ALARMS
    ),
    "alarms during the warm-up": Mutant(
        "engine/collapse_alarms.py", {"if step < self.patience or len": "if len"}, ALARMS
    ),
    "one wrong record raises an alarm": Mutant(
        "engine/collapse_alarms.py", {"return all(record.get(key)": "return any(record.get(key)"}, ALARMS
    ),
    # distributed, doctor, bench
    "ranks without torchrun accepted": Mutant(
        "distributed/environment.py", {"    if missing:\n": "    if False:\n"}, "tests/distributed/test_environment.py"
    ),
    "a rank beyond their number": Mutant(
        "distributed/environment.py",
        {'_number("RANK", 0, most=size - 1)': '_number("RANK", 0)'},
        "tests/distributed/test_environment.py",
    ),
    "averaging window squared": Mutant(
        "doctor/advice.py", {"window = 1 / (1 - value) if": "window = 1 / (1 - value) ** 2 if"}, ADVICE
    ),
    "learning rate by 512 images": Mutant(
        "doctor/advice.py",
        {"peak = recipe.optimizer.lr * batch / 256": "peak = recipe.optimizer.lr * batch / 512"},
        ADVICE,
    ),
    "consequences before causes": Mutant(
        "doctor/diagnose.py",
        {'"uniform_targets",\n    "loss_at_log_k",\n': '"loss_at_log_k",\n    "uniform_targets",\n'},
        DOCTOR,
    ),
    "a stale teacher before one equal to the student": Mutant(
        "doctor/diagnose.py",
        {'"student_equals_teacher",\n    "stale_teacher",\n': '"stale_teacher",\n    "student_equals_teacher",\n'},
        DOCTOR,
    ),
    "waiting for data overlooked": Mutant(
        "doctor/bottleneck.py", {"DATA_BOUND_WITHOUT = 0.2, 0.5": "DATA_BOUND_WITHOUT = 0.9, 0.95"}, DOCTOR
    ),
    "parameters of a pooling left out": Mutant(
        "bench/cost.py",
        {"num_parameters(backbone) + num_parameters(module) + (": "num_parameters(backbone) + ("},
        "tests/bench/test_cost.py",
    ),
    # evaluation
    "votes of equal weight": Mutant(
        "evaluation/knn.py",
        {"((similarity.double() / temperature).clamp(-700, 700))": "(0.0 * similarity.double())"},
        KNN,
    ),
    "few-shot files from the start": Mutant(
        "evaluation/knn.py", {"(rank >= start) & (rank < start + per_class)": "(rank < per_class)"}, KNN
    ),
    "penalty of logistic regression not divided": Mutant(
        "evaluation/logistic.py", {"mul_(penalty / total)": "mul_(penalty)"}, "tests/evaluation/test_logistic.py"
    ),
    "few-shot score of the last run": Mutant(
        "evaluation/few_shot.py",
        {"statistics.fmean(by_start.values())": "list(by_start.values())[-1]"},
        "tests/evaluation/test_few_shot.py",
    ),
    "objects of other patches": Mutant(
        "evaluation/mask_overlap.py",
        {"add(name, mask & on_objects, mask)": "add(name, ~mask & on_objects, mask)"},
        "tests/evaluation/test_mask_overlap.py",
    ),
    # export, recipe, build, commands
    "heads of ViT-S for ViT-T": Mutant(
        "export/formats/published_heads.py",
        {"(192, 12): 3,": "(192, 12): 6,"},
        "tests/export/formats/test_published_heads.py",
    ),
    "DINOv3's heads for all": Mutant(
        "export/formats/published_heads.py",
        {'{"dinov3": DINOV3_HEADS, "moco_v3": MOCO_V3_HEADS}[project]': "HEADS"},
        "tests/export/formats/test_published_heads.py",
    ),
    "names of keys in full": Mutant(
        "export/folder/local_paths.py",
        {"shortened[unused(without_paths(name), shortened)]": "shortened[name]"},
        "tests/export/folder/test_local_paths.py",
    ),
    "evaluations never due": Mutant(
        "build/evaluations.py",
        {"every * steps_per_epoch for name": "0 for name"},
        "tests/recipe/test_evaluation_schedule.py",
    ),
    "recipes of ranks not compared": Mutant(
        "build/rank_agreement.py", {"if changes and not fits_other_images:": "if False:"}, RANKS
    ),
    "labels of ranks not compared": Mutant(
        "build/rank_agreement.py", {"{} if labels is None else {": "{} if True else {"}, RANKS
    ),
    "an option given twice": Mutant(
        "recipe/evaluation_schedule.py",
        {"        elif key in options:\n": "        elif False:\n"},
        "tests/cli/test_cli.py -k errors_are_one_line",
    ),
    "reports of two lines under one name": Mutant(
        "recipe/evaluation_schedule.py",
        {'f"{name}_{repeats + 1}" if repeats else report': "report"},
        "tests/recipe/test_evaluation_schedule.py",
    ),
    "held-out images are trained": Mutant(
        "data/datasets/holdout.py", {"rest[held] = False": "pass"}, "tests/data/datasets/test_holdout.py"
    ),
    "held-out images are the first of a class": Mutant(
        "data/datasets/holdout.py",
        {"np.lexsort((hashes, classes))": "np.argsort(classes, kind='stable')"},
        "tests/data/datasets/test_holdout.py",
    ),
    "held-out images without their number limited": Mutant(
        "data/datasets/holdout.py",
        {"min(share, MOST / max(1, len(keys)))": "share"},
        "tests/data/datasets/test_holdout.py",
    ),
    "evaluations spend a benchmark's budget": Mutant(
        "bench/learn.py",
        {
            "            begin = self.clock()\n            self.step(name)\n": (
                "            begin = getattr(self, 'last', 0.0)\n            self.step(name)\n"
                "            self.last = self.clock()\n"
            )
        },
        "tests/bench/test_learn.py -k turns",
    ),
    "few images on a GPU get a Vision Transformer": Mutant(
        "doctor/regimes.py", {"(gpu and count >= MANY)": "gpu"}, "tests/doctor/test_suggest_recipe.py -k test_regimes"
    ),
    "tables wider than the screen": Mutant(
        "cli/tables.py", {"while sum(widths) > total:": "while False:"}, "tests/cli/test_tables.py"
    ),
    "results of changed files recorded as clean": Mutant(
        "bench/record.py", {'"clean": not commit.endswith("+")': '"clean": True'}, "tests/bench/test_record.py"
    ),
    "a later part hides the changes of an earlier one": Mutant(
        "bench/record.py",
        {"False if False in states else None if None in states else True": 'now["clean"]'},
        "tests/bench/test_record.py",
    ),
    "results written with a record in another form": Mutant(
        "bench/record.py", {"    if wrong := mistakes(result):": "    if wrong := []:"}, "tests/bench/test_record.py"
    ),
}
