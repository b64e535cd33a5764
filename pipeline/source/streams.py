"""Bytes of a file, decompressed if it is; what stands before a damaged place is there, and damage is told."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import pyarrow as pa
from pyarrow.fs import FileSystem

from pipeline.errors import DocumentError, one_line
from pipeline.location import open_filesystem

if TYPE_CHECKING:
    from pipeline.source.protocol import Locator

# A text, or a line of JSON, of more bytes is not read: no model reads so much, and a few bytes of an archive can hold
# more than a machine's memory.
MOST_BYTES = 256 << 20
_PIECE = 4096
_MOST_OPEN = 4


def _zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


# What compressed files' names end in; makes a decompressor of one frame.
COMPRESSIONS: dict[str, Callable[[], Any]] = {".gz": lambda: zlib.decompressobj(31), ".zst": _zstd}


def compression(path: str) -> str:
    """Which of COMPRESSIONS a file's name ends in, or ""."""
    return next((suffix for suffix in COMPRESSIONS if path.lower().endswith(suffix)), "")


def open_stream(filesystem: FileSystem, path: str) -> BinaryIO:
    """A buffered stream of the bytes, decompressed if the file's name says that it is compressed."""
    raw = cast(BinaryIO, io.BufferedReader(filesystem.open_input_file(path), 1 << 20))
    packed = compression(path)
    if not packed:
        return raw
    return cast(BinaryIO, io.BufferedReader(Decompressed(raw, COMPRESSIONS[packed]), 1 << 20))


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


def whole_file(at: Locator, most: int) -> bytes:
    """The bytes of a file, up to one more than `most`. Raises DocumentError."""
    try:
        with open_filesystem(at.filesystem).open_input_file(at.path) as file:
            return file.read(most + 1)
    except (OSError, pa.ArrowException) as error:
        raise DocumentError(f"cannot be read: {one_line(error)}") from None


class StretchReader:
    """Reads stretches of files; a compressed file is read on from where the last one ended, if it can be."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], tuple[BinaryIO, int]] = {}

    def read(self, at: Locator) -> bytes:
        """The bytes at a locator whose start and length are bytes. Raises DocumentError."""
        if at.length > MOST_BYTES:
            raise DocumentError(f"its line has {at.length:,} bytes; at most {MOST_BYTES:,} are read")
        try:
            return self._compressed(at) if compression(at.path) else self._plain(at)
        except stream_errors() as error:
            raise DocumentError(f"cannot be read: {one_line(error)}") from None

    def _plain(self, at: Locator) -> bytes:
        with open_filesystem(at.filesystem).open_input_file(at.path) as file:
            file.seek(at.start)
            return file.read(at.length)

    def _compressed(self, at: Locator) -> bytes:
        key = (at.filesystem, at.path)
        stream, position = self._open.pop(key, (None, 0))
        if stream is None or position > at.start:
            if stream is not None:
                stream.close()
            while len(self._open) >= _MOST_OPEN:
                self._open.pop(next(iter(self._open)))[0].close()
            stream, position = open_stream(open_filesystem(at.filesystem), at.path), 0
        while position < at.start:
            skipped = len(stream.read(min(1 << 20, at.start - position)))
            if not skipped:
                raise DocumentError("cannot be read: the file is shorter than it was when it was listed")
            position += skipped
        line = stream.read(at.length)
        self._open[key] = (stream, position + len(line))
        return line


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
