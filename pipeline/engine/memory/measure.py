"""Sizes the arena: measured on a GPU, a share of what is free on a CPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from pipeline.engine.config import EngineConfig, EngineError
from pipeline.engine.devices import GIB, device_memory, release_memory, tensor_bytes, weight_bytes
from pipeline.engine.kv.arena import ALIGNMENT, Arena, Extent
from pipeline.engine.memory.plan import HOST_SHARE, RESERVE_FACTOR, DevicePlan, MemoryPlan, build_plan
from pipeline.engine.model.loading import context_limit, load_runner
from pipeline.engine.model.meta_model import SLACK_BYTES
from pipeline.engine.model.runner import ModelRunner
from pipeline.engine.run.ahead import compile_kernels
from pipeline.engine.run.prefill import Prefill, chunk_size
from pipeline.engine.run.readings import probe_readings
from stem_core.context import PrefillContext
from stem_core.estimators import KeyState
from stem_core.selection import new_key_state

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
            rows, lookup = config.max_live, config.prompt_lookup == "auto"
            compile_all = partial(compile_kernels, chunk_tokens=chunk_tokens, rows=rows, lookup=lookup)
            on_gpu = config.torch_device().type == "cuda"
            runner = load_runner(config, compile_kernels=compile_all if on_gpu else None)
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


@torch.inference_mode()
def rehearse(runner: ModelRunner, arena: Arena, plan: MemoryPlan, chunk_tokens: int) -> None:
    """Run the last chunk of the longest document that the plan admits. Raises torch.OutOfMemoryError.

    The last blocks of documents of 1, 2, 4, ... whole chunks follow: some kernels are compiled for powers of two of a
    prompt's blocks, whatever the chunk, and none should be while a document waits.
    """
    lengths = [plan.max_context]
    while (whole := chunk_tokens << (len(lengths) - 1)) < plan.max_context:
        lengths.append(whole)
    block = chunk_size(1, runner.layers[-1][0].config)
    for length in lengths:
        step = chunk_tokens if length == plan.max_context else block
        start = (length - 1) // step * step
        extent = Extent(0, length)
        readings = probe_readings(runner, length)
        context = PrefillContext(prompt_length=length, start=start, quantized=arena.quantized(extent))
        context.probe = None if readings is None else readings.probe
        _past_keys(runner, context)
        ids = torch.zeros(1, length - start, dtype=torch.int64, device=runner.device)
        runner.prefill(ids, arena, extent, context, torch.full_like(ids[:, 0], length))
        arena.forget(extent)


def key_states(
    runner: ModelRunner, prompt_tokens: int, device: torch.device | None = None, on: torch.device | None = None
) -> dict[int, KeyState]:
    """What the attention keeps of a whole prompt's keys while it is prefilled, by layer.

    device: where they are allocated; None: each on its layer's device. on: of the layers on this device alone.
    """
    states = {}
    for policy, window in runner.layers:
        place = runner.layer_devices[policy.layer]
        if policy.config is None or policy.budget(prompt_tokens, window).budgets is None:
            continue
        if on is not None and place != on:
            continue
        shape = runner.shapes[runner.sources.get(policy.layer, policy.layer)]
        keys = torch.empty(1, shape.kv_heads, 1, shape.head_dim, dtype=runner.dtype, device=place)
        state = new_key_state(policy.config, keys, prompt_tokens, place if device is None else device)
        if state is not None:
            states[policy.layer] = state
    return states


def key_state_bytes(runner: ModelRunner, prompt_tokens: int, on: torch.device | None = None) -> int:
    """Bytes of key_states(), of which nothing is allocated."""
    states = key_states(runner, prompt_tokens, torch.device("meta"), on).values()
    return tensor_bytes(tensor for state in states for tensor in state.tensors)


def _past_keys(runner: ModelRunner, context: PrefillContext) -> None:
    """Key states as earlier chunks of zeros would have left them."""
    context.keys.update(key_states(runner, context.prompt_length))
    for layer, state in context.keys.items():
        for tensor in state.tensors:
            tensor.zero_()
        policy = next(policy for policy, _ in runner.layers if policy.layer == layer)
        assert policy.config is not None
        state.blocks = context.start // policy.config.block_size


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
            rehearse(runner, arena, plan, chunk_tokens)
            for device in runner.devices:
                torch.cuda.synchronize(device)
        return arena
    except torch.OutOfMemoryError:
        return None
