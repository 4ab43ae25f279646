"""Plant named faults in a copy of the package, one at a time; the tests named beside each must fail.

`python tests/mutants.py` tries all, `python tests/mutants.py NAME...` some; the exit status is 1 if any survives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ssl/maskwise"


class Mutant(NamedTuple):
    """A fault: in `file` of the package each text of `changes` becomes the other; `tests` are enough to notice."""

    file: str
    changes: dict[str, str]
    tests: str


METHODS = "tests/methods/test_ibot.py tests/methods/test_student_teacher.py"
MASKING = "tests/methods/test_masking.py"
OPTIM = "tests/engine/test_optim.py"
TRAINER = "tests/engine/test_trainer.py"
NN = "tests/nn/test_backbone.py"

MUTANTS = {
    # interruption and disks
    "pointer moved before the checkpoint is there": Mutant(
        "engine/checkpoint.py",
        {
            "        os.rename(aside, path)\n        sync(self.folder)\n": "",
            'write_whole(self.folder / "last", path.name + "\\n")\n': 'write_whole(self.folder / "last", path.name + "\\n")\n        os.rename(aside, path)\n',
        },
        "tests/engine/test_checkpoint_faults.py -k saving",
    ),
    "an altered meta.json believed": Mutant("engine/checkpoint.py", {"if seal is not None and": "if False and"}, "tests/engine/test_checkpoint_faults.py -k meta"),
    "nothing swept": Mutant("engine/checkpoint.py", {"shutil.rmtree(left, ignore_errors=True)": "pass"}, "tests/engine/test_checkpoint_faults.py -k tidying"),
    "lines forgotten that the disk refused": Mutant("engine/appending.py", {"self.owed += record": "self.owed = record"}, "tests/engine/test_full_disk.py"),
    "a failed save ends the run": Mutant("engine/loop.py", {"        if final:\n": "        if True:\n"}, "tests/engine/test_full_disk.py"),
    "metrics cut a step late": Mutant("engine/journal.py", {'line.get("step", 0) > step:': 'line.get("step", 0) > step + 2:'}, "tests/engine/test_journal.py"),
    "deaf until the loop begins": Mutant("engine/interrupts.py", {"self.asked |= ": "self.asked |= False and "}, "tests/engine/test_interrupts.py"),
    # losses and centers
    "center updated before the loss": Mutant(
        "methods/ibot.py",
        {
            "self.remember(step, teacher_z, teacher_patch_z)": "self.remember(step, teacher_z, teacher_patch_z); self.update_teacher(1.0)"
        },
        METHODS,
    ),
    "same-view pair kept": Mutant(
        "functional/losses.py", {"(probs * (everyone - own)).sum()": "(probs * everyone).sum()"}, "tests/functional/test_losses.py"
    ),
    "tokens of one micro-batch": Mutant("methods/ibot.py", {"self.world_size * lesson.parts * term": "self.world_size * term"}, "tests/engine/test_accumulate.py"),
    "gradients of micro-batches added": Mutant(
        "engine/trainer.py", {'(seen["loss"] / len(parts)).backward()': 'seen["loss"].backward()'}, "tests/engine/test_accumulate.py"
    ),
    "same-view pair kept in pieces": Mutant(
        "functional/prototypes.py", {"slope[:teachers].mul_(teachers - 1).add_(aims)": "slope[:teachers].mul_(teachers)"}, METHODS
    ),
    "pieces forget the weight's gradient": Mutant("functional/prototypes.py", {"slope_weight.addmm_(": "slope_weight = torch.zeros_like(slope_weight).addmm_("},
        "tests/functional/test_prototypes.py",
    ),
    "unmasked images left out of the mean": Mutant(
        "functional/losses.py",
        {"counts.clamp_min(1).double() * mask.shape[0]": "counts.clamp_min(1).double() * (counts > 0).sum().clamp_min(1)"},
        "tests/functional/test_losses.py",
    ),
    "patch center over hidden patches only": Mutant(
        "methods/ibot.py", {"teacher_z, teacher_patch_z)": "teacher_z, teacher_patch_z.index_select(0, rows))"}, METHODS
    ),
    "patch center of the first view only": Mutant(
        "methods/ibot.py", {"teacher_z, teacher_patch_z)": "teacher_z, teacher_patch_z[: len(teacher_patch_z) // 2])"}, METHODS
    ),
    "centers of one rank": Mutant(
        "methods/student_teacher.py", {"means = self.all_sum(torch.cat([z.mean(dim=0) for z in kinds])) / self.world_size":
                                       "means = torch.cat([z.mean(dim=0) for z in kinds])"}, METHODS
    ),
    "tokens of one rank": Mutant("methods/ibot.py", {"total = self.all_sum(": "total = ("}, METHODS),
    "image temperature for patches": Mutant("methods/ibot.py", {"lesson.patch_z.to(dtype), self.patch_temperature(epoch)": "lesson.patch_z.to(dtype), self.cls_temperature(epoch)"}, METHODS),
    "patch center for images": Mutant("methods/student_teacher.py", {"head_weight.T)), self.center, temp)": "head_weight.T)), self.patch_center, temp)"}, METHODS),
    "patch head on locals": Mutant(
        "methods/student_teacher.py",
        {"        return features, torch.cat(": "        features.patches = features.patches + local.patches.mean()\n        return features, torch.cat("},
        METHODS,
    ),
    "masked teacher": Mutant(
        "methods/student_teacher.py",
        {"self.teacher.encoder(global_crops, attention": "self.teacher.encoder(global_crops * (global_crops > 0), attention"},
        "tests/methods/test_dino.py",
    ),
    "Sinkhorn of one rank": Mutant("methods/student_teacher.py", {"temp, all_sum=self.all_sum)": "temp)"}, METHODS),
    # the teacher
    "teacher with drop path": Mutant("nn/backbone.py", {"        self.drop_path.rate = 0.0\n": ""}, METHODS),
    "teacher with mask token": Mutant(
        "nn/backbone.py", {"        self.mask_token = None\n        self.drop_path.rate": "        self.drop_path.rate"}, METHODS
    ),
    "average the wrong way round": Mutant("functional/average.py", {"new, 1.0 - momentum)": "new, momentum)"}, OPTIM),
    "bad step moves the teacher": Mutant(
        "functional/average.py", {"if ok is None or ok:": "if True:"}, METHODS
    ),
    "bad step moves the centers": Mutant(
        "methods/student_teacher.py", {"moved if ok is None else torch.where(ok, moved, center)": "moved"}, METHODS
    ),
    "EMA before the step": Mutant(
        "engine/trainer.py",
        {
            "        self.method.update_teacher(self.momentum(step), ok)\n": "",
            "        step_if(ok, self.optimizer)\n": "        self.method.update_teacher(self.momentum(step), ok)\n        step_if(ok, self.optimizer)\n",
        },
        "tests/methods/test_training_step.py",
    ),
    # masks
    "mask transposed": Mutant(
        "nn/transformer.py",
        {"torch.where(mask.unsqueeze(-1), token, x)": "torch.where(mask.unflatten(1, grid).transpose(1, 2).flatten(1).unsqueeze(-1), token, x)"},
        NN,
    ),
    "position added before the mask token": Mutant(
        "nn/transformer.py",
        {
            "            x = torch.where(mask.unsqueeze(-1), token, x)\n": "            pass\n",
            "grid, self.position)\n        if": "grid, self.position)\n        x = x if mask is None else torch.where(mask.unsqueeze(-1), token, x)\n        if",
        },
        NN,
    ),
    "CLS key kept": Mutant("nn/transformer.py", {"row[..., self.num_prefix :]": "row[..., : -self.num_prefix]"}, NN),
    "heads renormalised": Mutant(
        "methods/masking.py", {"mean_heads(attention.detach())": "mean_heads(attention.detach() / attention.detach().sum(-1, keepdim=True))"}, MASKING
    ),
    "mask of another view": Mutant(
        "methods/masking.py", {"mean_heads(attention.detach())": "mean_heads(attention.detach().roll(len(attention) // 2, 0))"}, MASKING
    ),
    "low for high": Mutant("methods/masking.py", {'mode = "high"': 'mode = "low"'}, MASKING),
    "hint outside its pool": Mutant("functional/masks.py", {"outside = ~_first(order, [pool] * views)": "outside = torch.zeros_like(mask)"}, MASKING),
    "hint without a second ratio": Mutant("methods/masking.py", {"self.ratios(keys, draw=1)": "self.ratios(keys)"}, MASKING),
    "float32 ratios": Mutant(
        "functional/masks.py", {"    ratios = [float(r) for r in ratios]\n": "    ratios = [float(np.float32(r)) for r in ratios]\n"}, MASKING
    ),
    "coin of an image": Mutant(
        "methods/masking.py", {"keys.of(draws.COIN)": "draws.mix(draws.COIN, keys.seed, keys.step, keys.samples)"}, MASKING
    ),
    "masks by place in the batch": Mutant(
        "methods/masking.py", {"samples = sample_ids.to(": "samples = torch.arange(len(sample_ids)).to("}, MASKING
    ),
    "masks blind to the step": Mutant("methods/masking.py", {"mix(stream, self.seed, self.step, ": "mix(stream, self.seed, "}, MASKING),
    "masks from the first epoch on": Mutant("methods/ibot.py", {"start=epoch >= self.start_epoch": "start=True"}, METHODS),
    "drop path by place in the batch": Mutant(
        "methods/student_teacher.py", {"sample_ids.cpu().repeat(count)": "torch.arange(len(sample_ids)).repeat(count)"}, METHODS
    ),
    # pooling, schedules, optimizers
    "batch minimum": Mutant("nn/pooling/simpool.py", {'if self.min_scope == "image" else': "if False else"}, "tests/nn/test_simpool.py"),
    "LR starting above 0": Mutant(
        "functional/schedules.py", {"* step / max(1, warmup - 1)": "* (step + 1) / max(1, warmup)"}, "tests/functional/test_schedules.py"
    ),
    "global clip": Mutant(
        "engine/optim.py",
        {"    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)\n": "    factors = (max_norm / (norms.norm().expand_as(norms) + 1e-6)).clamp(max=1.0)\n"},
        OPTIM,
    ),
    "no decay of tokens": Mutant("engine/optim.py", {"or parameter.ndim == 1 or name": "or parameter.ndim == 1 or 'token' in name or name"}, OPTIM),
    "LARS trusting vectors": Mutant("engine/optim.py", {"        if parameter.ndim == 1:\n            return parameter.grad\n": ""}, OPTIM),
    "last layer never held": Mutant("engine/trainer.py", {"if epoch < self.freeze_last_layer:": "if False:"}, TRAINER),
    # around the training
    "student exported": Mutant("export/source.py", {'front = f"{role}.{part}."': 'front = f"student.{part}."'}, "tests/export/test_layouts.py"),
    "k-NN without L2": Mutant("evaluation/knn.py", {"F.normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=1)": "rows.float()"},
                              "tests/evaluation/test_knn.py"),
    "cached features whatever the settings": Mutant(
        "evaluation/features.py", {"{sorted(plain.items())}": ""}, "tests/evaluation/test_feature_store.py"
    ),
    "cached features whatever the dates": Mutant(
        "evaluation/features.py", {'getattr(dataset, "stamp", dataset.fingerprint)()': "dataset.fingerprint()"}, "tests/evaluation/test_feature_store.py"
    ),
    "class token counted as a patch": Mutant("evaluation/features.py", {"stage[:, prefix:]": "stage"}, "tests/evaluation/test_features.py"),
    "one learning rate for all heads": Mutant(
        "evaluation/linear_heads.py", {"lr = self.lr * factor": "lr = self.lr[:1].expand_as(self.lr) * factor"}, "tests/evaluation/test_linear.py"
    ),
    "DeiT's scheduler on time": Mutant("evaluation/finetune.py", {"t = max(0, epoch - 1)": "t = epoch"}, "tests/evaluation/test_finetune.py"),
    "layer decay one block off": Mutant("evaluation/layer_decay.py", {"return int(block[1]) + 1 if": "return int(block[1]) if"}, "tests/evaluation/test_layer_decay.py"),
    "resume from epoch start": Mutant(
        "engine/loop.py",
        {"batches_from(trainer.step_index)": "batches_from(trainer.step_index // trainer.steps_per_epoch * trainer.steps_per_epoch)"},
        "tests/engine/test_loop.py",
    ),
}  # fmt: skip


def planted(folder: Path, mutant: Mutant) -> None:
    """Copy what the tests need into `folder` and plant the fault; raises ValueError where its text is not found once."""
    junk = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for part in ("ssl", "tests", "configs"):
        shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=junk)
    shutil.copy(ROOT / "setup.cfg", folder)
    source = folder / PACKAGE / mutant.file
    text = source.read_text()
    for before, after in mutant.changes.items():
        if text.count(before) != 1:
            raise ValueError(f"{mutant.file} holds {text.count(before)} times, not once: {before}")
        text = text.replace(before, after)
    source.write_text(text)


def verdict(mutant: Mutant) -> str:
    """Plant one fault and run its tests: "caught", "SURVIVED", or what kept them from running."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            planted(Path(folder), mutant)
        except (ValueError, OSError) as error:
            return f"not planted: {error}"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", *mutant.tests.split()]
        paths = os.pathsep.join([str(Path(folder, "ssl")), str(Path(folder, "tests"))])
        environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if run.returncode == 0:
        return "SURVIVED"
    if run.returncode != 1 or "ImportError" in run.stdout:
        return "not run: " + (run.stdout + run.stderr).strip()[-600:]
    return "caught"


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in MUTANTS]
    if unknown:
        print(f"no mutant {unknown[0]!r}; there are: {', '.join(MUTANTS)}")
        return 2
    verdicts, sound = {}, {}
    for name in names or MUTANTS:
        mutant = MUTANTS[name]
        if mutant.tests not in sound:  # a test that fails without a fault notices nothing
            sound[mutant.tests] = verdict(mutant._replace(changes={})) == "SURVIVED"
        verdicts[name] = verdict(mutant) if sound[mutant.tests] else f"not run: {mutant.tests} fails without it"
        print(f"{name}: {verdicts[name]}", flush=True)
    escaped = [name for name, said in verdicts.items() if said != "caught"]
    print(f"{len(verdicts) - len(escaped)} of {len(verdicts)} caught")
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
