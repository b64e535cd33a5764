"""The two kinds of trouble: what ends a job, and what costs one document its output."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from pipeline.redact import without_secrets
from stem_core.settings import nearest

__all__ = ["DocumentError", "JobError", "nearest", "nearest_beside", "one_line", "visible", "without_secrets"]

# Unicode's control and format characters, ends of lines, and halves of characters: they command a terminal, or turn the
# direction of writing.
_COMMANDS = ("Cc", "Cf", "Cs", "Zl", "Zp")


class JobError(Exception):
    """The job cannot run or go on. The message is one line: what was got, what was expected, how to mend it."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message, 2000))


class DocumentError(Exception):
    """One document cannot be processed; it becomes a row with this message and `status`.

    tokens: of its prompt, where it is too long for the context; else 0.
    """

    def __init__(self, message: str, status: str = "error", tokens: int = 0) -> None:
        super().__init__(one_line(message, 1000), status, tokens)
        self.status = status
        self.tokens = tokens

    def __str__(self) -> str:
        return str(self.args[0])


def nearest_beside(path: Path) -> str:
    """As nearest(), of the names in the folder of a path that is not there; nothing if they cannot be listed."""
    try:
        return nearest(path.name, [entry.name for entry in path.parent.iterdir()])
    except OSError:
        return ""


def one_line(error: BaseException | str, limit: int = 500) -> str:
    """An error's text on one line of at most `limit` characters, without secrets and commands to a terminal."""
    text = str(error) or type(error).__name__
    text = visible(without_secrets(" ".join(text.split())))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def visible(text: str) -> str:
    """`text` without what commands a terminal or turns the direction of writing: such characters as \\x1b."""
    if text.isprintable():
        return text
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in _COMMANDS and c != "\n" else c for c in text)
