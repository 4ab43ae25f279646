"""Evaluations that predict a class for every pixel, and detection; with the parts they share."""
