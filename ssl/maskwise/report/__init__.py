"""The page that `maskwise report` writes of a run, or of several compared."""
