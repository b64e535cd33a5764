"""Times decode steps over documents that need no prefill: their keys and values are random numbers."""

from __future__ import annotations

import statistics
import time

import torch

from pipeline.engine.engine import Engine
from pipeline.engine.run.batch import RowStart
from pipeline.engine.run.decode import StepKey, batch_bucket, group_bucket

WARM_STEPS = 3


@torch.inference_mode()
def decode_step_ms(
    engine: Engine, document_tokens: list[int], steps: int = 32, prefix_tokens: int = 0, drafts: int = 0
) -> float | None:
    """Median milliseconds of a greedy decode step of documents that hold `document_tokens` tokens each.

    prefix_tokens: of one more extent, which they all see before their own tokens (questions to one document).
    drafts: that each row verifies, found or not (pipeline.engine.run.lookup): 0 or DRAFTS.
    None if the documents do not fit the arena together. Raises RuntimeError while the engine has documents of its own.
    """
    if engine.has_work:
        raise RuntimeError("decode_step_ms() needs an engine without work")
    batch, arena = engine._batch, engine._arena
    longest = prefix_tokens + max(document_tokens)
    room = (WARM_STEPS + steps) * (1 + drafts)
    if len(document_tokens) > batch.rows or longest + room > engine.max_context:
        return None
    extents = []
    try:
        for tokens in [*document_tokens, *([prefix_tokens] if prefix_tokens else [])]:
            extent = arena.extents.allocate(tokens + room)
            if extent is None:
                return None
            extents.append(extent)
            arena.fill(extent)
        for row, (tokens, extent) in enumerate(zip(document_tokens, extents, strict=False)):
            # A limit that is never reached and no stop ids: rows go on for all steps.
            shared = extents[-1].start if prefix_tokens else 0
            batch.begin(
                row,
                RowStart(
                    extent, prefix_tokens + tokens, 1 << 30, 0, (), 0.0, 1.0,
                    prefix_start=shared, prefix_tokens=prefix_tokens,
                ),
            )  # fmt: skip
        key = StepKey(
            batch_bucket(len(document_tokens), batch.rows), sampled=False, shared=group_bucket(batch.largest_group),
            drafts=drafts,
        )  # fmt: skip
        times = [_timed(engine, key) for _ in range(WARM_STEPS + steps)]
        return statistics.median(times[WARM_STEPS:])
    finally:
        for row in range(batch.rows):
            batch.clear(row)
        for extent in extents:
            arena.extents.release(extent)


def _timed(engine: Engine, key: StepKey) -> float:
    """Milliseconds of one step, launch and readback of its tokens included."""
    begin = time.perf_counter()
    engine._decode.run(key)
    (engine._batch.verified if key.drafts else engine._batch.report).tolist()
    return (time.perf_counter() - begin) * 1000
