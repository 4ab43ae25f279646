"""Backbones: timm models that return patch tokens."""
