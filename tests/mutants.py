"""Plant named faults in a copy of the package, one at a time; the tests listed for each must fail.

`python tests/mutants.py` tries all, `python tests/mutants.py NAME...` some, `--sample N [--seed S]` N of them, with a
seed that is printed; the exit status is 1 if any survives.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from support import (
    faults_of_boxes,
    faults_of_crops,
    faults_of_embeddings,
    faults_of_evaluations,
    faults_of_looks,
    faults_of_masks,
    faults_of_parts,
    faults_of_runs,
)
from support.mutant import Mutant

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ssl/maskwise"


METHODS = "tests/methods/test_ibot.py tests/methods/test_student_teacher.py"
MASKING = "tests/methods/test_masking.py"
OPTIM = "tests/engine/test_optim.py"
TRAINER = "tests/engine/test_trainer.py"
NN = "tests/nn/backbones/test_transformer.py"

MUTANTS = {
    **faults_of_evaluations.FAULTS,
    **faults_of_looks.FAULTS,
    **faults_of_crops.FAULTS,
    **faults_of_embeddings.FAULTS,
    **faults_of_parts.FAULTS,
    **faults_of_runs.FAULTS,
    **faults_of_masks.FAULTS,
    **faults_of_boxes.FAULTS,
    # interruption and disks
    "pointer updated before the checkpoint is in place": Mutant(
        "engine/checkpoint.py",
        {
            "        os.rename(aside, path)\n        sync(self.folder)\n": "",
            'write_atomic(self.folder / "last", path.name + "\\n")\n': (
                'write_atomic(self.folder / "last", path.name + "\\n")\n        os.rename(aside, path)\n'
            ),
        },
        "tests/engine/test_checkpoint_faults.py -k saving",
    ),
    "altered meta.json accepted": Mutant(
        "engine/checkpoint.py",
        {"if seal is not None and": "if False and"},
        "tests/engine/test_checkpoint_faults.py -k meta",
    ),
    "leftovers never deleted": Mutant(
        "engine/checkpoint.py",
        {"shutil.rmtree(path, ignore_errors=True)": "pass"},
        "tests/engine/test_checkpoint_faults.py -k deleting",
    ),
    "unwritten log lines discarded": Mutant(
        "engine/append_file.py",
        {"self.unwritten += record": "self.unwritten = record"},
        "tests/engine/test_full_disk.py",
    ),
    "a failed save ends the run": Mutant(
        "engine/loop.py", {"        if final:\n": "        if True:\n"}, "tests/engine/test_full_disk.py"
    ),
    "metrics cut too late": Mutant(
        "engine/metrics_file.py",
        {'or record.get("step", 0) > step:': 'or record.get("step", 0) > step + 2:'},
        "tests/engine/test_run_log.py",
    ),
    "signals ignored until the loop starts": Mutant(
        "engine/signals.py", {"self.asked |= ": "self.asked |= False and "}, "tests/engine/test_signals.py"
    ),
    "a broken stream raises": Mutant(
        "process/streams.py",
        {"except (OSError, ValueError, AttributeError) as error:": "except ZeroDivisionError as error:"},
        "tests/process/test_streams.py -k no_stream",
    ),
    "a failed stream changes the exit status at the end": Mutant(
        "process/streams.py",
        {"            os.dup2(null, self.stream.fileno())\n": ""},
        "tests/process/test_streams.py -k exit_status",
    ),
    "files take the numbers of closed streams": Mutant(
        "process/streams.py", {"    open_missing()\n": ""}, "tests/process/test_streams.py -k takes_the_number"
    ),
    "a checkpoint's model loads without its checksum": Mutant(
        "export/run_checkpoint.py",
        {"    verify(directory, (MODEL, ENCODER))\n": "    pass\n"},
        "tests/export/test_run_checkpoint.py -k zeroed",
    ),
    "a checkpoint pruned while it is read counts as damaged": Mutant(
        "engine/checkpoint.py",
        {"if not path.exists() and directories(folder):": "if False:"},
        "tests/export/test_run_checkpoint.py -k replaced",
    ),
    "a run folder takes two runs": Mutant(
        "engine/run_lock.py",
        {"        fcntl.flock(handle, kind | fcntl.LOCK_NB)\n": "        pass\n"},
        "tests/engine/test_run_lock.py -k second",
    ),
    "data workers keep the lock": Mutant(
        "engine/run_lock.py",
        {"os.register_at_fork(after_in_child=_forget_all)\n": ""},
        "tests/engine/test_run_lock.py -k children",
    ),
    "a lock file that was removed is locked": Mutant(
        "engine/run_lock.py",
        {"if self.is_ours():  # the last": "if True:  # the last"},
        "tests/engine/test_run_lock.py -k meanwhile",
    ),
    "a replaced folder is written": Mutant(
        "engine/run_lock.py",
        {"if self.handle is not None and not self.is_ours():": "if False:"},
        "tests/engine/test_run_lock.py -k replaced",
    ),
    "ranks with other recipes train": Mutant(
        "build/rank_agreement.py",
        {'if first["recipe"].get(key) != other["recipe"].get(key)': "if False"},
        "tests/build/test_rank_agreement.py",
    ),
    "a full run folder loses the numbers of an evaluation": Mutant(
        "api.py",
        {"except UserError as error:  # a folder": "except ZeroDivisionError as error:  # a folder"},
        "tests/runs/test_disk.py -k results",
    ),
    # evaluations
    "classes of two sets compared by number": Mutant(
        "data/class_matching.py",
        {"    if torch.equal(places, labels):\n": "    if True:\n"},
        "tests/evaluation/test_protocol.py -k numbered",
    ),
    "recall counts a query without its class": Mutant(
        "functional/metrics.py", {"ranks < min(k, most)": "ranks < k"}, "tests/evaluation/test_protocol.py -k recall_of"
    ),
    # losses and centers
    "center updated before the loss": Mutant(
        "methods/ibot.py",
        {
            "self.accumulate_centers(step, cls_bottleneck, patch_bottleneck)": (
                "self.accumulate_centers(step, cls_bottleneck, patch_bottleneck); self.update_teacher(1.0)"
            )
        },
        METHODS,
    ),
    "same-view pair included": Mutant(
        "functional/losses.py",
        {"(p * (all_views - own)).sum()": "(p * all_views).sum()"},
        "tests/functional/test_losses.py",
    ),
    "tokens counted in one micro-batch": Mutant(
        "methods/ibot.py",
        {"self.world_size * teacher.num_micro_batches": "self.world_size"},
        "tests/engine/test_accumulate.py",
    ),
    "gradients of micro-batches summed": Mutant(
        "engine/trainer.py",
        {'(losses["loss"] / len(batches)).backward()': 'losses["loss"].backward()'},
        "tests/engine/test_accumulate.py",
    ),
    "same-view pair included in chunks": Mutant(
        "functional/chunked_losses.py",
        {"grad[:teachers].mul_(teachers - 1).add_(probs)": "grad[:teachers].mul_(teachers)"},
        METHODS,
    ),
    "weight gradient of earlier chunks lost": Mutant(
        "functional/chunked_losses.py",
        {"weight_grad.addmm_(": "weight_grad = torch.zeros_like(weight_grad).addmm_("},
        "tests/functional/test_chunked_losses.py",
    ),
    "unmasked images excluded from the mean": Mutant(
        "functional/losses.py",
        {
            "masked_per_view.clamp_min(1).double() * mask.shape[0]": (
                "masked_per_view.clamp_min(1).double() * (masked_per_view > 0).sum().clamp_min(1)"
            )
        },
        "tests/functional/test_losses.py",
    ),
    "patch center over masked patches only": Mutant(
        "methods/ibot.py",
        {"cls_bottleneck, patch_bottleneck)": "cls_bottleneck, patch_bottleneck[masks.mask.flatten()])"},
        METHODS,
    ),
    "patch center of the first view only": Mutant(
        "methods/ibot.py",
        {"cls_bottleneck, patch_bottleneck)": "cls_bottleneck, patch_bottleneck[: len(patch_bottleneck) // 2])"},
        METHODS,
    ),
    "centers of one rank": Mutant(
        "methods/student_teacher.py",
        {
            "means = self.all_sum(torch.cat([z.mean(dim=0) for z in bottlenecks])) / self.world_size": (
                "means = torch.cat([z.mean(dim=0) for z in bottlenecks])"
            )
        },
        METHODS,
    ),
    "tokens counted on one rank": Mutant("methods/ibot.py", {"total = self.all_sum(": "total = ("}, METHODS),
    "CLS temperature for patches": Mutant(
        "methods/ibot.py",
        {"self.patch_center, self.patch_temperature(epoch)": "self.patch_center, self.cls_temperature(epoch)"},
        METHODS,
    ),
    "patch center for CLS tokens": Mutant(
        "methods/student_teacher.py", {"logits.cast(), self.center,": "logits.cast(), self.patch_center,"}, METHODS
    ),
    "patch head on locals": Mutant(
        "methods/student_teacher.py",
        {
            "        return StudentOutput(features.patches, features.grid, torch.cat(": (
                "        return StudentOutput(features.patches + local.patches.mean(), features.grid, torch.cat("
            )
        },
        METHODS,
    ),
    "masked teacher": Mutant(
        "methods/student_teacher.py",
        {
            "            global_crops, attention=self.masking": (
                "            global_crops * (global_crops > 0), attention=self.masking"
            )
        },
        "tests/methods/test_dino.py",
    ),
    "Sinkhorn of one rank": Mutant("methods/student_teacher.py", {"temp, all_sum=self.all_sum)": "temp)"}, METHODS),
    # the teacher
    "teacher with drop path": Mutant("nn/backbones/base.py", {"        self.drop_path.rate = 0.0\n": ""}, METHODS),
    "teacher with mask token": Mutant(
        "nn/backbones/base.py",
        {"        self.mask_token = None\n        self.drop_path.rate": "        self.drop_path.rate"},
        METHODS,
    ),
    "EMA with momentum and 1 - momentum swapped": Mutant(
        "functional/ema.py", {"new, 1.0 - momentum)": "new, momentum)"}, OPTIM
    ),
    "non-finite step updates the teacher": Mutant("functional/ema.py", {"if ok is None or ok:": "if True:"}, METHODS),
    "non-finite step updates the centers": Mutant(
        "methods/centers.py", {"moved if ok is None else torch.where(ok, moved, center)": "moved"}, METHODS
    ),
    "EMA before the step": Mutant(
        "engine/trainer.py",
        {
            "        self.method.update_teacher(self.schedules.momentum(step), ok)\n": "",
            "        step_if(ok, self.optimizer)\n": (
                "        self.method.update_teacher(self.schedules.momentum(step), ok)\n"
                "        step_if(ok, self.optimizer)\n"
            ),
        },
        "tests/methods/test_training_step.py",
    ),
    # masks
    "mask transposed": Mutant(
        "nn/backbones/transformer.py",
        {
            "torch.where(mask.unsqueeze(-1), token, x)": (
                "torch.where(mask.unflatten(1, grid).transpose(1, 2).flatten(1).unsqueeze(-1), token, x)"
            )
        },
        NN,
    ),
    "position added before the mask token": Mutant(
        "nn/backbones/transformer.py",
        {
            "            x = torch.where(mask.unsqueeze(-1), token, x)\n": "            pass\n",
            "grid, self.position)\n        if": (
                "grid, self.position)\n"
                "        x = x if mask is None else torch.where(mask.unsqueeze(-1), token, x)\n        if"
            ),
        },
        NN,
    ),
    "CLS key included in the attention map": Mutant(
        "nn/backbones/transformer.py",
        {"cls_attention[..., self.num_prefix :]": "cls_attention[..., : -self.num_prefix]"},
        NN,
    ),
    "heads renormalized": Mutant(
        "methods/masking.py",
        {"mean_heads(attention.detach())": "mean_heads(attention.detach() / attention.detach().sum(-1, keepdim=True))"},
        MASKING,
    ),
    "mask of another view": Mutant(
        "methods/masking.py",
        {"mean_heads(attention.detach())": "mean_heads(attention.detach().roll(len(attention) // 2, 0))"},
        MASKING,
    ),
    "low attention for high": Mutant("methods/masking.py", {'mode = "high"': 'mode = "low"'}, MASKING),
    "hint revealed outside its pool": Mutant(
        "functional/masks.py", {"outside = ~_first(order, [pool] * views)": "outside = torch.zeros_like(mask)"}, MASKING
    ),
    "hint without a second ratio": Mutant(
        "methods/masking.py", {"self.ratios(keys, draw=1)": "self.ratios(keys)"}, MASKING
    ),
    "float32 ratios": Mutant(
        "functional/mask_ratios.py",
        {"    ratios = [float(r) for r in ratios]\n": "    ratios = [float(np.float32(r)) for r in ratios]\n"},
        MASKING,
    ),
    "one mask decision per image": Mutant(
        "methods/masking.py",
        {"keys.of(keyed_random.COIN)": "keyed_random.make_key(keyed_random.COIN, keys.seed, keys.step, keys.samples)"},
        MASKING,
    ),
    "masks keyed by position in the batch": Mutant(
        "methods/masking.py", {"samples = sample_ids.to(": "samples = torch.arange(len(sample_ids)).to("}, MASKING
    ),
    "masks independent of the step": Mutant(
        "methods/masking.py", {"make_key(stream, self.seed, self.step, ": "make_key(stream, self.seed, "}, MASKING
    ),
    "masks before the start epoch": Mutant(
        "methods/ibot.py", {"started = epoch >= self.start_epoch": "started = True"}, METHODS
    ),
    "drop path keyed by position in the batch": Mutant(
        "methods/student_teacher.py",
        {"sample_ids.cpu().repeat(len(views))": "torch.arange(len(sample_ids)).repeat(len(views))"},
        METHODS,
    ),
    # pooling, schedules, optimizers
    "SimPool minimum over the batch": Mutant(
        "nn/pooling/simpool.py", {'if self.min_scope == "batch":': "if True:"}, "tests/nn/pooling/test_simpool.py"
    ),
    "LR starting above 0": Mutant(
        "functional/schedules.py",
        {"* step / max(1, warmup - 1)": "* (step + 1) / max(1, warmup)"},
        "tests/functional/test_schedules.py",
    ),
    "global gradient clip": Mutant(
        "engine/optim.py",
        {
            "    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)\n": (
                "    factors = (max_norm / (norms.norm().expand_as(norms) + 1e-6)).clamp(max=1.0)\n"
            )
        },
        OPTIM,
    ),
    "tokens without weight decay": Mutant(
        "engine/optim.py",
        {"or parameter.ndim == 1 or name": "or parameter.ndim == 1 or 'token' in name or name"},
        OPTIM,
    ),
    "LARS trust ratio for vectors": Mutant(
        "engine/optim.py", {"        if parameter.ndim == 1:\n            return parameter.grad\n": ""}, OPTIM
    ),
    "last layer never frozen": Mutant(
        "engine/trainer.py", {"if epoch < self.freeze_last_layer:": "if False:"}, TRAINER
    ),
    # export, evaluation and resume
    "arguments of a training file hide configs.yaml": Mutant(
        "export/formats/training_arguments.py",
        {
            "return beside(path) | (vars(args) if isinstance(args, argparse.Namespace) else {})": (
                "return vars(args) if isinstance(args, argparse.Namespace) else beside(path)"
            )
        },
        "tests/export/test_hub_releases.py -k precedence",
    ),
    "no_gamma in a released name is ignored": Mutant(
        "export/formats/simpool_gamma.py",
        {"return None if match[2] else RELEASED[match[1]]": "return RELEASED[match[1]]"},
        "tests/export/formats/test_simpool_gamma.py",
    ),
    "the recipe's gamma replaces that of the initial model": Mutant(
        "export/initial_model.py",
        {'"unstored_gamma": gamma': '"gamma": gamma'},
        "tests/export/test_hub_releases.py -k continues",
    ),
    "pickled weights are downloaded beside safetensors": Mutant(
        "export/hub_repository.py",
        {
            'if any(folder.glob("*.safetensors")):\n            return folder\n        return fetch_pickled': (
                "return fetch_pickled"
            )
        },
        "tests/export/test_hub_releases.py -k beside_a_config",
    ),
    "student exported": Mutant(
        "export/formats/imported_model.py",
        {'prefix = f"{role}.{part}."': 'prefix = f"student.{part}."'},
        "tests/export/test_load.py",
    ),
    "k-NN without L2": Mutant(
        "evaluation/knn.py",
        {"F.normalize(at_least_float32(rows), dim=1)": "rows.float()"},
        "tests/evaluation/test_knn.py",
    ),
    "feature cache independent of the settings": Mutant(
        "evaluation/features/fingerprints.py",
        {"{sorted(plain.items())}": ""},
        "tests/evaluation/features/test_cache.py",
    ),
    "feature cache independent of file dates": Mutant(
        "evaluation/features/fingerprints.py",
        {'getattr(dataset, "stamp", dataset.fingerprint)()': "dataset.fingerprint()"},
        "tests/evaluation/features/test_cache.py",
    ),
    "class token counted as a patch": Mutant(
        "evaluation/features/feature_names.py",
        {"stage[:, prefix:]": "stage"},
        "tests/evaluation/features/test_extract.py",
    ),
    "one learning rate for all heads": Mutant(
        "evaluation/probes/linear_heads.py",
        {"lr = self.lr * factor": "lr = self.lr[:1].expand_as(self.lr) * factor"},
        "tests/evaluation/test_linear.py",
    ),
    "DeiT schedule without its one-epoch delay": Mutant(
        "evaluation/finetune.py", {"t = max(0, epoch - 1)": "t = epoch"}, "tests/evaluation/test_finetune.py"
    ),
    "layer decay one block off": Mutant(
        "evaluation/probes/layer_decay.py",
        {"return int(block[1]) + 1 if": "return int(block[1]) if"},
        "tests/evaluation/probes/test_layer_decay.py",
    ),
    "resume from the start of the epoch": Mutant(
        "engine/loop.py",
        {
            "batches_from(trainer.step_index)": (
                "batches_from(trainer.step_index // trainer.steps_per_epoch * trainer.steps_per_epoch)"
            )
        },
        "tests/engine/test_loop.py",
    ),
    # exports and inputs
    "margins of crops rounded down": Mutant(
        "imaging/resize.py",
        {"(round((side - target) / 2) for": "((side - target) // 2 for"},
        "tests/imaging/test_resize.py -k center",
    ),
    "rows first for tall images": Mutant(
        "imaging/resize.py", {"return old[0] > new[0] and": "return False and"}, "tests/imaging/test_resize.py -k tall"
    ),
    "no processor type in config.json": Mutant(
        "export/write.py",
        {'    config["image_processor_type"] = processor_type(encoder)\n': ""},
        "tests/export/folder/test_transformers_layout.py -k registers",
    ),
    "gray exports convert to RGB": Mutant(
        "export/folder/transformers_layout.py",
        {'"do_convert_rgb": len(encoder.mean) == 3': '"do_convert_rgb": True'},
        "tests/export/folder/test_transformers_layout.py -k one_channel",
    ),
    "rows of registers in DINOv2's table": Mutant(
        "export/formats/dinov2.py",
        {"(model.table_prefix, table.shape[1] - model.table_prefix)": "(0, table.shape[1])"},
        "tests/export/formats/test_backbone_files.py -k one_row",
    ),
    "source locations in programs": Mutant(
        "export/folder/programs.py",
        {'node.meta.pop("stack_trace", None)': "pass"},
        "tests/export/folder/test_programs.py -k source_locations",
    ),
    "paths only at the beginning of text": Mutant(
        "export/folder/local_paths.py",
        {"return IN_TEXT.sub(lambda match: last_name(match[0]), value)": "return value"},
        "tests/export/folder/test_local_paths.py",
    ),
    "an absolute tolerance below 1": Mutant(
        "export/folder/verify.py",
        {"clamp_min(torch.finfo(torch.float32).tiny)": "clamp_min(1.0)"},
        "tests/export/folder/test_verify.py -k relative",
    ),
    "an interrupted exchange loses the earlier export": Mutant(
        "export/write.py",
        {"            old.rename(folder)\n": "            pass\n"},
        "tests/export/test_write.py -k exchange",
    ),
    "raw pixels pass an encoder": Mutant(
        "nn/encoder.py",
        {"    if not images.is_floating_point():": "    if False:"},
        "tests/nn/test_encoder.py -k another_kind",
    ),
    # poolings, costs and pictures of MAP and SimPool
    "highest instead of lowest frequencies": Mutant(
        "nn/pooling/dft.py",
        {"frequencies = torch.arange(size, dtype": "frequencies = length - 1 - torch.arange(size, dtype"},
        "tests/nn/pooling/test_closed_forms.py -k dft",
    ),
    "sum instead of average under the Fourier transform": Mutant(
        "nn/pooling/dft.py",
        {"angles.cos() / length, angles.sin() / length": "angles.cos(), angles.sin()"},
        "tests/nn/pooling/test_closed_forms.py -k dft",
    ),
    "a hidden layer of VGG left out": Mutant(
        "nn/pooling/vgg.py",
        {"linear(self.fc2, F.relu(linear(self.fc1, flat)))": "linear(self.fc1, flat)"},
        "tests/nn/pooling/test_closed_forms.py -k vgg",
    ),
    "tokens of the neck in another order": Mutant(
        "nn/multi_token/neck.py",
        {"tokens.flatten(1, 2)": "tokens.transpose(1, 2).flatten(1, 2)"},
        "tests/nn/multi_token/test_neck.py",
    ),
    "class tokens before the last block": Mutant(
        "nn/multi_token/class_tokens.py",
        {"(backbone.depth - 1,)": "(backbone.depth - 2,)"},
        "tests/nn/multi_token/test_class_tokens.py",
    ),
    "throughput by the fastest call": Mutant(
        "bench/throughput.py",
        {"batch / statistics.median(times)": "batch / min(times)"},
        "tests/bench/test_throughput.py",
    ),
    "frozen weights counted": Mutant(
        "bench/network_cost.py",
        {" for parameter in self.parameters() if parameter.requires_grad)": " for parameter in self.parameters())"},
        "tests/bench/test_map_tables.py",
    ),
    "scatter between groups around zero": Mutant(
        "functional/metrics.py",
        {"(groups - groups.mean(dim=1, keepdim=True)).square()": "groups.square()"},
        "tests/functional/test_metrics.py tests/evaluation/multi_token/test_token_logits.py",
    ),
    "groups of token logits interleaved": Mutant(
        "evaluation/multi_token/token_logits.py",
        {".unflatten(1, (network.groups, -1))\n": (".unflatten(1, (-1, network.groups)).transpose(1, 2)\n")},
        "tests/evaluation/multi_token/test_token_logits.py",
    ),
    "least instead of most attended patches hold the mass": Mutant(
        "functional/attention.py",
        {"dim=1, descending=True, stable=True)\n    before": "dim=1, descending=False, stable=True)\n    before"},
        "tests/functional/test_attention.py tests/evaluation/suite/test_figure_sheets.py",
    ),
    "mask of the mass inverted": Mutant(
        "evaluation/suite/figure_sheets.py",
        {"overlay_mask(image, chosen,": "overlay_mask(image, ~chosen,"},
        "tests/evaluation/suite/test_figure_sheets.py",
    ),
    "attention of the block before": Mutant(
        "nn/backbones/transformer.py",
        {
            "            x = x + residual\n            x = x + self.family.mlp_branch(block, x)\n": (
                "            x = x + residual\n"
            )
        },
        "tests/nn/backbones/test_transformer.py",
    ),
    # continuing a run, words of the command line
    "changed images are not compared": Mutant(
        "build/running/continuing.py",
        {"    differences = differing(known, images)\n": "    differences = []\n"},
        "tests/build/running/test_continuing.py -k added",
    ),
    "an epoch follows the images of each start": Mutant(
        "build/running/run.py",
        {'record.get("images", len(data))': "len(data)"},
        "tests/build/running/test_continuing.py -k schedules",
    ),
    "moved images are another recipe": Mutant(
        "build/running/continuing.py",
        {'PLACES = ("data.path", ': 'PLACES = ("data.paths", '},
        "tests/build/running/test_continuing.py -k moved",
    ),
    "a recipe chosen for other images is used": Mutant(
        "cli/training.py",
        {"        check_chosen_for(file, folder, data, masked=masked)\n": ""},
        "tests/cli/test_training.py -k chosen",
    ),
    "text of the command line is read as YAML": Mutant(
        "recipe/yaml_text.py",
        {"        return Scalar(self.text, quoted=True)\n": "        return self.parsed()\n"},
        "tests/recipe/test_yaml_text.py",
    ),
    "runs are listed as images": Mutant(
        "data/datasets/folder_index.py",
        {"return None if is_own(marks) else found": "return found"},
        "tests/cli/test_training.py -k below",
    ),
    "warm-ups are shortened to the run, not in proportion": Mutant(
        "recipe/run_length.py", {"schedule.scaled(value, epochs / before)": "epochs"}, "tests/recipe/test_run_length.py"
    ),
    "a warm-up fills a shortened run": Mutant(
        "recipe/run_length.py",
        {"value or value < epochs": "value or schedule.fits(value, epochs)"},
        "tests/recipe/test_run_length.py",
    ),
    "consequences of a mistake reported": Mutant(
        "recipe/reading.py", {"if not set(keys).intersection(doubtful):": "if True:"}, "tests/recipe/test_mistakes.py"
    ),
    "conflicts hidden behind typing mistakes": Mutant(
        "recipe/reading.py",
        {"mistakes += conflict_lines(found, doubtful,": "mistakes = mistakes or conflict_lines(found, doubtful,"},
        "tests/recipe/test_mistakes.py",
    ),
    "misspelled key leaves its own in conflicts": Mutant(
        "recipe/reading.py", {"() if intended is None else (intended,)": "()"}, "tests/recipe/test_mistakes.py"
    ),
    "one default for all readers of a key": Mutant(
        "recipe/key_rows.py",
        {"(type_text(keys[key]), default_text(keys[key])), [])": '(type_text(keys[key]), ""), [])'},
        "tests/recipe/test_key_rows.py -k states",
    ),
    "a folder without train/ is refused": Mutant(
        "recipe/splits.py",
        {'if lacks(values, layers, "data.split", "data.path"):': "if False:"},
        "tests/recipe/test_splits.py",
    ),
}


def copied(folder: Path) -> None:
    """Copy the parts of the checkout that tests import or read to `folder`."""
    junk = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for part in ("ssl", "tests", "configs", "launch"):
        shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=junk)
    shutil.copy(ROOT / "setup.cfg", folder)


def tests_of(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on the fast tests of a copied checkout with these arguments."""
    filters = ["-q", "-p", "no:cacheprovider", "-m", "not slow and not long and not gpu"]
    paths = os.pathsep.join([str(folder / "ssl"), str(folder / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *filters, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def planted(folder: Path, mutant: Mutant) -> None:
    """Copy the checkout to `folder` and plant the fault.

    Raises ValueError where a text to replace does not occur exactly once.
    """
    copied(folder)
    source = folder / PACKAGE / mutant.file
    text = source.read_text()
    for before, after in mutant.changes.items():
        if text.count(before) != 1:
            raise ValueError(f"{mutant.file} has {text.count(before)} occurrences instead of one: {before}")
        text = text.replace(before, after)
    source.write_text(text)


def verdict(mutant: Mutant) -> str:
    """Plant one fault and run its tests: "caught", "SURVIVED", or the reason why they did not run."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            planted(Path(folder), mutant)
        except (ValueError, OSError) as error:
            return f"not planted: {error}"
        run = tests_of(Path(folder), "-x", *mutant.tests.split())
    if run.returncode == 0:
        return "SURVIVED"
    if run.returncode != 1 or "ImportError" in run.stdout:
        return "not run: " + (run.stdout + run.stderr).strip()[-600:]
    return "caught"


def sampled(count: int, seed: int) -> list[str]:
    """Draw that many faults, at most all, as a function of the seed."""
    return random.Random(seed).sample(list(MUTANTS), min(count, len(MUTANTS)))


def main(words: list[str]) -> int:
    """Plant the named faults, a sample, or all, and print the result of each; exit status 1 if any survives."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--sample", type=int, metavar="N", help="N faults, drawn by the seed")
    parser.add_argument("--seed", type=int, help="of the sample (default: a new one, printed)")
    options = parser.parse_args(words)
    names = options.names
    if options.sample is not None:
        seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
        names = sampled(options.sample, seed)
        print(f"{len(names)} of {len(MUTANTS)} faults, seed {seed}", flush=True)
    unknown = [name for name in names if name not in MUTANTS]
    if unknown:
        print(f"no mutant {unknown[0]!r}; there are: {', '.join(MUTANTS)}")
        return 2
    verdicts, sound = {}, {}
    for name in names or MUTANTS:
        mutant = MUTANTS[name]
        if mutant.tests not in sound:  # a test that fails without a fault detects nothing
            sound[mutant.tests] = verdict(mutant._replace(changes={})) == "SURVIVED"
        verdicts[name] = verdict(mutant) if sound[mutant.tests] else f"not run: {mutant.tests} fails without it"
        print(f"{name}: {verdicts[name]}", flush=True)
    escaped = [name for name, result in verdicts.items() if result != "caught"]
    print(f"{len(verdicts) - len(escaped)} of {len(verdicts)} caught")
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
