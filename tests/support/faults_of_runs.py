"""Faults of schedules, extended runs and replayed steps, for tests/mutants.py."""

from support.mutant import Mutant

SCHEDULES = "tests/functional/test_schedules.py"
EXTENSION = "tests/build/running/test_extension.py"
REPLAY = "tests/doctor/test_replay.py"
SAMPLES = "tests/methods/test_sample_losses.py"

FAULTS = {
    "linear decay": Mutant("functional/schedules.py", {"(1 - math.sqrt(": "(1 - ("}, SCHEDULES),
    "momentum rises before the decay": Mutant(
        "functional/schedules.py", {"return start if step <= first or not decay else": "return"}, SCHEDULES
    ),
    "checkpoint before the decay removed": Mutant(
        "engine/checkpoint.py", {" if step_of(path) != self.keep_also]": "]"}, f"{EXTENSION} -k wsd"
    ),
    "run extended from its decayed weights": Mutant(
        "build/running/extension.py",
        {"return (*agrees, *(path for path in checkpoints if path not in agrees))": "return tuple(checkpoints)"},
        f"{EXTENSION} -k wsd",
    ),
    "run extended on other images": Mutant(
        "build/running/extension.py",
        {"if differences and not accept_changed_data:": "if False:"},
        f"{EXTENSION} -k mistakes",
    ),
    "step replayed with the keys of the next": Mutant(
        "doctor/replay.py", {"made.step_index = wanted\n": "made.step_index = wanted + 1\n"}, f"{REPLAY} -k own"
    ),
    "sample with the smallest loss named": Mutant(
        "doctor/replay.py", {"key=lambda i: -values[i] if": "key=lambda i: values[i] if"}, f"{REPLAY} -k largest"
    ),
    "micro-batches of ranks with synchronized norms not mixed": Mutant(
        "doctor/replay.py",
        {".view(self.ranks, made.accumulate, -1).transpose(0, 1).flatten()": ""},
        f"{REPLAY} -k ranks",
    ),
    "patch losses given to another sample": Mutant(
        "methods/sample_losses.py",
        {"// part.mask.shape[1] % samples": "// part.mask.shape[1] // 2 % samples"},
        f"{SAMPLES} -k ibot",
    ),
    "a view's own targets in the losses of samples": Mutant(
        "methods/sample_losses.py", {"rows.append((own - pairs)": "rows.append((-pairs)"}, f"{SAMPLES} -k dino"
    ),
}
