"""Kernels compiled side by side, before they are needed.

A kernel that is launched for the first time compiles: a second or several, on one core, and the work waits. Code that
knows what it will launch can launch it all inside of `compiling_ahead`, where kernels compile in threads of their own
instead of running. Triton compiles outside of Python's lock, but for its front end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from kernels import device as gpu

# Beyond so many threads they wait for Python's lock.
MOST_THREADS = 16


class Compiled:
    """How many kernels were compiled, and how many of those that were wanted lay in Triton's cache on the disk."""

    def __init__(self) -> None:
        self.made = self.found = 0


@contextmanager
def counting() -> Iterator[Compiled]:
    """Inside, kernels that are launched for the first time in this process are counted."""
    from triton import knobs

    count, before = Compiled(), knobs.compilation.listener

    def listen(*, cache_hit: bool, **about: Any) -> None:
        if cache_hit:
            count.found += 1
        else:
            count.made += 1
        if before is not None:
            before(cache_hit=cache_hit, **about)

    knobs.compilation.listener = listen
    try:
        yield count
    finally:
        knobs.compilation.listener = before


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Inside, what this thread launches compiles in other threads, for the GPU that is current, and does not run.

    Outputs of kernels stay as they were allocated, so nobody may go by them: no index may come from one. Torch's own
    operations run. Behind the block all kernels are compiled and on the GPU. One that failed says why when it is
    launched.
    """
    from triton import AsyncCompileMode
    from triton.runtime.jit import JITFunction

    run, owner = JITFunction.run, threading.get_ident()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=warmup or threading.get_ident() == owner, **kwargs)

    threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    with _Loading(threads) as pool:
        JITFunction.run = compile_only
        try:
            with AsyncCompileMode(pool, ignore_errors=True):
                yield
        finally:
            JITFunction.run = run


class _Loading(Executor):
    """Threads that compile kernels and load them onto the GPU that was current where they were asked for."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, "compiling")

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        place = gpu.current_device()

        def loaded() -> Any:
            kernel = fn(*args, **kwargs)
            if place is not None:
                with gpu.current(place):
                    kernel.run  # noqa: B018 - loads it, and makes the C function that launches it
            return kernel

        return self._threads.submit(loaded)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
