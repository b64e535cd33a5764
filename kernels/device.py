"""What the kernels ask of a GPU. Call these through the module (`device.capability(...)`): the compile-only
tests replace them to compile for a GPU that is not there."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache

import torch


@lru_cache(maxsize=16)
def capability(device: torch.device) -> tuple[int, int]:
    """CUDA compute capability, e.g. (9, 0). (0, 0) on a CPU, where kernels run under Triton's interpreter."""
    if device.type != "cuda":
        return (0, 0)
    major, minor = torch.cuda.get_device_capability(device)
    return (major, minor)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the GPU: the grid of a persistent kernel. 4 on a CPU (interpreter)."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def is_current(device: torch.device) -> bool:
    """Whether `device`, a GPU, is the one on which Triton launches now."""
    return device.index == torch.cuda.current_device()


def current_device() -> torch.device | None:
    """The GPU on which Triton launches now; None where no GPU is in use."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_initialized() else None


def current(device: torch.device) -> AbstractContextManager[None]:
    """Inside, Triton launches on `device`, a GPU."""
    return torch.cuda.device(device)
