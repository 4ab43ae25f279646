"""Pictures: reading with Pillow, resizing, charts, sheets with attention and masks."""
