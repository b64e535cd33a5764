"""How long a job will still take, from what its documents have taken so far."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pipeline.results.rows import Row


class TimeLeft:
    """What tokens have cost, read and written ones apart: a written one takes as long as tens to hundreds of read ones.

    A read token costs what rows say (prefill_seconds: an engine does nothing else in them); all other time of workers
    is that of written tokens, waiting included, as in a dry run's estimate.
    """

    def __init__(self) -> None:
        # Of documents that are done and have outputs. decode_seconds: of each, of its output that took longest.
        self._documents = self._bytes = self._read = self._written = 0
        self._prefill_seconds = self._decode_seconds = 0.0
        self._worker_seconds = 0.0

    def add(self, rows: Sequence[Row], size_bytes: int) -> None:
        """Learn from the rows of a document that is done; one without any output tells nothing."""
        wrote = [row.from_engine for row in rows if row.from_engine is not None and row.from_engine.output_tokens]
        if wrote:
            self._documents += 1
            self._bytes += size_bytes
            self._read += sum(each.prompt_tokens - each.prefix_tokens for each in wrote)
            self._written += sum(each.output_tokens for each in wrote)
            self._prefill_seconds += sum(each.prefill_seconds for each in wrote)
            self._decode_seconds += max(each.decode_seconds for each in wrote)

    def passed(self, worker_seconds: float) -> None:
        """Time has passed: seconds of all workers together that took documents."""
        self._worker_seconds += worker_seconds

    def seconds(
        self, documents: int, size_bytes: int, held: int, done: Collection[tuple[int, int]], workers: int
    ) -> float | None:
        """Seconds that `workers` will take for `documents` of `size_bytes` bytes, which have no rows yet.

        held: how many of them workers have. done: of these, (read, written) tokens so far, where that is known.
        None as long as fewer documents are done than workers hold: the first to end are those with short outputs.
        """
        if not self._documents or self._documents < held or not workers:
            return None
        read, written = (sum(tokens) for tokens in zip(*done, strict=True)) if done else (0, 0)
        output = self._written / self._documents
        to_read = max(0.0, size_bytes * self._read / max(1, self._bytes) - read)
        to_write = documents * output - sum(min(tokens, output) for _, tokens in done)
        reading = self._prefill_seconds / max(1, self._read)
        writing = max(0.0, self._worker_seconds - reading * (self._read + read)) / (self._written + written)
        together = (to_read * reading + to_write * writing) / min(workers, documents)
        # However few are left: none ends before its own output is written.
        least = min(tokens for _, tokens in done) if len(done) == documents else 0
        alone = self._decode_seconds / self._documents * (1 - min(1.0, least / output))
        return max(together, alone)
