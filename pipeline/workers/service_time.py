"""How far workers are with the documents that they hold, guessed from how long a document has taken so far.

Results say little of that: a worker's documents often end together. All figures are kept up to date as sums, so that
none costs more with more workers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Shift:
    """A worker's time. started: when it began to take documents. since: from when on it has worked at those that it
    holds now, since the latest of its results say; None while it holds none.
    """

    started: float = 0.0
    since: float | None = None


class ServiceTime:
    """Seconds that a document takes a worker, over all that ended, and what that says of those that have not."""

    def __init__(self) -> None:
        self._ended = 0
        self._working = 0  # workers that hold documents
        self._since = 0.0  # sum over these
        self._workers = 0
        self._started = 0.0  # sum over workers
        self._gone = 0.0  # seconds of workers that left

    def joins(self, shift: Shift, now: float) -> None:
        """A worker takes documents from now on."""
        shift.started = now
        self._workers += 1
        self._started += now

    def gets(self, shift: Shift, now: float) -> None:
        """A worker gets a document."""
        if shift.since is None:
            shift.since = now
            self._working += 1
            self._since += now

    def ends(self, shift: Shift, now: float, held: int) -> None:
        """A document has ended in a worker, which holds `held` others."""
        self._ended += 1
        self._rests(shift)
        if held:
            self.gets(shift, now)

    def leaves(self, shift: Shift, now: float) -> None:
        """A worker that had joined is gone."""
        self._rests(shift)
        self._workers -= 1
        self._started -= shift.started
        self._gone += now - shift.started

    def _rests(self, shift: Shift) -> None:
        if shift.since is not None:
            self._working -= 1
            self._since -= shift.since
            shift.since = None

    def done(self, now: float, held: int) -> float:
        """Documents' worth of work that is done at the `held` ones that workers have; never more than those."""
        return self._documents(self._working * now - self._since, now, held)

    def done_by(self, shift: Shift, now: float, held: int) -> float:
        """The same of one worker, which holds `held`."""
        return 0.0 if shift.since is None else self._documents(now - shift.since, now, held)

    def _documents(self, seconds: float, now: float, held: int) -> float:
        worked = self._workers * now - self._started + self._gone
        return min(float(held), seconds * self._ended / worked) if worked > 0 else 0.0
