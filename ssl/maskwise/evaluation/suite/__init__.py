"""Reports over several evaluations: tables, charts and attention sheets."""
