"""Sizes the arena: measured on a GPU, a share of what is free on a CPU."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import torch

from kernels.block_scores import KeySummary, key_sums_dtype
from pipeline.engine.arena import ALIGNMENT, Arena, Extent
from pipeline.engine.cache import PrefillCache
from pipeline.engine.config import EngineConfig, EngineError
from pipeline.engine.loading import context_limit, weight_bytes
from pipeline.engine.plan import (
    GIB,
    HOST_SHARE,
    RESERVE_FACTOR,
    SLACK_BYTES,
    MemoryPlan,
    fit_arena,
    host_memory,
)
from pipeline.engine.prefill import Prefill
from pipeline.engine.runner import ModelRunner
from stem_core.context import PrefillContext

# The sort of top-p sampling holds about this many float64 copies of the logits of the whole batch.
SAMPLING_COPIES = 6
GRAPH_BYTES = 256 * 2**20
SHRINK_STEPS = 4


def release_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more; fused modules refer to themselves, hence the collection."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def plan_memory(runner: ModelRunner, config: EngineConfig, chunk_tokens: int) -> MemoryPlan:
    """The plan for a loaded model. Raises EngineError if no useful arena fits."""
    per_token = runner.bytes_per_token
    context = config.max_context or context_limit(runner.model.config)
    if runner.device.type == "cuda":
        peak = measure_chunk(runner, chunk_tokens)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(runner.device)
        sampling = SAMPLING_COPIES * config.max_live * runner.vocabulary * 8
        reserve = int(peak * RESERVE_FACTOR) + sampling + GRAPH_BYTES + SLACK_BYTES
        longest = min(context, max(1, (free - reserve) // per_token))
        # A prompt that outgrows a layer's window needs no summary there; the longest that does not, does.
        lengths = {longest, *(window for _, window in runner.layers if window is not None and window < longest)}
        reserve += max(summary_bytes(runner, length) for length in lengths)
    else:
        free, total = host_memory()
        reserve = int(free * (1 - HOST_SHARE))
    tokens = fit_arena(config, free - reserve, per_token, context)
    return MemoryPlan(
        device=str(runner.device),
        precision=runner.precision.name,
        total_bytes=total,
        weight_bytes=weight_bytes(runner.model),
        reserve_bytes=reserve,
        bytes_per_token=per_token,
        arena_tokens=tokens,
        max_context=min(tokens, context),
        max_live=config.max_live,
    )


@torch.inference_mode()
def measure_chunk(runner: ModelRunner, chunk_tokens: int) -> int:
    """Most GPU bytes that one prefill chunk takes beside weights and KV, the allocator's own losses included.

    Also the run in which kernels compile.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(runner.device)
    base = torch.cuda.memory_reserved(runner.device)
    arena = runner.new_arena(chunk_tokens)
    ids = np.zeros(chunk_tokens, dtype=np.int64)
    Prefill(runner, arena, Extent(0, chunk_tokens), ids, 0, chunk_tokens).step()
    torch.cuda.synchronize(runner.device)
    return max(0, torch.cuda.max_memory_reserved(runner.device) - base - arena.nbytes)


@torch.inference_mode()
def rehearse(runner: ModelRunner, arena: Arena, plan: MemoryPlan, chunk_tokens: int) -> None:
    """Run the last chunk of the longest document that the plan admits. Raises torch.OutOfMemoryError.

    Documents of 1, 2, 4, ... whole chunks follow: some kernels are compiled for powers of two of a prompt's blocks, and
    none should be while a document waits.
    """
    lengths = [plan.max_context]
    while (whole := chunk_tokens << (len(lengths) - 1)) < plan.max_context:
        lengths.append(whole)
    for length in lengths:
        start = (length - 1) // chunk_tokens * chunk_tokens
        extent = Extent(0, length)
        context = PrefillContext(prompt_length=length, start=start, quantized=arena.quantized(extent))
        _past_summaries(runner, context)
        cache = PrefillCache(arena, extent, seen=start)
        ids = torch.zeros(1, length - start, dtype=torch.int64, device=runner.device)
        positions = torch.arange(start, length, device=runner.device)[None]
        runner.logits(ids, positions, cache, context, torch.full_like(ids[:, 0], length))


def key_summaries(runner: ModelRunner, prompt_tokens: int, device: torch.device) -> dict[int, KeySummary]:
    """What the attention keeps of a whole prompt's keys while it is prefilled, by layer, allocated on `device`."""
    summaries = {}
    for policy, window in runner.layers:
        config = policy.config
        if config is None or config.estimator != "oam" or policy.budget(prompt_tokens, window).budgets is None:
            continue
        shape = runner.shapes[policy.layer]
        keys = torch.empty(1, shape.kv_heads, 1, shape.head_dim, dtype=runner.dtype, device=runner.device)
        summaries[policy.layer] = KeySummary.allocate(
            1,
            shape.kv_heads,
            prompt_tokens,
            shape.head_dim,
            block_size=config.block_size,
            stride=config.stride,
            device=device,
            dtype=key_sums_dtype(keys),
        )
    return summaries


def summary_bytes(runner: ModelRunner, prompt_tokens: int) -> int:
    """Bytes of key_summaries(), of which nothing is allocated."""
    summaries = key_summaries(runner, prompt_tokens, torch.device("meta")).values()
    return sum(summary.key_sums.nbytes + summary.log_norms.nbytes for summary in summaries)


def _past_summaries(runner: ModelRunner, context: PrefillContext) -> None:
    """Summaries as earlier chunks of zeros would have left them."""
    context.summaries.update(key_summaries(runner, context.prompt_length, runner.device))
    for layer, summary in context.summaries.items():
        summary.key_sums.zero_()
        summary.log_norms.zero_()
        policy = next(policy for policy, _ in runner.layers if policy.layer == layer)
        assert policy.config is not None
        summary.blocks = context.start // policy.config.block_size


def allocate_arena(
    runner: ModelRunner, config: EngineConfig, plan: MemoryPlan, chunk_tokens: int
) -> tuple[Arena, MemoryPlan]:
    """The arena, proven by a rehearsal on a GPU: a plan that runs out of memory there is shrunk by 5% at a time.

    Returns the arena and the plan that it follows. Raises EngineError if `config.arena_tokens` asked for too much.
    """
    for _ in range(SHRINK_STEPS):
        arena = _rehearsed_arena(runner, plan, chunk_tokens)
        if arena is not None:
            return arena, plan
        release_memory(runner.device)
        if config.arena_tokens is not None:
            break
        tokens = int(plan.arena_tokens * 0.95) // ALIGNMENT * ALIGNMENT
        plan = replace(
            plan,
            arena_tokens=tokens,
            max_context=min(plan.max_context, tokens),
            reserve_bytes=plan.reserve_bytes + plan.arena_bytes - tokens * plan.bytes_per_token,
        )
    raise EngineError(
        f"an arena of {plan.arena_tokens:,} tokens ({plan.arena_bytes / GIB:.1f} GiB) and a chunk of {chunk_tokens:,} "
        f"tokens do not fit {plan.device} together; lower arena_tokens, max_context or chunk_tokens"
    )


def _rehearsed_arena(runner: ModelRunner, plan: MemoryPlan, chunk_tokens: int) -> Arena | None:
    """The plan's arena, or None if it or the rehearsal in it runs out of GPU memory."""
    try:
        arena = runner.new_arena(plan.arena_tokens)
        if runner.device.type == "cuda":
            rehearse(runner, arena, plan, chunk_tokens)
            torch.cuda.synchronize(runner.device)
        return arena
    except torch.OutOfMemoryError:
        return None
