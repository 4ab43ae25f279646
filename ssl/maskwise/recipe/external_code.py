"""External classes in a recipe (`module:Name`): when importing them is allowed."""

from __future__ import annotations

from collections.abc import Collection

from maskwise.process.external_code import VARIABLE, is_listed, module_of, permit
from maskwise.recipe.schema import OURS_ALONE, tables
from maskwise.recipe.yaml_text import Entry

COMMAND_LINE = "command line"  # the origin of an override; that of a file has its line


def untrusted(section: str, entry: Entry, trusted: Collection[str]) -> str | None:
    """Return why the class that a recipe names as `module:Name` is not imported, None where it may be.

    A recipe file alone imports no code, since it may come from anyone. Allowed are names that the command line repeats,
    those in `trusted`, and modules listed in MASKWISE_MODULES. What is allowed here may be named by the encoders of
    the run as well.
    """
    name = entry.value.text
    if section in OURS_ALONE or ":" not in name or name in tables().get(section, ()):
        return None
    if entry.origin == COMMAND_LINE or name in trusted or is_listed(name):
        permit(name)
        return None
    return (
        f"`{name}` is code, and a recipe file alone does not import code; if you trust it, give {section}.name={name} "
        f"on the command line, or set {VARIABLE}={module_of(name)}"
    )
