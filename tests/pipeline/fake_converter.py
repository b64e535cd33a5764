"""A converter that does what its document says, and harms its process."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

from pipeline.converters.protocol import ConversionError, Converted

kept: list[bytes] = []


def convert(data: bytes, encoding: str) -> Converted:
    """The document is a line of Python, or what is to be given back."""
    what, _, rest = data.decode().partition(" ")
    if what == "sleep":
        time.sleep(float(rest))
    elif what == "spin":
        while True:
            pass
    elif what == "crash":
        ctypes.string_at(0)
    elif what == "exit":
        os._exit(3)
    elif what == "eat":
        kept.append(bytes(int(rest)))
    elif what == "refuse":
        raise ConversionError(rest)
    elif what == "raise":
        raise KeyError(rest)
    elif what == "print":
        print(rest, flush=True)
    elif what == "write":
        Path(rest).write_text("x")
    return Converted(f"{os.getpid()} {what}")
