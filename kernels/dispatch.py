"""How an operation picks its implementation, and how it says which one it picked and why."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Literal

import torch

Impl = Literal["auto", "reference", "triton", "gluon"]
IMPLS: tuple[str, ...] = ("auto", "reference", "triton", "gluon")


@dataclass(frozen=True)
class Choice:
    """An implementation and, where a faster one was passed over, the reason."""

    impl: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.impl} ({self.reason})" if self.reason else self.impl


def check_impl(impl: str) -> None:
    """Raise ValueError unless `impl` is one of IMPLS."""
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is not known; use one of {', '.join(IMPLS)}")


@lru_cache(maxsize=1)
def triton_version() -> tuple[int, ...] | None:
    """The installed Triton's (major, minor, patch), or None where Triton is missing."""
    try:
        text = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in text.split("+")[0].split(".")[:3])


def triton_unavailable(device: torch.device) -> str:
    """Why Triton kernels cannot run on `device`; empty if they can.

    Under TRITON_INTERPRET=1 they run on the CPU too (slowly, for tests).
    """
    if triton_version() is None:
        return "Triton is not installed: pip install triton"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"Triton kernels need compute capability 8.0, got {capability[0]}.{capability[1]}"
        return ""
    import os

    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return f"Triton kernels need a CUDA device, got {device.type}"
