"""The environment of processes that tests start: what a user's shell has, nothing of the tests' own Ray cluster."""

from __future__ import annotations

import os

# Ray has its workers yield to all else (15). Beside tests that keep every core busy they would hardly run at all.
NICENESS = {"RAY_worker_niceness": "0"}


def ray_names() -> list[str]:
    """What would lead a process to another cluster, or set it up as that."""
    return [name for name in os.environ if name.startswith("RAY_") and name not in NICENESS]


def shell() -> dict[str, str]:
    """The environment without ray_names()."""
    hidden = ray_names()
    return {name: value for name, value in os.environ.items() if name not in hidden} | NICENESS
