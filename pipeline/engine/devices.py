"""What devices hold, in bytes: counted, asked for, divided and given back; and what an exception says of them."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.engine.config import EngineError

GIB = 2**30


def tensor_bytes(tensors: Iterable[Tensor], device: torch.device | None = None) -> int:
    """Bytes of tensors, all or those on a device; those of one address, as tied weights are, once."""
    distinct = {tensor.data_ptr() or id(tensor): tensor for tensor in tensors}
    return sum(tensor.nbytes for tensor in distinct.values() if device is None or tensor.device == device)


def weight_bytes(model: nn.Module, device: torch.device | None = None) -> int:
    """Bytes of parameters and buffers, all or those on a device; tied ones once."""
    return tensor_bytes((*model.parameters(), *model.buffers()), device)


def device_memory(device: torch.device) -> tuple[int, int]:
    """(available, total) bytes of a GPU, or of the host."""
    return torch.cuda.mem_get_info(device) if device.type == "cuda" else host_memory()


def host_memory() -> tuple[int, int]:
    """(available, total) bytes of the host, or of its container where that is smaller."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    total = available = pages * size
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        bound = int(limit.read_text())
        total, available = min(total, bound), min(available, max(0, bound - int(used.read_text())))
    return available, total


def shares(devices: Sequence[torch.device], reserve: int, total: int | None = None) -> list[int]:
    """Bytes for weights and KV of each stage of a model, beside `reserve` bytes on each device.

    total: memory of each device; None asks for what is free there. Stages on one device share what it has.
    """
    stages = Counter(devices)
    # Each device is asked once: what is free changes from moment to moment, and its stages are to share it equally.
    each = {
        device: ((device_memory(device)[0] if total is None else total) - reserve) // count
        for device, count in stages.items()
    }
    return [each[device] for device in devices]


def release_memory(*devices: torch.device) -> None:
    """Give back what nothing refers to any more; fused modules refer to themselves, hence the collection."""
    gc.collect()
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that device or host memory ran out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def check_devices(devices: Sequence[torch.device], error: BaseException) -> None:
    """Wait for the devices after `error`. Raises EngineError if one is lost to this process."""
    for device in devices:
        if device.type == "cuda":
            try:
                torch.cuda.synchronize(device)
            except RuntimeError as lost:
                raise EngineError(f"the GPU is lost to this process: {lost}") from error
