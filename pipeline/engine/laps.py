"""Where the seconds of a start go."""

from __future__ import annotations

import time


class Laps:
    """Seconds of things that are done one after the other, by name, in their order. The clock runs from now on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at = time.perf_counter()

    def end(self, name: str) -> None:
        """What was done since the last end is `name`; what comes twice is added up."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._at
        self._at = now
