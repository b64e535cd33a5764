"""How long a test waits for what may be slow without being wrong: on a loaded or slow machine, longer."""

from __future__ import annotations

import os
import time

# At most so many times longer: what hangs must end.
MOST = 10.0
# How long `_work` takes on one idle core of the machine on which the time-outs were chosen.
USUAL_SECONDS = 0.012


def patient(seconds: float) -> float:
    """`seconds` times how much slower this machine is now than an idle one of the usual speed, from 1 to 10.

    The environment variable STEMLINE_TEST_PATIENCE is taken instead of what is measured, whatever it is.
    """
    if told := os.environ.get("STEMLINE_TEST_PATIENCE"):
        return seconds * float(told)
    return seconds * factor(waiting=os.getloadavg()[0] / (os.cpu_count() or 1), work_seconds=_work())


def factor(waiting: float, work_seconds: float) -> float:
    """waiting: processes that want to run, for each core. work_seconds: what `_work` takes now."""
    return min(MOST, max(1.0, waiting, work_seconds / USUAL_SECONDS))


def _work() -> float:
    """Seconds that a fixed piece of work takes."""
    begun = time.perf_counter()
    sum(number * number for number in range(200_000))
    return time.perf_counter() - begun
