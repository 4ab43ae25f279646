"""The bottleneck of a run, loading or computing, and the remedies."""

from __future__ import annotations

# share of the time spent waiting for data from which a run is data-bound
DATA_BOUND_WITH_WORKERS, DATA_BOUND_WITHOUT = 0.2, 0.5
NEGLIGIBLE = 0.02  # share of the time that is not worth an effort
FASTER_LOADING = "use more speed.workers, smaller image files or tar shards"


def bottleneck(waiting: float, *, workers: bool, labels: bool) -> str:
    """Name the bottleneck and its remedies.

    waiting: share of the time spent waiting for data. workers: whether data workers load in parallel with the step;
    without them loading and computing alternate, so that speeding up either saves time. labels: a supervised run.
    """
    smaller = inputs_to_shrink(labels)
    if waiting > (DATA_BOUND_WITH_WORKERS if workers else DATA_BOUND_WITHOUT):
        saved = 0.0 if workers else 1 - waiting
        return f"data-bound: {FASTER_LOADING}; a faster device would {gain(saved)}"
    return f"compute-bound: use {smaller}, a smaller backbone or a faster device; faster loading would {gain(waiting)}"


def inputs_to_shrink(labels: bool) -> str:
    """The inputs whose size or number sets the cost of a step, and their keys."""
    return "smaller images (augment.size)" if labels else "fewer or smaller crops"


def gain(share: float) -> str:
    """Upper bound on the time that a change saves, in words."""
    return "not help" if share < NEGLIGIBLE else f"save at most {100 * share:.0f} % of the time"
