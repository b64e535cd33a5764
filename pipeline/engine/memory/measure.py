"""Sizes the arena: measured on a GPU, a share of what is free on a CPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from pipeline.engine.config import EngineConfig, EngineError
from pipeline.engine.devices import GIB, device_memory, release_memory, weight_bytes
from pipeline.engine.kv.arena import ALIGNMENT, Arena, Extent
from pipeline.engine.memory.plan import HOST_SHARE, RESERVE_FACTOR, DevicePlan, MemoryPlan, build_plan
from pipeline.engine.memory.rehearsal import compile_kernels, key_state_bytes, rehearse
from pipeline.engine.model.loading import context_limit, load_runner
from pipeline.engine.model.meta_model import SLACK_BYTES
from pipeline.engine.model.runner import ModelRunner
from pipeline.engine.run.prefill import Prefill

# The sort of top-p sampling holds about this many float64 copies of the logits of the whole batch.
SAMPLING_COPIES = 6
GRAPH_BYTES = 256 * 2**20
# A decode step holds about this many copies of all rows' states of one layer.
STATE_COPIES = 4
SHRINK_STEPS = 4


def load_and_plan(
    config: EngineConfig, runner: ModelRunner | None, chunk_tokens: int
) -> tuple[ModelRunner, MemoryPlan]:
    """The model of `config`, or the given one switched to its attention, and its plan. Raises EngineError."""
    try:
        if runner is None:
            on_gpu = config.torch_device().type == "cuda"
            runner = load_runner(config, compile_kernels=partial(_compile, config, chunk_tokens) if on_gpu else None)
        else:
            runner.attend(config.attention)
        return runner, plan_memory(runner, config, chunk_tokens)
    except torch.OutOfMemoryError as error:
        where = ", ".join(map(str, config.torch_devices() if runner is None else runner.devices))
        raise EngineError(
            f"model {config.model!r} leaves no room on {where} for a prefill chunk of {chunk_tokens:,} tokens: "
            "lower chunk_tokens or use a smaller model"
        ) from error
    except (ValueError, AttributeError) as error:
        raise EngineError(f"model {config.model!r} cannot run here: {error}") from error


def _compile(config: EngineConfig, chunk_tokens: int, runner: ModelRunner) -> None:
    context = config.max_context or context_limit(runner.model.config)
    compile_kernels(runner, context, chunk_tokens, rows=config.max_live, lookup=config.prompt_lookup == "auto")


def plan_memory(runner: ModelRunner, config: EngineConfig, chunk_tokens: int) -> MemoryPlan:
    """The plan for a loaded model. Raises EngineError if no useful arena fits."""
    context = config.max_context or context_limit(runner.model.config)
    on_gpu = runner.device.type == "cuda"
    peaks = measure_chunk(runner, chunk_tokens) if on_gpu else {}
    parts, left = [], []
    for device in runner.devices:
        if on_gpu:
            torch.cuda.empty_cache()
        free, total = device_memory(device)
        if on_gpu:
            reserve = _reserve(runner, config, device, peaks[device], free, context)
        else:
            reserve = int(free * (1 - HOST_SHARE))
        layers = [layer for layer, there in runner.layer_devices.items() if there == device]
        parts.append(
            DevicePlan(
                device=str(device),
                layers=f"{min(layers)}-{max(layers)}",
                total_bytes=total,
                weight_bytes=weight_bytes(runner.model, device),
                reserve_bytes=reserve,
                bytes_per_token=runner.bytes_per_token(device),
                state_bytes=runner.state_bytes(config.max_live, device),
            )
        )
        left.append(free - reserve)
    return replace(build_plan(config, runner.precision, parts, left, context), dequantised_from=runner.weights)


def _reserve(
    runner: ModelRunner, config: EngineConfig, device: torch.device, peak: int, free: int, context: int
) -> int:
    """Bytes to keep free on a GPU: a chunk, what it keeps of a prompt's keys, and decoding.

    Logits are the first device's.
    """
    reserve = int(peak * RESERVE_FACTOR) + SLACK_BYTES + GRAPH_BYTES
    if device == runner.device:
        reserve += SAMPLING_COPIES * config.max_live * runner.vocabulary * 8
    by_layer = Counter[int]()
    for key, shape in runner.states.items():
        by_layer[key.layer] += shape.nbytes
    reserve += STATE_COPIES * config.max_live * max(by_layer.values(), default=0)
    longest = min(context, max(1, (free - reserve) // max(1, runner.bytes_per_token(device))))
    # A prompt that outgrows a layer's window needs no summary there; the longest that does not, does.
    lengths = {longest, *(window for _, window in runner.layers if window is not None and window < longest)}
    return reserve + max(key_state_bytes(runner, length, device) for length in lengths)


@torch.inference_mode()
def measure_chunk(runner: ModelRunner, chunk_tokens: int) -> dict[torch.device, int]:
    """Most bytes that one prefill chunk takes on each GPU beside weights and KV, the allocator's own losses included.

    Also the run in which kernels compile that are not there yet.
    """
    torch.cuda.empty_cache()
    base = {}
    for device in runner.devices:
        torch.cuda.reset_peak_memory_stats(device)
        base[device] = torch.cuda.memory_reserved(device)
    arena = runner.new_arena(chunk_tokens)
    ids = np.zeros(chunk_tokens, dtype=np.int64)
    Prefill(runner, arena, Extent(0, chunk_tokens), ids, 0, chunk_tokens).step()
    peaks = {}
    for device, before in base.items():
        torch.cuda.synchronize(device)
        peaks[device] = max(0, torch.cuda.max_memory_reserved(device) - before - arena.nbytes_on(device))
    return peaks


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
        release_memory(*runner.devices)
        if config.arena_tokens is not None:
            break
        plan = plan.shrunk(int(plan.arena_tokens * 0.95) // ALIGNMENT * ALIGNMENT)
    raise EngineError(
        f"an arena of {plan.arena_tokens:,} tokens ({plan.arena_bytes / GIB:.1f} GiB) and a chunk of {chunk_tokens:,} "
        f"tokens do not fit {plan.device} together; lower arena_tokens, max_context or chunk_tokens"
    )


def _rehearsed_arena(runner: ModelRunner, plan: MemoryPlan, chunk_tokens: int) -> Arena | None:
    """The plan's arena, or None if it or the rehearsal in it runs out of GPU memory."""
    try:
        arena = runner.new_arena(plan.arena_tokens, plan.max_live)
        if runner.device.type == "cuda":
            rehearse(runner, arena, plan.max_context, chunk_tokens)
            for device in runner.devices:
                torch.cuda.synchronize(device)
        return arena
    except torch.OutOfMemoryError:
        return None
