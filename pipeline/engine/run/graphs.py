"""CUDA graphs of work that one device does, or several together."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

import torch


class Graphs:
    """Captures and replays work on `devices`: it begins and ends on the first one.

    The memory that captured work takes on each of them is kept until this object and its graphs are gone.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = tuple(devices)
        self._streams = [torch.cuda.Stream(device) for device in devices]
        self._pool = torch.cuda.graph_pool_handle()
        # A capture directs allocations on the first device alone to its pool.
        self._others: list[tuple[torch.cuda.Stream, torch.cuda.MemPool]] = []
        for stream in self._streams[1:]:
            with torch.cuda.device(stream.device):
                self._others.append((stream, torch.cuda.MemPool()))

    def capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """The graph of what `work` launches, which must have run before. Nothing runs now.

        Raises RuntimeError for work that cannot be captured, and what `work` raises; others can be captured afterwards.

        torch.cuda.graph() would also empty the allocator's cache at every capture, and knows one device. Garbage
        collection waits: it could destroy CUDA objects of others in the midst of the capture.
        """
        graph = torch.cuda.CUDAGraph()
        self._synchronize()
        collecting = gc.isenabled()
        gc.disable()
        try:
            with ExitStack() as current:
                for stream in reversed(self._streams):
                    current.enter_context(torch.cuda.stream(stream))
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    self._capture(work)
                    graph.capture_end()
                except BaseException:
                    self._abandon(graph)
                    raise
        except RuntimeError:
            self._synchronize()
            raise
        finally:
            if collecting:
                gc.enable()
        for stream in self._streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)
        return graph

    def _capture(self, work: Callable[[], None]) -> None:
        main = self._streams[0]
        with ExitStack() as pools:
            for stream, pool in self._others:
                stream.wait_stream(main)  # from here on it belongs to the capture
                pools.enter_context(torch.cuda.use_mem_pool(pool, stream.device))
            work()
            for stream, _ in self._others:
                main.wait_stream(stream)

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture whose work failed. What else fails now follows from that and is not told."""
        main = self._streams[0]
        torch.cuda.set_device(main.device)
        with suppress(RuntimeError):
            for stream, _ in self._others:
                main.wait_stream(stream)
        try:
            graph.capture_end()
        except RuntimeError:
            # torch gives up before it directs the device's allocations away from the pool again.
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(main.device.index, self._pool)
        # A pool is gone with its last graph, and this may have been the only one.
        self._pool = torch.cuda.graph_pool_handle()

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """Launch a graph, behind what the current streams of all devices hold and before what they get next."""
        main, *others = (torch.cuda.current_stream(device) for device in self._devices)
        for stream in others:
            main.wait_stream(stream)
        graph.replay()
        for stream in others:
            stream.wait_stream(main)

    def _synchronize(self) -> None:
        for device in self._devices:
            torch.cuda.synchronize(device)
