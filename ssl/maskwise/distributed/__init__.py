"""Ranks: the only place that knows torch.distributed."""
