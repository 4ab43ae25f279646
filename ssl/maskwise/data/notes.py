"""Remarks about datasets for the start of a run: files left out, odd values."""

from maskwise.data.value_range import range_notes


def notes(sets: dict[str, object]) -> list[str]:
    """List by role what datasets left out (`.notes`) and what is odd about their values, without repetitions."""
    lines = []
    for role, data in sets.items():
        if data is not None:
            lines += [f"{role}: {note}" for note in (*getattr(data, "notes", ()), *range_notes(data))]
    return list(dict.fromkeys(lines))
