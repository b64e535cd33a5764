"""The GPU of a worker, opened before there is a torch to open it."""

from __future__ import annotations

import ctypes


def open_gpu() -> None:
    """Make the context of the first GPU that this process sees, which torch takes over when it comes to it.

    That takes about half a second, for which ctypes lets go of Python's lock. Whatever is wrong here torch meets again,
    and says it.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0:
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
