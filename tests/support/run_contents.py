"""Contents of a run folder, for comparing runs."""

from safetensors.torch import load_file

from maskwise.engine.run_log import read_metrics

TIMING = {"img_s", "data_wait", "seconds"}


def last_checkpoint(run):
    """Return the folder of a run's last checkpoint."""
    return run / "checkpoints" / (run / "checkpoints" / "last").read_text().strip()


def tensors(run):
    """Return all tensors of a run's last checkpoint, model and optimizer."""
    return {
        f"{part}/{key}": value
        for part in ("model", "optimizer")
        for key, value in load_file(last_checkpoint(run) / f"{part}.safetensors").items()
    }


def untimed_lines(run):
    """Return the lines of metrics.jsonl without what depends on time."""
    lines = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]
