"""How long an engine takes for a document, and how long documents are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.errors import JobError
from pipeline.results.parts import read_results


@dataclass(frozen=True)
class EngineCost:
    """Seconds of an engine: prefill of n tokens takes linear * n + quadratic * n²; a decode step takes
    step + step_token * (tokens of all documents in the batch). max_live: documents that it decodes together.
    """

    linear: float
    quadratic: float
    step: float
    step_token: float
    max_live: int = 8

    def prefill(self, tokens: int) -> float:
        """Seconds to read a prompt."""
        return (self.linear + self.quadratic * tokens) * tokens

    def alone(self, tokens: int, new_tokens: int) -> float:
        """Seconds from a document's start to its last token, if its engine has nothing else to do."""
        return self.prefill(tokens) + (new_tokens - 1) * (self.step + self.step_token * tokens)

    def least(self, tokens: np.ndarray, new_tokens: int) -> float:
        """Seconds that documents take of an engine at the least, together: in a batch that is always full."""
        n = tokens.astype(np.float64)
        prefill = (self.linear + self.quadratic * n) * n
        return float((prefill + (new_tokens - 1) * (self.step / self.max_live + self.step_token * n)).sum())


# Measured on an H100 (Stem at a budget of 0.25, fp8, the shape of Llama-3.1-8B, before the fp8 kernels were repaired on
# 2026-11-28; docs/speed.md has what the preset `sampled` takes today). Prefill: 0.50, 1.20 and 3.11 s at 32,768, 65,536
# and 131,072 tokens. Decode: a step of one document of 131,072 tokens takes 8.0 ms; its parts are such
# that the job of 16 documents takes its 38.4 s (a test holds all of these).
H100 = EngineCost(linear=1.25e-5, quadratic=8.65e-11, step=4.6e-3, step_token=2.6e-8)


def fit(rows: str, max_live: int) -> EngineCost:
    """The cost by a job's own rows, least squares. Raises JobError if they do not tell.

    A row's decode time is that of whole steps, in company: of `max_live` documents about as long as its own, as the
    order of a job has it.
    """
    columns = ["status", "prompt_tokens", "output_tokens", "prefill_seconds", "decode_seconds", "parts"]
    table = read_results(rows, columns).to_pylist()
    used = [row for row in table if row["status"] == "ok" and row["parts"] == 1 and row["output_tokens"] > 1]
    tokens = np.array([row["prompt_tokens"] for row in used], dtype=np.float64)
    if len(np.unique(tokens)) < 3:
        raise JobError(f"--rows {rows}: {len(used)} rows are ok and of one part; it needs three lengths at least")
    prefill = np.array([row["prefill_seconds"] for row in used])
    step = np.array([row["decode_seconds"] / (row["output_tokens"] - 1) for row in used])
    linear, quadratic = _line(tokens, prefill / tokens)
    fixed, slope = _line(tokens, step)
    return EngineCost(linear, quadratic, fixed, slope / max_live, max_live)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Offset and slope of a line through the points, neither below 0."""
    slope, offset = np.polyfit(x, y, 1)
    if slope < 0:
        return float(y.mean()), 0.0
    if offset < 0:
        return 0.0, float((x * y).sum() / (x * x).sum())
    return float(offset), float(slope)


def lengths(documents: int, median: int, sigma: float, longest: int, seed: int) -> np.ndarray:
    """Prompt tokens, int64 [documents]: lognormal, at least 64, and `longest` where they would be longer."""
    drawn = np.random.default_rng(seed).lognormal(np.log(median), sigma, documents)
    return np.clip(drawn, 64, longest).astype(np.int64)


def share(tokens: np.ndarray, workers: int, cost: EngineCost, new_tokens: int) -> tuple[float, float]:
    """(seconds of all the work divided among the workers, seconds of the longest document alone)."""
    return cost.least(tokens, new_tokens) / workers, cost.alone(int(tokens.max()), new_tokens)
