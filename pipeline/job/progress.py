"""How far a job is: one line that renews itself on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from pipeline.engine.config import SoFar
from pipeline.errors import visible
from pipeline.job.time_left import TimeLeft
from pipeline.results.rows import Row

LOG_EVERY = 30.0
TERMINAL_EVERY = 0.5


class Progress:
    """Counts finished documents and tells about them, and how long the others will take (pipeline.job.time_left).

    total_bytes: of the texts still to do. most: tokens that the outputs of a document can have together.
    """

    def __init__(
        self,
        documents: int,
        total_bytes: int,
        *,
        most: int = 256,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._documents = documents
        self._bytes_left = total_bytes
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._clock = clock
        self._begun = self._shown_at = self._counted_at = clock()
        self._done = self._answers = self._failed = self._cut = self._tokens = 0
        self._live = self._starting = self._held = 0
        self._reading: dict[str, SoFar] = {}
        self._time_left = TimeLeft(most)
        self._ready = self._shown = False

    def add(self, rows: Sequence[Row], size_bytes: int) -> None:
        """Count a finished document, which has a row for each question. Tokens that were read once count once."""
        self._done += 1
        self._answers += len(rows)
        self._failed += sum(row.outcome.status != "ok" for row in rows)
        self._cut += sum(row.outcome.is_cut for row in rows)
        self._bytes_left -= size_bytes
        measured = [row.from_engine for row in rows if row.from_engine is not None]
        self._tokens += sum(each.prompt_tokens - each.prefix_tokens + each.output_tokens for each in measured)
        for row in rows:
            self._reading.pop(row.document_id, None)
        self._time_left.add(rows, size_bytes)

    def workers(self, live: int, starting: int, held: int) -> None:
        """How many workers take documents, how many do not yet, and how many documents they hold."""
        self._count_time()
        self._live, self._starting, self._held = live, starting, held

    def reading(self, documents: Mapping[str, SoFar]) -> None:
        """How far the documents are that workers hold, by document_id."""
        self._reading = dict(documents)

    def start_clock(self) -> None:
        """Rates count from now on: workers are ready. Only the first call does anything."""
        if not self._ready:
            self._begun = self._counted_at = self._clock()
            self._ready = True

    @property
    def seconds(self) -> float:
        """Since `start_clock`; 0 before."""
        return self._clock() - self._begun if self._ready else 0.0

    def tick(self) -> None:
        """Tell, if it is time to."""
        now = self._clock()
        if now - self._shown_at >= (TERMINAL_EVERY if self._terminal else LOG_EVERY):
            self._shown_at = now
            self._tell()

    def message(self, text: str) -> None:
        """A line of its own."""
        self._write(("\r\x1b[2K" if self._terminal else "") + visible(text) + "\n")
        self._shown = False

    def finish(self) -> None:
        """The last word, where there is anything to say; the terminal's line ends."""
        if self._done or self._shown:
            self._tell()
            if self._terminal:
                self._write("\n")

    def line(self, width: int | None = None) -> str:
        """Documents, tokens, rate, failures, workers, time left; in at most `width` columns what matters most of it."""
        seconds = max(self._clock() - self._begun, 1e-9)
        parts = [(0, f"{self._done:,}/{self._documents:,} documents")]  # the larger the number, the sooner left out
        if self._answers > self._done:
            parts.append((2, f"{self._answers:,} answers"))
        tokens = self._tokens + sum(each.read + each.written for each in self._reading.values())
        if not tokens and self._held:
            parts.append((3, f"{self._held:,} in work for {duration(seconds)}"))
        elif self._ready or not self._starting:
            parts += [(5, f"{tokens:,} tokens"), (4, f"{tokens / seconds:,.0f} tokens/s")]
        if self._failed:
            parts.append((1, f"{self._failed:,} failed"))
        if self._cut:
            parts.append((3, f"{self._cut:,} cut off"))
        if self._starting and self._ready:
            parts.append((3, f"{self._live} of {self._live + self._starting} workers ready"))
        elif self._starting:
            workers = "1 worker" if self._starting == 1 else f"{self._starting} workers"
            parts.append((3, f"starting {workers} for {duration(seconds)}"))
            parts.append((5, "a large model takes minutes"))
        if (left := self._seconds_left()) is not None:
            parts.append((2, f"{'at most' if self._time_left.is_bound else 'about'} {duration(left)} left"))
        while width and len(parts) > 1 and len(_joined(parts)) > width:
            parts.remove(max(parts))
        return _joined(parts)[:width]

    def _count_time(self) -> None:
        now = self._clock()
        if self._ready:
            self._time_left.passed(self._live * (now - self._counted_at))
        self._counted_at = now

    def _seconds_left(self) -> float | None:
        self._count_time()
        work = self._reading.values()
        return self._time_left.seconds(self._documents - self._done, self._bytes_left, work, self._live)

    def _tell(self) -> None:
        if self._terminal:
            self._write("\r\x1b[2K" + self.line(self._columns() - 1))  # in the last column the cursor may wrap
        else:
            self._write(time.strftime("%H:%M:%S ") + self.line() + "\n")
        self._shown = True

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except OSError:
            return 80

    def _write(self, text: str) -> None:
        """A terminal that was closed, or a pipe that nobody reads, must not cost the job."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            return


def _joined(parts: list[tuple[int, str]]) -> str:
    return " · ".join(text for _, text in parts)


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
