"""Times and memory of the documents, and what an exception in a unit of work means."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch

from pipeline.engine.config import EngineError
from pipeline.engine.document import Document


class Meter:
    """Charges decode time and peak memory to the documents that are in the engine."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._gpus = [device for device in devices if device.type == "cuda"]
        # Since when decode steps have been running that are charged to nobody yet; None outside of decoding.
        self._since: float | None = None

    def decoding(self) -> None:
        """Decode steps run from now on, if they do not already."""
        if self._since is None:
            self._since = time.perf_counter()

    def charge(self, documents: Iterable[Document]) -> None:
        """Add the decode time since the last call to each of the documents that took part."""
        if self._since is not None:
            now = time.perf_counter()
            for document in documents:
                document.decode_seconds += now - self._since
            self._since = now

    def prefilling(self) -> None:
        """Decode steps have ended; what follows is not charged."""
        self._since = None

    def note_peak(self, documents: Iterable[Document], reset: bool = False) -> None:
        """Raise the documents' peak to that of the GPUs together; `reset` starts a new peak for those that come."""
        if not self._gpus:
            return
        peak = sum(torch.cuda.max_memory_allocated(gpu) for gpu in self._gpus)
        for document in documents:
            document.peak_bytes = max(document.peak_bytes, peak)
        if reset:
            for gpu in self._gpus:
                torch.cuda.reset_peak_memory_stats(gpu)


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
