"""Faults of embedding files, near-duplicates and lists of runs, for tests/mutants.py."""

from support.mutant import Mutant

NEIGHBORS = "tests/embedding/test_neighbors.py"
DUPES = "tests/embedding/test_dupes.py -k hand"
EMBED = "tests/embedding/test_embed.py"

FAULTS = {
    "pairs within a set found twice": Mutant("embedding/neighbors.py", {"keep = i < j": "keep = i != j"}, NEIGHBORS),
    "pairs just below the threshold kept": Mutant(
        "embedding/neighbors.py", {"keep = cosine >= threshold\n": "keep = cosine >= threshold - SLACK\n"}, NEIGHBORS
    ),
    "training images that leak are kept": Mutant(
        "embedding/duplicates.py", {"        if len(own) == len(group):\n": "        if own:\n"}, DUPES
    ),
    "parts of another model used": Mutant(
        "embedding/embed.py",
        {".strip() != key:\n                for": '.strip() == "":\n                for'},
        f"{EMBED} -k parts",
    ),
    "embeddings of any model searched": Mutant(
        "embedding/identity.py",
        {'if meta["model"] != model_identity(encoder):': "if False:"},
        "tests/embedding/test_search.py -k model",
    ),
    "heartbeat never renewed": Mutant(
        "engine/run_lock.py", {"os.utime(self.handle)": "pass"}, "tests/build/test_runs.py -k heartbeat_is"
    ),
}
