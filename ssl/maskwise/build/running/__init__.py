"""Runs: started, continued, extended, mirrored, and their folders."""
