"""Evaluations of the MAP paper: tokens of a classifier, activations of its layers."""
