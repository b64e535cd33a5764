"""Kernels that compile side by side, ahead of their first launch; for a GPU that is not there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from patience import patient
from triton.runtime.jit import JITFunction

from kernels.compile_ahead import compiling_ahead, counting
from tests.kernels import offline


@triton.jit
def fill_kernel(x, value, WIDTH: tl.constexpr):
    tl.store(x + tl.arange(0, WIDTH), value)


@triton.jit
def broken_kernel(x):
    tl.store(x, tl.no_such_function(x))


def fill(*widths: int) -> torch.Tensor:
    x = torch.zeros(64)
    for width in widths:
        fill_kernel[(1,)](x, 2.5, WIDTH=width)
    return x


@pytest.fixture(autouse=True)
def empty_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    fill_kernel.device_caches.clear()
    yield
    fill_kernel.device_caches.clear()  # they hold what a test may have put in place of the compiler


def test_kernels_compile_together_and_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    together, names = threading.Barrier(3, timeout=patient(60)), []
    compile_one = triton.compiler.compile

    def compiled(*args: Any, **kwargs: Any) -> Any:
        together.wait()  # for the others: breaks if they come one after the other
        names.append(threading.current_thread().name)
        return compile_one(*args, **kwargs)

    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(3))
    monkeypatch.setattr(triton.compiler, "compile", compiled)
    run = JITFunction.run
    with offline.compiling(), counting() as first, compiling_ahead():
        assert fill(16, 32, 64).eq(0).all()
        fill(16)  # is on its way already
    assert JITFunction.run is run
    assert (first.made, first.found) == (3, 0)
    assert all(name.startswith("compiling") for name in names)
    with offline.compiling(), counting() as second:
        fill(16, 32, 64)
    assert (second.made, second.found) == (0, 0), "they are there"


def test_kernels_of_an_earlier_process_are_found() -> None:
    with offline.compiling(), counting() as first:
        fill(16)
    fill_kernel.device_caches.clear()
    with offline.compiling(), counting() as second:
        fill(16)
    assert (first.made, first.found, second.made, second.found) == (1, 0, 0, 1)


def test_a_kernel_that_does_not_compile_says_so_when_it_is_launched() -> None:
    with offline.compiling():
        with compiling_ahead():
            broken_kernel[(1,)](torch.zeros(1))
        with pytest.raises(Exception, match="no_such_function"):
            broken_kernel[(1,)](torch.zeros(1)).asm  # noqa: B018 - what a launch asks for


def test_other_threads_launch_as_ever() -> None:
    asked: list[bool] = []
    run = JITFunction.run
    try:
        JITFunction.run = lambda self, *args, grid, warmup, **kwargs: asked.append(warmup)
        with compiling_ahead():
            fill(16)
            other = threading.Thread(target=fill, args=(16,))
            other.start()
            other.join()
    finally:
        JITFunction.run = run
    assert asked == [True, False]
