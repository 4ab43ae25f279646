"""Embeddings of image sets as files, and what is done with them: duplicates, search, pages."""
