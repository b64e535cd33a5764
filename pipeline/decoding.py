"""Bytes as text, in the encoding that was declared: none is guessed, but the error says which one it looks like."""

from __future__ import annotations

import codecs

UTF_8 = "utf-8"
# Longest first: the mark of UTF-32 begins like that of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"),
)  # fmt: skip
_SAMPLE = 64 << 10
# What fewer bytes look like is chance.
_LEAST_SAMPLE = 100


class EncodingError(ValueError):
    """Bytes are not text in the declared encoding; the message says where, and what helps."""


def mark_of(data: bytes) -> str:
    """The encoding, other than UTF-8, whose mark `data` begins with, or ""."""
    return next((name for mark, name in MARKS if data.startswith(mark)), "")


def decode(data: bytes, encoding: str = UTF_8) -> str:
    """The text, without a byte order mark. encoding: as Python's codecs have it. Raises EncodingError."""
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeError as error:
        at = f" at byte {error.start}: {error.reason}" if isinstance(error, UnicodeDecodeError) else f": {error}"
        name = "UTF-8" if encoding == UTF_8 else encoding
        raise EncodingError(f"invalid {name}{at}; {looks_like(data)}") from None


def looks_like(data: bytes) -> str:
    """What helps to read bytes that are not in the declared encoding."""
    from charset_normalizer import from_bytes

    found = from_bytes(data[:_SAMPLE]).best() if len(data) >= _LEAST_SAMPLE else None
    other = "save the text as UTF-8, or name its encoding with --encoding"
    if found is None or "\0" in str(found):
        return other
    # Of encodings that give the same text the one that most such files are in.
    name = "cp1252" if "cp1252" in found.could_be_from_charset else found.encoding
    return f"it looks like {name}: give --encoding {name} if it is"
