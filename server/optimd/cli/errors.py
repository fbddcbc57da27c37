"""What a command fails with."""

from __future__ import annotations


class CommandError(Exception):
    """A command cannot do what it was asked to. The message is one sentence with the remedy."""
