"""The training engine: one step, the loop, checkpoints, the journal. It knows no concrete method."""
