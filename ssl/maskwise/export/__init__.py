"""Encoders in files: what this project writes, and what others wrote."""
