"""Installed versions of what decides speed and results, without importing it."""

from __future__ import annotations

import platform
from importlib import metadata

ENGINE = ("torch", "transformers", "triton")
JOB = ("stemline", *ENGINE, "ray", "pyarrow", "llguidance")


def versions(packages: tuple[str, ...] = ENGINE) -> dict[str, str]:
    """By package, its version."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def job_versions() -> dict[str, str]:
    """Of Python and of what a job's driver runs with, which are its workers' where all have one environment."""
    found = {"python": platform.python_version(), **versions(JOB)}
    if found["stemline"] == "not installed":  # it runs from a checkout, or a copy of one
        del found["stemline"]
    return found
