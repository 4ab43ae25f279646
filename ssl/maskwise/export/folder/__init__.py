"""Exported folders: format, library layouts, model card and verification."""
