"""Documents that are zip archives: opened with a bound on what they unpack to."""

from __future__ import annotations

import io
import zipfile
import zlib

from pipeline.converters.protocol import MOST_BYTES, ConversionError

# Microsoft's container: documents of Word before 2007, and newer ones with a password.
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"


class Archive:
    """A zip archive's members. kind: of document, for people. Raises ConversionError if it is none, or cut off."""

    def __init__(self, data: bytes, kind: str) -> None:
        if data.startswith(_OLE):
            raise ConversionError(
                f"it is an old Word file or has a password, no {kind}: save it as .docx, without a password"
            )
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise ConversionError(f"it is no {kind}, or is cut off ({error}); get it again from its source") from None
        self._left = MOST_BYTES
        self.names = {info.filename for info in self._zip.infolist()}

    def admit(self, suffixes: tuple[str, ...]) -> None:
        """Raise ConversionError if the members whose names end in `suffixes` unpack to too much."""
        self._take(sum(info.file_size for info in self._zip.infolist() if info.filename.lower().endswith(suffixes)))

    def read(self, name: str) -> bytes:
        """A member's bytes. Raises ConversionError."""
        if name not in self.names:
            raise ConversionError(f"it is not whole: its archive has no {name!r}")
        try:
            self._take(self._zip.getinfo(name).file_size)
            return self._zip.read(name)
        except RuntimeError:  # what zipfile raises for it
            raise ConversionError("it is encrypted; save it without a password") from None
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
            raise ConversionError(f"its archive is damaged at {name!r}: {error}") from None

    def _take(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise ConversionError(f"its archive unpacks to more than {MOST_BYTES:,} bytes of text; no more are read")
