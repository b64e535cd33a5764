"""What a converter gives back, and how messages travel between the processes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, BinaryIO

# Of a larger document nothing is read, and no longer text is given back.
MOST_BYTES = 256 << 20


class ConversionError(Exception):
    """A document cannot be converted: what is wrong with it, and how to mend it."""


@dataclass(frozen=True)
class Converted:
    """A document's text.

    page_starts: characters of the text before each page; None where the format has no pages. note: what of the
    document is not in the text, empty if nothing is known to be missing.
    """

    text: str
    page_starts: tuple[int, ...] | None = None
    note: str = ""


def send(stream: BinaryIO, header: dict[str, Any], body: bytes) -> None:
    """Write a message: a line of JSON, then `body`."""
    stream.write(json.dumps(header | {"bytes": len(body)}).encode() + b"\n")
    stream.write(body)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], bytes]:
    """The next message. Raises EOFError if the other side ends before it is whole."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    header = json.loads(line)
    size = header.pop("bytes")
    body = stream.read(size)
    if len(body) < size:
        raise EOFError
    return header, body
