"""`Health`: reads the logged lines and says, in one line each, what looks wrong and what to change."""

import math


class Health:
    """Alarms over logged lines; each kind speaks once, the count of bad steps whenever it has doubled.

    `prototypes` is K: a loss near ln K means that the student tells nothing apart. Alarms that need a history look at
    the last `window` lines, and at no line before `patience` steps (warm-up passes through all of them).
    """

    def __init__(self, prototypes: int | None, *, patience: int, window: int = 10):
        self.ceiling = math.log(prototypes) if prototypes and prototypes > 1 else None
        self.patience, self.window = patience, window
        self.lines: list[dict] = []
        self.said: set[str] = set()
        self.reported = 0

    def check(self, line: dict) -> list[str]:
        """The alarms that this logged line raises (usually none)."""
        alarms = []
        skipped = line.get("skipped", 0)
        if skipped and skipped >= 2 * self.reported:
            self.reported = skipped
            alarms.append(
                f"{skipped} of {line['step']} steps had a non-finite loss or gradient and were left out, nothing is damaged: "
                "if the number grows, lower optimizer.lr or set train.precision=fp32"
            )
        self.lines = [*self.lines, line][-self.window :]
        if self.ceiling is None or line["step"] < self.patience or len(self.lines) < self.window:
            return alarms
        for kind, wrong, text in (
            ("stuck", self._stuck, f"the loss has stood at ln K = {self.ceiling:.2f} for {{steps}} steps, the student tells nothing apart: "
             "lower teacher.temp, raise optimizer.lr or lower optimizer.warmup_epochs"),
            ("point", self._one_prototype, "the teacher puts every image on one prototype (entropy and loss near 0): raise teacher.temp, "
             "lower method.center_momentum, or raise teacher.momentum"),
            ("uniform", self._uniform, f"the teacher's entropy has stood at its ceiling ln K = {self.ceiling:.2f} for {{steps}} steps, its targets say nothing: "
             "lower teacher.temp, or raise teacher.momentum"),
        ):
            if kind not in self.said and wrong():
                self.said.add(kind)
                alarms.append(text.format(steps=self.lines[-1]["step"] - self.lines[0]["step"]))
        return alarms

    def _stuck(self):
        return all(abs(line.get("cls", math.inf) - self.ceiling) < 0.01 * self.ceiling for line in self.lines)

    def _one_prototype(self):
        return all(line.get("teacher_entropy", math.inf) < 0.01 * self.ceiling and line.get("cls", math.inf) < 0.01 * self.ceiling for line in self.lines)

    def _uniform(self):
        return all(line.get("teacher_entropy", 0) > 0.995 * self.ceiling for line in self.lines)
