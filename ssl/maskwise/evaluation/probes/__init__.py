"""Parts of the trained probes: batches, linear heads, layer decay and gradient sync."""
