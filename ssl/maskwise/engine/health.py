"""`Health`: reads the logged lines and says, in one line each, what looks wrong and what to change."""

import math
from typing import NamedTuple

WINDOW = 10  # logged lines that must all look wrong before an alarm speaks
PATIENCE = 100  # steps before which nothing is judged; a tenth of the run where that is longer

LN_K = 0.01  # how near ln K, as a share of it, is standing at ln K
UNIFORM = 0.98  # entropy of the targets, as a share of ln K, from which on they say nothing
ONE_KIND = 0.4  # entropy of the batch's mean target, as a share of what the batch could show, below which one prototype takes all
FLAT = 0.15  # standard deviation of unit features (1: spread out) below which all images have one feature
LINE = 1.5  # participation ratio of the features below which they lie on a line
TWINS = 0.1  # share of pairs of images with one and the same feature from which on too many images are alike
EQUAL_MASKS = 0.3  # Fleiss' kappa of the masks from which on all images lose the same patches
UNMOVED = 0.5  # share of its first weights that a teacher may still hold after a quarter of the run
SAME = 1e-6  # relative distance of student and teacher below which they are one network
BELOW = 1.0  # points of k-NN below the untrained network in the second half of the run


class Alarm(NamedTuple):
    """What looks wrong: its kind, and the line that says so and what to change."""

    kind: str
    text: str


