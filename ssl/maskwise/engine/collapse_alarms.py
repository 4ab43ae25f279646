"""Collapse alarms: logged numbers that look wrong, with one line that says what to change."""

import math
from collections.abc import Callable
from typing import NamedTuple

WINDOW = 10  # logged records that must all look wrong before an alarm is raised
MIN_STEPS = 100  # no alarm before this step, or before a tenth of the run if that is later

NEAR_LOG_K = 0.01  # distance of the loss from ln K, as a share of ln K, that counts as being at ln K
UNIFORM = 0.98  # entropy of the targets, as a share of ln K, from which they carry no information
SINGLE = 0.4  # entropy of the batch's mean target, as a share of its maximum, below which one prototype dominates
CONSTANT = 0.15  # standard deviation of unit features (1: spread out) below which all images have the same feature
LOW_RANK = 1.5  # participation ratio of the features below which they lie on a line
DUPLICATES = 0.1  # share of image pairs with the same feature from which too many images are duplicates
EQUAL_MASKS = 0.3  # Fleiss' kappa of the masks from which all images have the same patches masked
STALE = 0.5  # share of its initial weights that a teacher may still contain after a quarter of the run
EQUAL_NETWORKS = 1e-6  # relative distance of student and teacher below which they are the same network
BELOW_UNTRAINED = 1.0  # points of k-NN below the untrained network in the second half of the run


class Alarm(NamedTuple):
    """One alarm: its kind, and a line with the observation and the remedy."""

    kind: str
    text: str


