"""What a worker on a GPU can have done while Python imports: it takes seconds, and none of Python's lock."""

from __future__ import annotations

import contextlib
import ctypes


def warm_up() -> None:
    """Open the GPU, and have Triton read itself. Whatever is wrong here is met again, and said, when it is needed."""
    open_gpu()
    key_compiler()


def open_gpu() -> None:
    """Make the context of the first GPU that this process sees, which torch takes over when it comes to it."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0:
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def key_compiler() -> None:
    """Have Triton make the part of its cache's keys that stands for itself: a hash over its 400 MB of files.

    It keeps that for as long as the process lives. Triton does not import torch, so no import waits for another here.
    """
    with contextlib.suppress(ImportError):
        from triton.runtime.cache import triton_key

        triton_key()
