"""--workers auto: the number of workers follows the cluster while a job runs. Knows nothing of Ray."""

from __future__ import annotations

import time
from collections.abc import Callable

# A look costs the driver a call to the head node, 1 to 2 ms.
LOOK_EVERY = 5.0


class ClusterSize:
    """Looks how many workers the cluster holds, every few seconds and whenever a worker is lost, and passes it on.

    workers: at the start. room: the number that the cluster holds now; of none, one is still wanted, so that the job
    waits for a node as long as for any start. Never more than there is room for: a worker that Ray cannot place would
    make an autoscaler start nodes that nobody asked for.
    """

    def __init__(
        self, workers: int, room: Callable[[], int], resize: Callable[[int], None], log: Callable[[str], None],
        *, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._workers = workers
        self._room, self._resize, self._log, self._clock = room, resize, log, clock
        self._next_look = clock() + LOOK_EVERY

    def worker_lost(self) -> None:
        """Look at the next tick: perhaps its node is gone, and it must not be replaced."""
        self._next_look = self._clock()

    def tick(self) -> None:
        """Look, if it is time to."""
        now = self._clock()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_EVERY
        workers = max(1, self._room())
        if workers != self._workers:
            what = "grown" if workers > self._workers else "shrunk"
            self._log(f"the cluster has {what}: {workers} workers instead of {self._workers}")
            self._workers = workers
            self._resize(workers)
