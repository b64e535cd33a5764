"""An engine without a model for tests of the pipeline: it reads what to do from the words of the document."""

from __future__ import annotations

import ctypes
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from pipeline.answers.grammar import Grammar
from pipeline.engine.config import Completion, EngineConfig, Request, SharedPrompt

ANSWER = "the answer"


class FakeEngine:
    """Answers every prompt with ANSWER and the number of its tokens. Words in the document change that:

    SLOW takes 0.3 s, CRASH ends the process, RAISE raises, HANG never returns, FREEZE holds the interpreter for ever,
    CUT ends at the limit of tokens, THINK answers behind <think>...</think>, with CUT it ends before </think>, OOM ends
    as out of memory unless its prefill goes in smaller steps, ALWAYSOOM does so in any case. Where a grammar asks for
    something else it answers that, by draws of its own; CUT loses its end.
    """

    def __init__(self, config: EngineConfig) -> None:
        if "NOSTART" in os.environ.get("FAKE_ENGINE", ""):
            raise RuntimeError("the fake engine does not start")
        self.max_context = config.max_context or 4096
        self._tokenizer = Tokenizer.from_file(str(Path(config.model) / "tokenizer.json"))
        self._answer = self._tokenizer.encode(ANSWER).ids
        self._waiting: list[Request] = []
        self._prefix: dict[str, int] = {}  # tokens that were read for another request

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    @property
    def arena_use(self) -> tuple[int, int]:
        return sum(len(request.prompt_ids) for request in self._waiting), 4 * self.max_context

    @property
    def so_far(self) -> dict[str, Any]:
        return {}

    def add_shared(self, shared: SharedPrompt) -> None:
        """The first of the requests reads the prefix."""
        for number, request in enumerate(shared.requests):
            prompt = [*map(int, shared.prefix_ids), *map(int, request.prompt_ids)]
            self._prefix[request.request_id] = len(shared.prefix_ids) if number else 0
            self.add(replace(request, prompt_ids=prompt))

    def add(self, request: Request) -> None:
        self._waiting.append(request)

    def abort(self, request_id: str) -> bool:
        before = len(self._waiting)
        self._waiting = [request for request in self._waiting if request.request_id != request_id]
        return len(self._waiting) < before

    def describe(self) -> dict[str, Any]:
        return {"device": "cpu", "gpu": "", "precision": "fp32"}

    def close(self) -> None:
        self._waiting = []

    def step(self) -> list[Completion]:
        request = self._waiting[0]
        text = self._tokenizer.decode(list(request.prompt_ids))
        if "SLOW" in text:
            time.sleep(0.3)
        if "CRASH" in text:
            time.sleep(0.1)  # so that neighbours are in the worker when it ends
            os._exit(1)
        if "RAISE" in text:
            raise RuntimeError("the fake engine is broken")
        if "HANG" in text:
            time.sleep(3600)
        if "FREEZE" in text:
            ctypes.PyDLL(None).sleep(3600)
        if "ALWAYSOOM" in text or ("OOM" in text and request.chunk_tokens is None):
            return [self._completion(request, status="oom", error="out of fake memory")]
        ids = self._answer
        if "THINK" in text:
            thought = "<think>a plan" if "CUT" in text else f"<think>a plan</think>\n\n{ANSWER}"
            ids = self._tokenizer.encode(thought).ids
        if request.grammar is not None:
            ids = drawn(request.grammar, len(request.prompt_ids))
            ids = ids[: len(ids) // 2] if "CUT" in text else ids
        answer = {"token_ids": ids, "output_tokens": len(ids)}
        return [self._completion(request, **answer, finish_reason="length" if "CUT" in text else "stop")]

    def _completion(self, request: Request, status: str = "ok", **values: Any) -> Completion:
        self._waiting.remove(request)
        about = {
            "attention": "dense",
            "attention_reason": "",
            "density": 1.0,
            "kernel": "fake",
            "finish_reason": "stop",
            "time_to_first_token": 0.01,
            "prefix_tokens": self._prefix.get(request.request_id, 0),
        }
        return Completion(request.request_id, status, prompt_tokens=len(request.prompt_ids), **(about | values))  # type: ignore[arg-type]


def drawn(grammar: Grammar, seed: int) -> list[int]:
    """Tokens that follow a grammar, whose outputs must come to an end by themselves."""
    matcher, draws, ids = grammar.matcher(), random.Random(seed), []
    while not matcher.done:
        bits = np.frombuffer(matcher.raw.compute_logit_bias(), np.uint8)
        ids.append(draws.choice(np.flatnonzero(bits).tolist()))
        matcher.take(ids[-1])
    return ids
