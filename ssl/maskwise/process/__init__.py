"""The process: its standard streams and its memory allocator; nothing heavy is imported."""
