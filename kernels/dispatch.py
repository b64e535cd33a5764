"""How an operation picks its implementation, and how it says which one it picked and why."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from importlib import import_module, metadata
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch

from kernels import device as gpu

P = ParamSpec("P")
T = TypeVar("T")

IMPLS: tuple[str, ...] = ("auto", "reference", "triton", "gluon")
# The next faster implementation: what a choice with a reason passed over.
FASTER = {"reference": "triton", "triton": "gluon"}
# Gluon is experimental and changes: (major, minor) of the Triton releases whose Hopper kernels ran correctly on a GPU.
HOPPER_TRITON_VERSIONS = ((3, 6), (3, 7))


@dataclass(frozen=True)
class Choice:
    """An implementation and, where a faster one was passed over, the reason."""

    impl: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.impl} ({self.reason})" if self.reason else self.impl

    def slower(self, operation: str) -> str:
        """A sentence that says what is slower than it could be, and why; empty where nothing is."""
        return f"{operation} runs on {self.impl}, not {FASTER[self.impl]}: {self.reason}" if self.reason else ""


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
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])  # also of 3.7.0rc1


def triton_unavailable(device: torch.device) -> str:
    """Why Triton kernels cannot run on `device`; empty if they can.

    Under TRITON_INTERPRET=1 they run on the CPU too (slowly, for tests).
    """
    if triton_version() is None:
        return "Triton is not installed: pip install triton"
    if device.type == "cuda":
        capability = gpu.capability(device)
        if capability < (8, 0):
            return f"Triton kernels need compute capability 8.0, got {capability[0]}.{capability[1]}"
        return ""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return f"Triton kernels need a CUDA device, got {device.type}"


def hopper_unavailable(device: torch.device) -> str:
    """Why Gluon kernels for Hopper cannot run on `device`, a GPU; empty if they can."""
    capability = gpu.capability(device)
    if capability[0] != 9:
        return f"the Hopper path needs compute capability 9.x, got {capability[0]}.{capability[1]}"
    version = triton_version() or ()
    if version[:2] not in HOPPER_TRITON_VERSIONS:
        tested = ", ".join(".".join(map(str, pair)) for pair in HOPPER_TRITON_VERSIONS)
        return f"the Hopper path was tested with Triton {tested}, got {'.'.join(map(str, version)) or 'none'}"
    return ""


def choose_portable(op: str, device: torch.device, impl: str = "auto") -> Choice:
    """The implementation of an operation that has a reference and a Triton path, for tensors on `device`.

    Raises ValueError, naming `op`, if `impl` is one that cannot run.
    """
    check_impl(impl)
    if impl == "gluon":
        raise ValueError(f"{op} has no gluon implementation; use impl='triton' or 'reference'")
    missing = triton_unavailable(device)
    if impl == "triton" and missing:
        raise ValueError(f"{op}: impl='triton' cannot run: {missing}")
    if impl != "auto":
        return Choice(impl)
    if device.type != "cuda":
        return Choice("reference")
    return Choice("reference", missing) if missing else Choice("triton")


def implementation(operation: str, choice: Choice) -> ModuleType:
    """The chosen module `kernels/<operation>/<impl>.py`, imported now: without a GPU nobody needs Triton.

    Its functions take the public operation's arguments, validated and by position.
    """
    return import_module(f"kernels.{operation}.{choice.impl}")


def on_its_gpu(operation: Callable[P, T]) -> Callable[P, T]:
    """Run an operation with the GPU of its first argument current, and the one that was current again afterwards.

    Triton launches on the current device, wherever its arguments' memory is. Every public operation that has a Triton
    path carries this; tensors on the CPU, and on the GPU that is current, pass straight through.
    """

    @wraps(operation)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        first = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(first, torch.Tensor) and first.is_cuda and not gpu.is_current(first.device):
            with gpu.current(first.device):
                return operation(*args, **kwargs)
        return operation(*args, **kwargs)

    return run
