"""How an exception of somebody else's code is told in a line."""

from __future__ import annotations


def first_line(error: BaseException, limit: int = 200) -> str:
    """An error's type and the first line of its text, at most `limit` characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:limit]