class Health:
    """Alarms over logged lines and reports; each kind speaks once, the count of bad steps whenever it has doubled.

    `prototypes` is K of the image term, `patch_prototypes` that of the patch term (None: as many), `rows` the number of global crops whose
    targets one line tells of (one rank's batch). Alarms that need a history look at the last `window` lines, and at no line
    before `patience` steps (warm-up passes through all of them). Signs that a line does not hold are not looked for.
    """

    def __init__(self, prototypes: int | None, *, patch_prototypes: int | None = None, rows: int | None = None, total_steps: int = 0,
                 patience: int | None = None, window: int = WINDOW):
        self.ceiling = ceiling(prototypes)
        self.patch_ceiling = ceiling(patch_prototypes) or self.ceiling
        self.rows, self.total_steps, self.window = rows, total_steps, window
        self.patience = max(PATIENCE, total_steps // 10) if patience is None else patience
        self.lines: list[dict] = []
        self.said: set[str] = set()
        self.reported = 0
        self.held, self.seen = 1.0, 0  # share of its first weights that the teacher holds, and the step up to which that is known
        self.untrained: float | None = None

    def check(self, line: dict) -> list[Alarm]:
        """The alarms that this logged line raises (usually none)."""
        alarms = []
        step, skipped = line["step"], line.get("skipped", 0)
        if skipped and skipped >= 2 * self.reported:
            self.reported = skipped
            alarms.append(Alarm("skipped", (
                f"{skipped} of {step} steps had a non-finite loss or gradient and were left out, nothing is damaged: if the number grows, "
                "lower optimizer.lr or set train.precision=fp32; bad_batches.jsonl names the images of these steps"
            )))
        self.held *= line.get("momentum", 0.0) ** (step - self.seen)
        self.seen = step
        self.lines = [*self.lines, line][-self.window :]
        if step < self.patience or len(self.lines) < self.window:
            return alarms
        for kind, (wrong, text) in SIGNS.items():
            if kind not in self.said and wrong(self):
                self.said.add(kind)
                alarms.append(Alarm(kind, text.format(
                    steps=step - self.lines[0]["step"], step=step, ceiling=self.ceiling or 0, patch_ceiling=self.patch_ceiling or 0,
                    held=100 * self.held, last=line,
                )))
        return alarms

    def judge(self, step: int, name: str, numbers: dict) -> list[Alarm]:
        """The alarms that a report raises: k-NN below that of the untrained network (the report of step 0), in the second half of the run."""
        top1 = numbers.get("top1")
        if name != "knn" or top1 is None:
            return []
        if step == 0:
            self.untrained = top1
        if self.untrained is None or 2 * step < self.total_steps or top1 > self.untrained - BELOW or "knn" in self.said:
            return []
        self.said.add("knn")
        return [Alarm("knn", (
            f"k-NN is {top1:.1f} % after {step} steps and was {self.untrained:.1f} % before the first: training makes the features worse; "
            "lower optimizer.lr, vary the crops more (crops.jitter, crops.global_scale), or start anew with more epochs"
        ))]

    def all(self, key: str, wrong) -> bool:
        """Whether every line of the window holds `key` with a number that looks wrong."""
        return all(line.get(key) is not None and wrong(line[key]) for line in self.lines)

    def share(self, of: float | None) -> float:
        """The largest entropy that the mean target of one line can have: of sharp targets, one prototype for each row."""
        return min(of, math.log(max(2, self.rows))) if self.rows else of


def ceiling(prototypes: int | None) -> float | None:
    """ln K, the loss and entropy of knowing nothing; None where there are no prototypes to choose from."""
    return math.log(prototypes) if prototypes and prototypes > 1 else None


def stuck(health: Health) -> bool:
    top = health.ceiling
    return top is not None and health.all("cls", lambda cls: abs(cls - top) < LN_K * top)


def uniform(health: Health) -> bool:
    top = health.ceiling
    return top is not None and health.all("teacher_entropy", lambda entropy: entropy > UNIFORM * top)


def point(health: Health) -> bool:
    top = health.ceiling
    return top is not None and health.all("teacher_spread", lambda spread: spread < ONE_KIND * health.share(top))


def patch_uniform(health: Health) -> bool:
    top = health.patch_ceiling
    return top is not None and masked(health) and health.all("patch_entropy", lambda entropy: entropy > UNIFORM * top)


def patch_point(health: Health) -> bool:
    top = health.patch_ceiling
    return top is not None and masked(health) and health.all("patch_spread", lambda spread: spread < ONE_KIND * health.share(top))


def masked(health: Health) -> bool:
    return health.all("mask_share", lambda share: share > 0)


def flat(health: Health) -> bool:
    return health.all("feature_std", lambda std: std < FLAT)


def twins(health: Health) -> bool:
    return health.all("feature_twins", lambda share: share > TWINS)


def line(health: Health) -> bool:
    return health.all("feature_rank", lambda rank: rank < LINE)


def equal_masks(health: Health) -> bool:
    return masked(health) and health.all("mask_agreement", lambda agreement: agreement > EQUAL_MASKS)


def unmoved(health: Health) -> bool:
    return health.seen >= health.total_steps / 4 and "teacher_gap" in health.lines[-1] and health.held > UNMOVED


def same(health: Health) -> bool:
    return health.all("teacher_gap", lambda gap: gap < SAME)


# kind: whether the history looks so, and what to say; the order is that in which they speak
SIGNS = {
    "same": (same, "student and teacher have been one network for {steps} steps, nothing is learned: raise optimizer.lr, or let the last layer go (optimizer.freeze_last_layer)"),
    "teacher": (unmoved, "after {step} steps the teacher still holds {held:.0f} % of its first weights: lower teacher.momentum, so that its memory, 1 / (1 - momentum) steps, is a twentieth of the run"),
    "stuck": (stuck, "the loss has stood at ln K = {ceiling:.2f} for {steps} steps, the student tells nothing apart: lower teacher.temp, raise optimizer.lr or lower optimizer.warmup_epochs"),
    "uniform": (uniform, "the teacher's entropy has stood at its ceiling ln K = {ceiling:.2f} for {steps} steps, its targets say nothing: lower teacher.temp, or raise teacher.momentum"),
    "point": (point, "the teacher puts every image on one prototype: lower method.center_momentum (1 is no centering) or take method.targets=sinkhorn, raise teacher.temp or teacher.momentum"),
    "patch_uniform": (patch_uniform, "the targets of the hidden patches have stood at ln K = {patch_ceiling:.2f} for {steps} steps, they say nothing: lower teacher.patch_temp"),
    "patch_point": (patch_point, "the teacher puts every hidden patch on one prototype: lower method.center_momentum or take method.targets=sinkhorn, or raise teacher.patch_temp"),
    "flat": (flat, "all images have nearly the same feature (feature_std {last[feature_std]:.2f}, healthy is above .5): look at the images, and raise teacher.momentum or lower optimizer.lr"),
    "twins": (twins, "{last[feature_twins]:.0%} of the pairs of images have one and the same feature: look for empty or repeated images in the data"),
    "line": (line, "the features lie on one line (feature_rank {last[feature_rank]:.1f}): give more head.prototypes, more varied images, or method.targets=sinkhorn"),
    "masks": (equal_masks, "all images lose the same patches (mask_agreement {last[mask_agreement]:.2f}): the attention follows the place and not the image; take masking random or block, "
              "or start AttMask later (method.start_epoch)"),
}  # fmt: skip
