"""Measurements of one GPU, in parts that fit into a short loan: see launch/reproduce/gpu.sh."""
