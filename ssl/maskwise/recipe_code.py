"""Classes of one's own in a recipe (`module:Name`): whose word is enough to import them."""

from __future__ import annotations

import os

from maskwise.recipe_schema import tables
from maskwise.recipe_text import Entry

COMMAND_LINE = "command line"  # the origin of what the user typed; that of a file has its line
VARIABLE = "MASKWISE_MODULES"


def not_consented(section: str, entry: Entry, consented) -> str | None:
    """Why the code that a recipe names as `module:Name` is not imported; None where it may be, or nothing is to be.

    A file may come from anybody: its word alone imports nothing. It counts where the user repeats it on the command line, where
    `consented` has it, or where MASKWISE_MODULES names its module.
    """
    name = entry.value.text
    if section == "backbone" or ":" not in name or name in tables()[section] or entry.origin == COMMAND_LINE or name in consented:
        return None
    module = name.partition(":")[0]
    if module in os.environ.get(VARIABLE, "").replace(",", " ").split():
        return None
    return f"`{name}` is code, which a file alone does not get imported; if you trust it, give {section}.name={name} on the command line, or set {VARIABLE}={module}"
