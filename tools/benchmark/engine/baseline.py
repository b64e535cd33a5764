"""Hugging Face generate with sdpa attention, one document at a time: what the engine is measured against."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from pipeline.engine.config import EngineConfig
from pipeline.engine.devices import release_memory
from pipeline.engine.model.loading import load_model

WARM_TOKENS = 2048


@dataclass(frozen=True)
class BaselinePoint:
    """generate() on one prompt. Times in seconds; peak_bytes is 0 on a CPU.

    decode_step_ms: median over the measured decode steps.
    """

    prompt_tokens: int
    first_token_seconds: float
    decode_step_ms: float
    measured_steps: int
    peak_bytes: int

    def document_seconds(self, new_tokens: int) -> float:
        """A document of this length with `new_tokens` of output: first token measured, the rest extrapolated."""
        return self.first_token_seconds + (new_tokens - 1) * self.decode_step_ms / 1000


class Baseline:
    """The model with its own attention, loaded once for all lengths."""

    def __init__(self, config: EngineConfig) -> None:
        model: Any = load_model(config)
        self._model = model
        self._model.set_attn_implementation("sdpa")
        self._device = config.torch_device()
        warm = min(WARM_TOKENS, self._model.config.get_text_config().max_position_embeddings // 2)
        self.measure(np.ones(warm, dtype=np.int64), steps=2)

    def measure(self, prompt: np.ndarray, steps: int) -> BaselinePoint:
        """generate() of 1 + `steps` tokens, each timed when it exists. Raises torch.OutOfMemoryError."""
        from transformers import StoppingCriteriaList

        ids = torch.as_tensor(prompt, device=self._device)[None]
        times: list[float] = []

        def note(_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
            self._synchronize()
            times.append(time.perf_counter())
            return torch.zeros(1, dtype=torch.bool, device=self._device)

        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        self._synchronize()
        begin = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=1 + steps,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([note]),
            )
        laps = [later - earlier for earlier, later in pairwise(times)]
        return BaselinePoint(
            prompt_tokens=len(prompt),
            first_token_seconds=times[0] - begin,
            decode_step_ms=statistics.median(laps) * 1000,
            measured_steps=len(laps),
            peak_bytes=torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0,
        )

    def close(self) -> None:
        """Give the memory back."""
        del self._model
        release_memory(self._device)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def job_baseline(points: dict[int, BaselinePoint], lengths: list[int], new_tokens: int) -> dict[str, Any]:
    """The whole job one document at a time, from the points measured at its lengths."""
    seconds = sum(points[length].document_seconds(new_tokens) for length in lengths)
    return {
        "seconds": seconds,
        "documents_per_hour": 3600 * len(lengths) / seconds,
        "how": (
            "computed: for each document the measured first token of its length, and its other tokens at the median of "
            f"{points[lengths[0]].measured_steps} measured decode steps at that length"
        ),
        "points": [asdict(points[length]) for length in sorted(set(lengths))],
    }
