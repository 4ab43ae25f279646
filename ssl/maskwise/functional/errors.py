"""The one exception whose text is written for the person at the keyboard."""


class UserError(Exception):
    """A mistake at the border: its text names the cause and the remedy in one line."""
