"""The training engine: step, loop, checkpoints and run log. It imports no concrete method."""
