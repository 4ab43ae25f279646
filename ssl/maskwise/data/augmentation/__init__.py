"""Crops, color and mixing of training images."""
