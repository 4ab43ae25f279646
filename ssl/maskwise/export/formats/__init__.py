"""Readers of weight files: research releases, timm, DINOv2, DINOv3 and MAP."""
