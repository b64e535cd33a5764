"""What a worker on a GPU can have done while Python imports: it takes seconds, and none of Python's lock."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from pathlib import Path

# Torch's own libraries, each after those it needs: between them, libraries of what is imported meanwhile have a turn.
LIBRARIES = ("libc10.so", "libtorch_cpu.so", "libc10_cuda.so", "libtorch_cuda.so", "libtorch_python.so")


def warm_up() -> None:
    """Load torch's libraries, open the GPU, have Triton read itself.

    Whatever is wrong here is met again, and said, when it is needed.
    """
    load_libraries()
    open_gpu()
    key_compiler()


def load_libraries() -> None:
    """Load the libraries of torch, gigabytes, that its import will need."""
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin is not None:
        for name in LIBRARIES:
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(Path(torch.origin).parent / "lib" / name))


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