class CollapseAlarms:
    """Check logged records and reports; each kind is raised once, skipped steps whenever their number has doubled.

    prototypes: K of the CLS loss; patch_prototypes: K of the patch loss (default: the same). crops_per_batch: global
    crops whose targets one record summarizes (one rank's batch). Alarms look at the last `window` records and are not
    raised before step `patience`, since warm-ups pass through all of these states. Numbers missing from a record are
    skipped.
    """

    def __init__(
        self,
        prototypes: int | None,
        *,
        patch_prototypes: int | None = None,
        crops_per_batch: int | None = None,
        total_steps: int = 0,
        patience: int | None = None,
        window: int = WINDOW,
    ):
        self.log_k = log_of(prototypes)
        self.patch_log_k = log_of(patch_prototypes) or self.log_k
        self.crops_per_batch, self.total_steps, self.window = crops_per_batch, total_steps, window
        self.patience = max(MIN_STEPS, total_steps // 10) if patience is None else patience
        self.records: list[dict] = []
        self.raised: set[str] = set()
        self.skipped_reported = 0
        self.initial_share = 1.0  # share of its initial weights in the teacher
        self.last_step = 0
        self.untrained: float | None = None

    def check(self, record: dict) -> list[Alarm]:
        """Return the alarms of a logged record (usually none)."""
        step = record["step"]
        alarms = self._check_skipped(step, record.get("skipped", 0))
        self.initial_share *= record.get("momentum", 0.0) ** (step - self.last_step)
        self.last_step = step
        self.records = [*self.records, record][-self.window :]
        if step < self.patience or len(self.records) < self.window:
            return alarms
        for kind, (is_wrong, text) in ALARMS.items():
            if kind not in self.raised and is_wrong(self):
                self.raised.add(kind)
                numbers = {
                    "steps": step - self.records[0]["step"],
                    "step": step,
                    "log_k": self.log_k or 0,
                    "patch_log_k": self.patch_log_k or 0,
                    "initial": 100 * self.initial_share,
                    "last": record,
                }
                alarms.append(Alarm(kind, text.format(**numbers)))
        return alarms

    def _check_skipped(self, step: int, skipped: int) -> list[Alarm]:
        if not skipped or skipped < 2 * self.skipped_reported:
            return []
        self.skipped_reported = skipped
        text = (
            f"{skipped} of {step} steps had a non-finite loss or gradient and were skipped, no weight is damaged: if "
            "the "
            "number grows, lower optimizer.lr or set train.precision=fp32; bad_batches.jsonl names the images of these "
            "steps"
        )
        return [Alarm("skipped", text)]

    def check_evaluation(self, step: int, name: str, numbers: dict) -> list[Alarm]:
        """Return the alarm of a report: k-NN below the untrained network (report of step 0) in the second half."""
        top1 = numbers.get("top1")
        if name != "knn" or top1 is None:
            return []
        if step == 0:
            self.untrained = top1
        below = self.untrained is not None and top1 <= self.untrained - BELOW_UNTRAINED
        if not below or 2 * step < self.total_steps or "knn" in self.raised:
            return []
        self.raised.add("knn")
        text = (
            f"k-NN is {top1:.1f} % after {step} steps and was {self.untrained:.1f} % before the first: training makes "
            "the "
            "features worse; lower optimizer.lr, vary the crops more (crops.jitter, crops.global_scale), or start a "
            "new run "
            "with more epochs"
        )
        return [Alarm("knn", text)]

    def all(self, key: str, is_wrong: Callable[[float], bool]) -> bool:
        """Return whether every record of the window has a wrong number under `key`."""
        return all(record.get(key) is not None and is_wrong(record[key]) for record in self.records)

    def max_spread(self, log_k: float) -> float:
        """Return the largest entropy of a batch's mean target: ln K, or one prototype per crop with sharp targets."""
        return min(log_k, math.log(max(2, self.crops_per_batch))) if self.crops_per_batch else log_k

    def masked(self) -> bool:
        """Return whether every record of the window has masked patches."""
        return self.all("mask_share", lambda share: share > 0)


def log_of(prototypes: int | None) -> float | None:
    """Return ln K, the loss and the entropy without any information; None without a choice of prototypes."""
    return math.log(prototypes) if prototypes and prototypes > 1 else None


def loss_at_log_k(alarms: CollapseAlarms) -> bool:
    """Test for a CLS loss that has stayed at ln K."""
    top = alarms.log_k
    return top is not None and alarms.all("cls", lambda loss: abs(loss - top) < NEAR_LOG_K * top)


def uniform_targets(alarms: CollapseAlarms) -> bool:
    """Test for CLS targets without preference."""
    top = alarms.log_k
    return top is not None and alarms.all("teacher_entropy", lambda entropy: entropy > UNIFORM * top)


def single_prototype(alarms: CollapseAlarms) -> bool:
    """Test for one prototype that takes every image."""
    top = alarms.log_k
    return top is not None and alarms.all("teacher_spread", lambda spread: spread < SINGLE * alarms.max_spread(top))


def uniform_patch_targets(alarms: CollapseAlarms) -> bool:
    """Test for patch targets without preference."""
    top = alarms.patch_log_k
    if top is None or not alarms.masked():
        return False
    return alarms.all("patch_entropy", lambda entropy: entropy > UNIFORM * top)


def single_patch_prototype(alarms: CollapseAlarms) -> bool:
    """Test for one prototype that takes every masked patch."""
    top = alarms.patch_log_k
    if top is None or not alarms.masked():
        return False
    return alarms.all("patch_spread", lambda spread: spread < SINGLE * alarms.max_spread(top))


def constant_features(alarms: CollapseAlarms) -> bool:
    """Test for features that are the same for all images."""
    return alarms.all("feature_std", lambda std: std < CONSTANT)


def duplicate_features(alarms: CollapseAlarms) -> bool:
    """Test for many pairs of images with the same feature."""
    return alarms.all("feature_duplicates", lambda share: share > DUPLICATES)


def rank_collapse(alarms: CollapseAlarms) -> bool:
    """Test for features on a line."""
    return alarms.all("feature_rank", lambda rank: rank < LOW_RANK)


def identical_masks(alarms: CollapseAlarms) -> bool:
    """Test for masks that are the same for all images."""
    return alarms.masked() and alarms.all("mask_agreement", lambda agreement: agreement > EQUAL_MASKS)


def stale_teacher(alarms: CollapseAlarms) -> bool:
    """Test for a teacher that still contains most of its initial weights after a quarter of the run."""
    late = alarms.last_step >= alarms.total_steps / 4
    return late and "teacher_gap" in alarms.records[-1] and alarms.initial_share > STALE


def student_equals_teacher(alarms: CollapseAlarms) -> bool:
    """Test for a student and a teacher with the same weights."""
    return alarms.all("teacher_gap", lambda gap: gap < EQUAL_NETWORKS)


# kind: test of the history, and the text; the order is that in which they are raised
ALARMS = {
    "student_equals_teacher": (
        student_equals_teacher,
        "student and teacher have had the same weights for {steps} steps, nothing is learned: raise optimizer.lr, or "
        "unfreeze the last layer (optimizer.freeze_last_layer)",
    ),
    "stale_teacher": (
        stale_teacher,
        "after {step} steps the teacher still contains {initial:.0f} % of its initial weights: lower teacher.momentum, "
        "so "
        "that its memory, 1 / (1 - momentum) steps, is a twentieth of the run",
    ),
    "loss_at_log_k": (
        loss_at_log_k,
        "the loss has not moved from its maximum (ln K = {log_k:.2f}) for {steps} steps: the model is not learning. "
        "Lower "
        "teacher.temp, raise optimizer.lr or lower optimizer.warmup_epochs",
    ),
    "uniform_targets": (
        uniform_targets,
        "the teacher's entropy has been at its maximum (ln K = {log_k:.2f}) for {steps} steps: its targets carry no "
        "information. Lower teacher.temp, or raise teacher.momentum",
    ),
    "single_prototype": (
        single_prototype,
        "the teacher assigns every image to one prototype: lower method.center_momentum (1 is no centering) or set "
        "method.targets=sinkhorn, raise teacher.temp or teacher.momentum",
    ),
    "uniform_patch_targets": (
        uniform_patch_targets,
        "the entropy of the patch targets has been at its maximum (ln K = {patch_log_k:.2f}) for {steps} steps: they "
        "carry "
        "no information. Lower teacher.patch_temp",
    ),
    "single_patch_prototype": (
        single_patch_prototype,
        "the teacher assigns every masked patch to one prototype: lower method.center_momentum or set "
        "method.targets=sinkhorn, or raise teacher.patch_temp",
    ),
    "constant_features": (
        constant_features,
        "all images have nearly the same feature (feature_std {last[feature_std]:.2f}, healthy is above .5): look at "
        "the "
        "images, and raise teacher.momentum or lower optimizer.lr",
    ),
    "duplicate_features": (
        duplicate_features,
        "{last[feature_duplicates]:.0%} of the pairs of images have the same feature: look for empty or repeated "
        "images in the data",
    ),
    "rank_collapse": (
        rank_collapse,
        "the features lie on a line (feature_rank {last[feature_rank]:.1f}): use more head.prototypes, more varied "
        "images, "
        "or method.targets=sinkhorn",
    ),
    "identical_masks": (
        identical_masks,
        "all images have the same patches masked (mask_agreement {last[mask_agreement]:.2f}): the attention depends on "
        "the "
        "position and not on the image; use masking random or block, or start AttMask later (method.start_epoch)",
    ),
}
