"""Real engines that end their process at a chosen moment, once; and a tokenizer that fails on one document.

A file beside the model remembers that a fault has happened already.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.engine import Engine
from pipeline.engine.config import Completion
from pipeline.tokens import Tokens

VICTIM = "victim"


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


class DiesInPrefill(Engine):
    """Ends after the first of the victim's prefill chunks."""

    def _prefill_step(self, document: Any) -> None:
        super()._prefill_step(document)
        if document.request.request_id == VICTIM and not document.launched and once(self.config, "prefill"):
            die()


class DiesInDecode(Engine):
    """Ends when the victim has some tokens of its output."""

    def _decode_step(self) -> None:
        super()._decode_step()
        if any(
            len(document.tokens) >= 3 and document.request.request_id == VICTIM for document in self._live.values()
        ) and once(self.config, "decode"):
            die()


class DiesAfterResults(Engine):
    """Ends one step after three documents were handed over, before their rows are written."""

    finished = 0

    def step(self) -> list[Completion]:
        if self.finished >= 3 and once(self.config, "results"):
            time.sleep(1.0)  # the results are on their way to the driver
            die()
        done = super().step()
        self.finished += len(done)
        return done


class BadTokenizer(Engine):
    """Comes with a tokenizer that raises on documents with the word BADTOKEN."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        encode = Tokens.encode_data

        def failing(tokens: Tokens, text: str) -> Any:
            if "BADTOKEN" in text:
                raise OverflowError("the tokenizer has a fault")
            return encode(tokens, text)

        Tokens.encode_data = failing  # type: ignore[method-assign]


class ShortOfMemory(Engine):
    """Has memory for prefill chunks of 128 tokens with the victim, and of any length with others."""

    def _prefill_step(self, document: Any) -> None:
        if document.request.request_id == VICTIM and (document.request.chunk_tokens or 1 << 30) > 128:
            self._fail([document], torch.OutOfMemoryError("CUDA out of memory (simulated)"))
            return
        super()._prefill_step(document)
