"""Bytes of a file, decompressed if it is; what stands before a damaged place is there, and damage is told."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

import pyarrow as pa
from pyarrow.fs import FileSystem

# A text, or a line of JSON, of more bytes is not read: no model reads so much, and a few bytes of an archive can hold
# more than a machine's memory.
MOST_BYTES = 256 << 20
_PIECE = 4096


def open_stream(filesystem: FileSystem, path: str, kind: str) -> BinaryIO:
    """A buffered stream of the (decompressed) bytes."""
    raw = cast(BinaryIO, io.BufferedReader(filesystem.open_input_file(path), 1 << 20))
    if kind == "jsonl.gz":
        return cast(BinaryIO, io.BufferedReader(Decompressed(raw, lambda: zlib.decompressobj(31)), 1 << 20))
    if kind == "jsonl.zst":
        import zstandard

        new = zstandard.ZstdDecompressor().decompressobj
        return cast(BinaryIO, io.BufferedReader(Decompressed(raw, new), 1 << 20))
    return raw


def stream_errors() -> tuple[type[BaseException], ...]:
    """What a damaged or unreadable stream raises."""
    import zstandard

    return OSError, EOFError, zlib.error, zstandard.ZstdError, pa.ArrowException


def lines(stream: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Lines and their lengths in bytes; of one longer than MOST_BYTES only so much."""
    while line := stream.readline(MOST_BYTES):
        length = len(line)
        if length == MOST_BYTES:
            end = line
            while not end.endswith(b"\n") and (end := stream.readline(1 << 20)):
                length += len(end)
        yield line, length


class Decompressed(io.RawIOBase):
    """What a file of one or several compressed frames holds, all of it before anything is raised.

    The readers that come with gzip and zstandard lose the last bytes before a damaged place, or (zstandard) take a
    file that was cut off for a whole one. new: makes a decompressor of one frame. Raises EOFError where the file ends
    inside a frame, and what a decompressor raises.
    """

    def __init__(self, raw: BinaryIO, new: Callable[[], Any]) -> None:
        self._raw, self._new = raw, new
        self._frame: Any = None
        self._ahead, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        """It is."""
        return True

    def close(self) -> None:
        """Close the file, too."""
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with what there is; 0 at the end."""
        while not self._ready:
            if not self._advance():
                return 0
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _advance(self) -> bool:
        data = self._ahead or self._raw.read(_PIECE)
        self._ahead = b""
        if not data:
            if self._frame is not None:
                raise EOFError("the compressed data ends too early")
            return False
        if self._frame is None:
            data = data.lstrip(b"\0")  # some archivers fill up with zeros behind a frame
            self._frame = self._new() if data else None
        if self._frame is not None:
            self._ready = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._ahead, self._frame = self._frame.unused_data, None
        return True
