"""Compile kernels for a GPU that is not there, and read what ptxas says of them.

    with offline.compiling((9, 0)) as compiled:
        launch_attention(q, k, v)            # the product's own launch code, on CPU or meta tensors
    for kernel in compiled:
        print(offline.report(kernel))

Inside the block every Triton or Gluon launch compiles and does not run; outputs stay as allocated. Launch
code takes capability and multiprocessor count from `kernels.device`. Not possible under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels import device as device_module

# What ptxas said, among a kernel's metadata.
LOG = "ptxas_log"
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


class _AbsentGpu:
    """Just enough of a Triton driver to compile."""

    def __init__(self, capability: tuple[int, int]):
        self.arch = capability[0] * 10 + capability[1]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> str:
        return f"absent sm_{self.arch}"  # keys Triton's in-process cache: never mixes with a real device

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def is_active() -> bool:
        return True


@contextmanager
def compiling(capability: tuple[int, int] = (9, 0), multiprocessors: int = 132) -> Iterator[list[Any]]:
    """Every launch inside compiles for `capability`; yields the list that collects the compiled kernels."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    def make_cubin(self: CUDABackend, source: str, metadata: dict[str, Any], *options: Any) -> bytes:
        with redirect_stdout(io.StringIO()) as said, knobs.nvidia.scope():
            knobs.nvidia.dump_ptxas_log = True
            cubin = assemble(self, source, metadata, *options)
        metadata[LOG] = said.getvalue()  # Triton keeps it with the kernel, in its cache too
        return cubin

    assemble = CUDABackend.make_cubin
    previous = driver._active
    patched = (device_module.capability, device_module.multiprocessors)
    driver.set_active(_AbsentGpu(capability))
    JITFunction.run = compile_only
    CUDABackend.make_cubin = make_cubin
    device_module.capability = lambda device: capability
    device_module.multiprocessors = lambda device: multiprocessors
    try:
        yield compiled
    finally:
        driver._active = previous
        JITFunction.run = run
        CUDABackend.make_cubin = assemble
        device_module.capability, device_module.multiprocessors = patched


@dataclass(frozen=True)
class Report:
    """ptxas -v on one kernel. `spills` = bytes stored plus bytes loaded; `warnings` holds e.g. C7512 (wgmma
    serialised), which costs more than any spill."""

    name: str
    registers: int
    spills: int
    shared: int
    warnings: tuple[str, ...]
    log: str

    def __str__(self) -> str:
        text = f"{self.name}: {self.registers} registers, {self.spills} B spilled, {self.shared} B shared"
        return text + "".join(f"\n  {line}" for line in self.warnings)


def report(kernel: Any) -> Report:
    """Registers, spills and warnings of a kernel."""
    log = getattr(kernel.metadata, LOG, None) or _assembled(kernel.asm["ptx"])
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", log))
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    warnings = tuple(line for line in log.splitlines() if "warning" in line.lower() or "C75" in line)
    return Report(kernel.metadata.name, registers, spills, kernel.metadata.shared, warnings, log)


def _assembled(ptx: str) -> str:
    """What ptxas says of a kernel that Triton's cache holds from elsewhere."""
    target = re.search(r"^\.target (sm_\w+)", ptx, re.M)
    assert target, "no .target in the PTX"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        output = source.with_suffix(".o")
        command = [str(PTXAS), "-v", f"--gpu-name={target[1]}", str(source), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def compile_reports(launch: Callable[[], object], capability: tuple[int, int]) -> list[Report]:
    """Compile everything that `launch()` launches for `capability`, one report per distinct kernel.

    Raises AssertionError if nothing was launched (a launch path that silently fell back elsewhere)."""
    with compiling(capability) as compiled:
        launch()
    assert compiled, "nothing was launched: did the call fall back to another implementation?"
    distinct = {kernel.hash: kernel for kernel in compiled}
    return [report(kernel) for kernel in distinct.values()]
