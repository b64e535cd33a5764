"""What one document cost its worker, as columns of its row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.engine.config import Completion


@dataclass
class Meter:
    """What a document has cost so far, all its parts together. Seconds and tokens."""

    load: float = 0.0
    tokenize: float = 0.0
    queue: float = 0.0
    truncated: int = 0
    parts: int = 1
    input_hash: str | None = None
    chunk_tokens: int | None = None
    completions: list[Completion] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def columns(self) -> dict[str, Any]:
        """The row columns that follow from it."""
        values: dict[str, Any] = {
            "queue_seconds": self.queue + sum(c.queue_seconds for c in self.completions),
            "load_seconds": self.load,
            "tokenize_seconds": self.tokenize,
            "truncated_tokens": self.truncated,
            "parts": self.parts,
            "input_hash": self.input_hash,
        }
        if not self.completions:
            return values
        done, first = self.completions, self.completions[0]
        sparse = [c for c in done if c.attention == "stem"]
        told = sparse[0] if sparse else first
        ran = [c for c in done if c.attention]  # the others were refused, or ended before their turn
        read = sum(c.prompt_tokens for c in ran)
        return values | {
            "prompt_tokens": sum(c.prompt_tokens for c in done),
            "output_tokens": sum(c.output_tokens for c in done),
            "attention": told.attention or None,
            "attention_reason": _reason(told, ran) if ran else None,
            "density": sum(c.density * c.prompt_tokens for c in ran) / read if read else None,
            "density_by_layer": _density_by_layer(ran) if sparse else None,
            "output_error": max((c.output_error for c in ran if c.output_error is not None), default=None),
            "kernel": told.kernel or None,
            "prefill_seconds": sum(c.prefill_seconds for c in done),
            "decode_seconds": sum(c.decode_seconds for c in done),
            "time_to_first_token": max(0.0, first.time_to_first_token - first.queue_seconds)
            if first.output_tokens
            else None,
            "peak_gpu_bytes": max(c.peak_bytes for c in done),
        }


def _reason(told: Completion, ran: list[Completion]) -> str:
    """Of the completion that stands for the document; if parts of a sparse one went dense while they ran, theirs."""
    given_up = [c for c in ran if c.attention == "dense" and c.output_error is not None]
    if told.attention == "dense" or not given_up:
        return told.attention_reason
    return f"{len(given_up)} of {len(ran)} prompts are dense: {given_up[0].attention_reason}"


def _density_by_layer(ran: list[Completion]) -> list[float]:
    """Mean of each layer over a document's parts, weighted with their prompt tokens as `density` is."""
    read = sum(c.prompt_tokens for c in ran)
    layers = zip(*([density * c.prompt_tokens for density in c.density_by_layer] for c in ran), strict=True)
    return [sum(layer) / read for layer in layers]
