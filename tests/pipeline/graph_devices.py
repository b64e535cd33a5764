"""What captures use of torch.cuda, played without a GPU: streams, pools, graphs, and their rules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch


class GraphDevices:
    """`log` has what was done, in order; `current` the current streams by device; `device` the current one.

    directed: the pool that the first device's allocations go to, None outside of captures. used: of each capture.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.current: dict[Any, Stream] = {}
        self.device: Any = None
        self.directed: Any = None
        self.main: Stream | None = None
        self.forked: set[Stream] = set()
        self.pools = 0
        self.used: list[Any] = []
        for name, value in {
            "Stream": lambda device: Stream(self, device, "side"),
            "stream": self.stream,
            "current_stream": self.current_stream,
            "set_device": lambda device: setattr(self, "device", device),
            "device": contextlib.nullcontext,
            "MemPool": lambda: "its pool",
            "use_mem_pool": self.use_mem_pool,
            "graph_pool_handle": self.new_pool,
            "synchronize": lambda *_: None,
            "CUDAGraph": lambda: Graph(self),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_pool, raising=False)

    def new_pool(self) -> int:
        self.pools += 1
        return self.pools

    def end_pool(self, device: Any, pool: Any) -> None:
        if self.directed != pool:
            raise RuntimeError("not currently recording to this pool")
        self.directed = None

    def current_stream(self, device: Any) -> Stream:
        return self.current.setdefault(device, Stream(self, device, "default"))

    @contextlib.contextmanager
    def stream(self, wanted: Stream) -> Iterator[None]:
        before, device = self.current_stream(wanted.device), self.device
        self.current[wanted.device] = wanted
        self.device = wanted.device
        try:
            yield
        finally:
            self.current[wanted.device] = before
            self.device = device

    @contextlib.contextmanager
    def use_mem_pool(self, pool: str, device: Any) -> Iterator[None]:
        self.log.append(f"{device} takes from {pool}")
        try:
            yield
        finally:
            self.log.append(f"{device} takes from anywhere")


class Stream:
    """Work of one device, in order."""

    def __init__(self, devices: GraphDevices, device: Any, name: str) -> None:
        self.devices, self.device, self.name = devices, device, f"{name} {device}"

    def wait_stream(self, other: Stream) -> None:
        self.devices.log.append(f"{self.name} waits for {other.name}")
        if other is self.devices.main:
            self.devices.forked.add(self)
        elif self is self.devices.main:
            self.devices.forked.discard(other)


class Graph:
    """A capture ends on the stream and device where it began, all that it forked joined; else it fails half-way."""

    def __init__(self, devices: GraphDevices) -> None:
        self.devices = devices

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        devices = self.devices
        if devices.directed is not None:
            raise RuntimeError(f"already recording to pool {devices.directed}")
        devices.used.append(pool)
        devices.directed, devices.main = pool, devices.current_stream(devices.device)
        devices.log.append("begin")

    def capture_end(self) -> None:
        devices = self.devices
        if devices.current_stream(devices.device) is not devices.main:
            raise RuntimeError("a capture must end on the stream where it began")
        devices.main = None
        if devices.forked:
            devices.forked.clear()
            raise RuntimeError("unjoined work")
        devices.directed = None
        devices.log.append("end")

    def replay(self) -> None:
        self.devices.log.append("replay")
