"""How far a job is: one line that renews itself on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from pipeline.records import Row

LOG_EVERY = 30.0
TERMINAL_EVERY = 0.5


class Progress:
    """Counts finished rows and tells about them. The time left follows from tokens, not from documents.

    total_bytes: of the texts still to do; tokens left follow from bytes left and what a byte gave so far.
    """

    def __init__(
        self,
        documents: int,
        total_bytes: int,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._documents = documents
        self._bytes_left, self._bytes_worked = total_bytes, 0
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._clock = clock
        self._begun = self._told = clock()
        self._done = self._failed = self._tokens = 0

    def add(self, row: Row, size_bytes: int) -> None:
        """Count a finished document."""
        self._done += 1
        self._failed += row["status"] != "ok"
        self._tokens += (row["prompt_tokens"] or 0) + (row["output_tokens"] or 0)
        self._bytes_left -= size_bytes
        self._bytes_worked += size_bytes if row["prompt_tokens"] else 0

    def start_clock(self) -> None:
        """Rates count from now on: workers are ready."""
        self._begun = self._clock()

    def tick(self) -> None:
        """Tell, if it is time to."""
        now = self._clock()
        if now - self._told >= (TERMINAL_EVERY if self._terminal else LOG_EVERY):
            self._told = now
            self._tell()

    def message(self, text: str) -> None:
        """A line of its own."""
        self._stream.write(("\r\x1b[2K" if self._terminal else "") + text + "\n")
        self._stream.flush()

    def finish(self) -> None:
        """The last word; the terminal's line ends."""
        self._tell()
        if self._terminal:
            self._stream.write("\n")
            self._stream.flush()

    def line(self) -> str:
        """Documents, tokens, rate, time left, failures."""
        seconds = max(self._clock() - self._begun, 1e-9)
        rate = self._tokens / seconds
        parts = [f"{self._done:,}/{self._documents:,} documents", f"{self._tokens:,} tokens", f"{rate:,.0f} tokens/s"]
        if self._failed:
            parts.append(f"{self._failed:,} failed")
        if self._bytes_worked and self._done < self._documents:
            parts.append(f"about {duration(seconds * self._bytes_left / self._bytes_worked)} left")
        return " · ".join(parts)

    def _tell(self) -> None:
        if self._terminal:
            self._stream.write("\r\x1b[2K" + self.line())
        else:
            self._stream.write(time.strftime("%H:%M:%S ") + self.line() + "\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
