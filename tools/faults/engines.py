"""Real engines with a fault: they end their process, run out of memory or hang at a chosen document, "victim".

A file beside the model remembers that a fault has happened already, so a model folder serves one try.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.engine import Engine
from pipeline.engine.config import Completion, SharedPrompt
from pipeline.prompts.tokens import Tokens
from pipeline.workers.work import document_of
from tools.faults.processes import LOG

VICTIM = "victim"
BAD_WORD = "BADTOKEN"
# Prefill chunks that ShortOfMemory has memory for.
ENOUGH = 128


class CountingEngine(Engine):
    """The engine; every document that it takes becomes a line in the file that $STEMLINE_FAULTS_LOG names, if any."""

    def add_shared(self, shared: SharedPrompt) -> None:
        """Note the document, then take it."""
        if log := os.environ.get(LOG):
            with Path(log).open("ab", buffering=0) as file:
                file.write(f"{document_of(shared.requests[0].request_id)}\n".encode())
        super().add_shared(shared)


def is_victim(document: Any) -> bool:
    """Whether a document of the engine is the victim, or a question to it."""
    return document_of(document.request.request_id) == VICTIM


def once(config: Any, name: str) -> bool:
    """True the first time; a file beside the model remembers it."""
    try:
        (Path(config.model) / f"{name}.once").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def die() -> None:
    """As kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


class DiesInPrefill(CountingEngine):
    """Ends after the first of the victim's prefill chunks."""

    def _read_prefix(self, prefix: Any) -> None:
        super()._read_prefix(prefix)
        if any(map(is_victim, prefix.waiting)) and once(self.config, "prefill"):
            die()


class DiesInDecode(CountingEngine):
    """Ends when the victim has some tokens of its output."""

    def _decode_step(self) -> None:
        super()._decode_step()
        if self._victim_writes() and once(self.config, "decode"):
            die()

    def _victim_writes(self) -> bool:
        live = self._live.values()
        return any(len(document.tokens) >= 3 and is_victim(document) for document in live)


class DiesOfVictim(DiesInDecode):
    """Ends each time when the victim has some tokens of its output."""

    def _decode_step(self) -> None:
        CountingEngine._decode_step(self)
        if self._victim_writes():
            die()


class DiesAfterResults(CountingEngine):
    """Ends one step after three documents were handed over, before their rows are written."""

    finished = 0

    def step(self) -> list[Completion]:
        """One step, or the end."""
        if self.finished >= 3 and once(self.config, "results"):
            time.sleep(1.0)  # the results are on their way to the driver
            die()
        done = super().step()
        self.finished += len(done)
        return done


class Hangs(CountingEngine):
    """Never comes back from the victim's prefill."""

    def _read_prefix(self, prefix: Any) -> None:
        if any(map(is_victim, prefix.waiting)):
            time.sleep(3600)
        super()._read_prefix(prefix)


class WaitsForNode(CountingEngine):
    """Works until DOCUMENTS_BEFORE have been taken; then only when an engine has one that was built after file "left".

    The files are beside the model: "joined" holds the worker's process id, and "works-<id>" says that a worker has had
    a document.
    """

    DOCUMENTS_BEFORE = 250

    def __init__(self, config: Any) -> None:
        self._late = (Path(config.model) / "left").exists()
        super().__init__(config)

    def add_shared(self, shared: SharedPrompt) -> None:
        """Take a document; tell the others if this engine is the late one."""
        super().add_shared(shared)
        (Path(self.config.model) / f"works-{os.getpid()}").touch()
        if self._late:
            (Path(self.config.model) / "joined").write_text(str(os.getpid()))

    def step(self) -> list[Completion]:
        """One step, or a short rest."""
        taken = Path(os.environ[LOG]).read_bytes().count(b"\n")
        if taken >= self.DOCUMENTS_BEFORE and not (Path(self.config.model) / "joined").exists():
            time.sleep(0.05)
            return []
        return super().step()


class BadTokenizer(CountingEngine):
    """Comes with a tokenizer that raises on documents with BAD_WORD."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        encode = Tokens.encode_data

        def failing(tokens: Tokens, text: str) -> Any:
            if BAD_WORD in text:
                raise OverflowError("the tokenizer has a fault")
            return encode(tokens, text)

        Tokens.encode_data = failing  # type: ignore[method-assign, assignment]


class ShortOfMemory(CountingEngine):
    """Has memory for prefill chunks of ENOUGH tokens with the victim, and of any length with others.

    The victim's longer chunks run out of it in the middle of the model: on a GPU because there really is none.
    """

    def _read_prefix(self, prefix: Any) -> None:
        asked = prefix.chunk_tokens or self._chunk
        if not any(map(is_victim, prefix.waiting)) or asked <= ENOUGH:
            super()._read_prefix(prefix)
            return
        layers = next(module for module in self._runner.model.modules() if isinstance(module, nn.ModuleList))
        taken: list[torch.Tensor] = []
        hook = layers[len(layers) // 2].register_forward_pre_hook(lambda *call: take_memory(self._device, taken))
        try:
            with memory_bound(self._device):
                super()._read_prefix(prefix)
        finally:
            hook.remove()
            taken.clear()


def take_memory(device: torch.device, taken: list[torch.Tensor]) -> None:
    """Take all that the allocator still has, so that whatever comes next runs out. On a CPU just say so."""
    if device.type != "cuda":
        raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0, device)  # no more from the device
    for size in (2 << 20, 1 << 20, 512):  # nor from what is left over inside the allocator's segments
        try:
            while True:
                taken.append(torch.empty(size, dtype=torch.uint8, device=device))
        except torch.OutOfMemoryError:
            continue


@contextmanager
def memory_bound(device: torch.device) -> Iterator[None]:
    """Whatever bound was set inside is lifted at the end."""
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)
