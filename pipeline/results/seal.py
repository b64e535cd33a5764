"""A hash inside a file over the whole file, so that a flipped bit is found wherever it is."""

from __future__ import annotations

import hashlib
import json
from typing import Any

# In a Parquet file this and the hash stand between the last page and the footer, where readers look at nothing. The
# checksums of pages do not cover the footer, in which one bit renames a column.
MARK = b"stemline-blake2b:"
DIGITS = 32
_TAIL = 8  # length of the footer, and "PAR1"


def sealed(data: bytes) -> bytes:
    """A Parquet file with its hash."""
    footer = _footer(data)
    return data[:footer] + MARK + _digest(data) + data[footer:]


def seal_problem(data: bytes) -> str | None:
    """Empty if the hash in a Parquet file is right, None if there is none, else what is wrong."""
    footer = _footer(data)
    mark = footer - DIGITS - len(MARK)
    if mark < 0 or data[mark : mark + len(MARK)] != MARK:
        return None
    right = data[footer - DIGITS : footer] == _digest(data[:mark] + data[footer:])
    return "" if right else "its content is not what its checksum says"


def _footer(data: bytes) -> int:
    """Where the footer begins."""
    return len(data) - _TAIL - int.from_bytes(data[-_TAIL:-4], "little")


def json_seal(values: dict[str, Any]) -> str:
    """The hash of what a JSON file holds, whatever its white space."""
    return _digest(json.dumps(values, sort_keys=True).encode()).decode()


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGITS // 2).hexdigest().encode()
