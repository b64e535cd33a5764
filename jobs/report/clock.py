"""When a job worked: pauses between its runs cut out, and how fast it was over the time that is left."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Nobody at work for longer than this is a pause: the job was stopped, and later went on.
PAUSE_SECONDS = 60.0
FEWEST_STEPS, MOST_STEPS = 4, 60


@dataclass(frozen=True)
class Session:
    """A stretch of work: seconds since 1970 of its begin and end, and seconds worked before it."""

    begin: float
    end: float
    before: float


def sessions(starts: np.ndarray, ends: np.ndarray) -> list[Session]:
    """The stretches of work of documents that were in a worker from `starts` to `ends` (seconds since 1970)."""
    found: list[Session] = []
    if not len(starts):
        return found
    order = np.argsort(starts, kind="stable")
    starts, until = starts[order], np.maximum.accumulate(ends[order])
    firsts = np.flatnonzero(np.r_[True, starts[1:] - until[:-1] > PAUSE_SECONDS])
    lasts = np.r_[firsts[1:], len(starts)] - 1
    for first, last in zip(firsts, lasts, strict=True):
        before = found[-1].before + found[-1].end - found[-1].begin if found else 0.0
        found.append(Session(float(starts[first]), float(until[last]), before))
    return found


def worked_seconds(found: list[Session]) -> float:
    """Seconds of all stretches together."""
    return found[-1].before + found[-1].end - found[-1].begin if found else 0.0


def elapsed(found: list[Session], times: np.ndarray) -> np.ndarray:
    """Seconds worked until `times`, each of which lies in a session."""
    begins = np.array([session.begin for session in found])
    offsets = np.array([session.before - session.begin for session in found])
    return times + offsets[np.searchsorted(begins, times, side="right") - 1]


def rate_over_time(begin: np.ndarray, end: np.ndarray, amounts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(middles [steps] in seconds, rates [steps] a second) of amounts that each came evenly between begin and end."""
    total = float(end.max()) if len(end) else 0.0
    if total <= 0:
        return np.empty(0), np.empty(0)
    steps = int(np.clip(len(end) // 2, FEWEST_STEPS, MOST_STEPS))
    edges = np.linspace(0.0, total, steps + 1)
    rate = amounts / np.maximum(end - begin, 1e-6)
    times = np.concatenate([begin, begin + np.maximum(end - begin, 1e-6)])
    order = np.argsort(times, kind="stable")
    times, slope = times[order], np.cumsum(np.concatenate([rate, -rate])[order])
    amount = np.r_[0.0, np.cumsum(slope[:-1] * np.diff(times))]
    return (edges[1:] + edges[:-1]) / 2, np.diff(np.interp(edges, times, amount)) / np.diff(edges)
