"""Feature extraction, its cache and its image views."""
