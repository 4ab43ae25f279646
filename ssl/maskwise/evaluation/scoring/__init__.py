"""Classifiers and metrics from libraries that protocols score with."""
