"""How long a job will still take, from what its documents have taken so far."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from pipeline.engine.config import SoFar
from pipeline.results.rows import Row


def _sums(length: float, tokens: int, seconds: float) -> np.ndarray:
    """What `_line` needs to know of tokens at this length that took so long, float64 [5]; such sums add up."""
    return np.array([tokens, tokens * length, tokens * length**2, seconds, seconds * length], float)


def _line(sums: np.ndarray) -> tuple[float, float]:
    """(a, b), neither below 0, of the line a + b * length through seconds per token: least squares, by tokens."""
    tokens, first, second, seconds, weighted = sums.tolist()
    if not tokens:
        return 0.0, 0.0
    spread = tokens * second - first**2
    if spread <= 1e-3 * tokens * second:  # all of about one length
        return seconds / tokens, 0.0
    slope = max(0.0, min((tokens * weighted - first * seconds) / spread, seconds / first))
    return (seconds - slope * first) / tokens, slope


class TimeLeft:
    """Prices read and written tokens apart, and counts those of either that are left.

    A read token costs a + b * (its prompt's length): a job begins with its longest documents. A decode step costs
    a + b * (tokens of all prompts that decode together): these share a, and each pays b for its own prompt.

    most: tokens that the outputs of a document can have together; more, if documents bring questions of their own.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        # Of documents that are done and have outputs.
        self._documents = self._outputs = self._bytes = self._read = self._written = 0
        self._decode_seconds = 0.0
        self._prompts, self._steps = np.zeros(5), np.zeros(5)
        self._before = (0, 0.0, 0.0)  # tokens written, their seconds, tokens together: when seconds() last looked
        self._worker_seconds = 0.0

    def add(self, rows: Sequence[Row], size_bytes: int) -> None:
        """Learn from the rows of a document that is done; one without any output tells nothing."""
        wrote = [row.from_engine for row in rows if row.from_engine is not None and row.from_engine.output_tokens]
        if wrote:
            read = sum(each.prompt_tokens - each.prefix_tokens for each in wrote)
            self._documents, self._outputs = self._documents + 1, self._outputs + len(wrote)
            self._bytes, self._read = self._bytes + size_bytes, self._read + read
            written = sum(each.output_tokens for each in wrote)
            self._written, self._most = self._written + written, max(self._most, written)
            self._decode_seconds += sum(each.decode_seconds for each in wrote)
            self._prompts += _sums(read, read, sum(each.prefill_seconds for each in wrote))

    def passed(self, worker_seconds: float) -> None:
        """Time has passed: seconds of all workers together that took documents."""
        self._worker_seconds += worker_seconds

    @property
    def is_bound(self) -> bool:
        """Whether `seconds` can only say how long it takes at most, since no output has ended."""
        return not self._documents

    def seconds(self, documents: int, size_bytes: int, work: Collection[SoFar], workers: int) -> float | None:
        """Seconds that `workers` will take for `documents` of `size_bytes` bytes, which have no rows yet.

        work: how far those are that workers have. None before the first decode step.
        """
        begun = [each for each in work if each.prefill_seconds]  # the others are in the midst of their first prompt
        decoding = [each for each in begun if each.decode_seconds]
        if not (documents and workers and (self._documents or decoding)):
            return None
        size = self._bytes + sum(each.size_bytes for each in begun)
        read = self._read + sum(each.read for each in begun)
        length = read / max(1, size) * size_bytes / documents  # tokens of a prompt that is left
        written = self._written + sum(each.written for each in decoding)
        decode_seconds = self._decode_seconds + sum(each.decode_seconds for each in decoding)
        self._learn_steps(written, decode_seconds, sum(each.read for each in decoding) / workers)
        read_now = sum(each.read for each in work)

        prompts = self._prompts + sum(_sums(each.read, each.read, each.prefill_seconds) for each in begun)
        a, b = _line(prompts)
        spent = prompts[3] + sum((a + b * each.read) * each.read for each in work if not each.prefill_seconds)
        reading = (a + b * length) * max(0.0, length * documents - read_now)

        # A worker's seconds for one of a document's: less than 1 if several decode together (few as a job begins), more
        # if workers wait for texts.
        share = max(0.0, self._worker_seconds - spent) / decode_seconds if decode_seconds else 1.0
        if read_now:  # they do not wait
            share = min(share, workers / max(workers, len(decoding)))
        a, b = _line(self._steps)
        output = self._output(written, len(decoding))
        to_write = documents * output - sum(min(each.written, output) for each in decoding)
        writing = (a * share + b * length) * to_write
        # The last ones wait for the longest: of n outputs that end at random, 1 + 1/2 + ... + 1/n times the mean.
        longest = min(self._most, output * (1 + math.log(max(1, len(decoding)))))
        alone = (a + b * length) * (longest - output) * self._documents / max(1, self._outputs)
        return float((reading + writing) / min(workers, documents) + alone)

    def _learn_steps(self, written: int, seconds: float, together: float) -> None:
        """From what was written since this was last asked, and the seconds of its steps."""
        new = written - self._before[0], seconds - self._before[1]
        if new[0] > 0 <= new[1]:  # less is there where a worker was lost, and what it had in work with it
            self._steps += _sums((self._before[2] + together) / 2, *new)
        self._before = written, seconds, together

    def _output(self, written: int, decoding: int) -> float:
        """Tokens of an output. Those that go on are half-way on average, so each counts as half of one that has ended;
        as long as none has, all are taken to be as long as they may be.
        """
        return min(self._most, written / (self._documents + decoding / 2)) if self._documents else self._most
