"""Runs of what an engine will do, before there are documents: to compile its kernels, and to prove that memory does."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from kernels.compile_ahead import compiling_ahead
from kernels.fp8_heads import HeadScales
from pipeline.engine.devices import device_memory, tensor_bytes
from pipeline.engine.kv.arena import ALIGNMENT, Arena, Extent, aligned
from pipeline.engine.model.runner import ModelRunner
from pipeline.engine.run.batch import DecodeBatch
from pipeline.engine.run.decode import DecodeRunner
from pipeline.engine.run.prefill import Prefill, chunk_size
from pipeline.engine.run.readings import probe_readings
from pipeline.engine.run.tail import TAIL_CHUNK, TailPrefill
from stem_core.attention import empty_bias
from stem_core.context import PrefillContext
from stem_core.errors import first_line
from stem_core.estimators import KeyState
from stem_core.fp8 import Fp8Experts, is_experts_class
from stem_core.kv_scales import Calibration, recording
from stem_core.selection import new_key_state

# Tokens of a prompt that is read without a cache, as those are that give the scales of fp8.
PROMPT_TOKENS = 512
# Tokens behind a prefix, one number for each set of kernels: they are compiled for the next power of two, and apart for
# multiples of 16.
TAILS = sorted({n for k in range(TAIL_CHUNK.bit_length()) for n in (1 << k, (1 << k) - (1 << k >= 16))})


def compile_kernels(runner: ModelRunner, context: int, chunk_tokens: int, rows: int, lookup: bool) -> None:
    """Compile the kernels of calibration, of prefill, and of decode steps of up to `rows` documents, side by side.

    context: tokens of the longest document. lookup: whether steps with drafts may come. What is missed compiles when it
    is first launched. The model runs on values that no kernel wrote; experts are chosen, and states kept, by such
    values, so models with any are left alone.
    """
    if _goes_by_values(runner):
        return
    try:
        with torch.inference_mode(), compiling_ahead():
            _launch(runner, context, chunk_tokens, rows, lookup)
    except Exception as error:  # a model that takes such values amiss
        warnings.warn(f"kernels compile one after the other: {first_line(error)}", RuntimeWarning, stacklevel=2)
    finally:
        runner.calibration = Calibration()


def _launch(runner: ModelRunner, context: int, chunk_tokens: int, rows: int, lookup: bool) -> None:
    if runner.precision.fp8:
        with recording() as seen:
            runner.uncached(torch.zeros(1, PROMPT_TOKENS, dtype=torch.int64, device=runner.device))
        # Any scales do.
        scales = {
            layer: HeadScales(
                torch.ones_like(found.q),
                ones := torch.ones_like(found.v),
                ones,
                torch.zeros_like(found.k_sum),
                torch.zeros_like(found.q_sum),
            )
            for layer, found in seen.items()
        }
        runner.calibration = Calibration(scales)
    room = min(device_memory(device)[0] // 2 // max(1, runner.bytes_per_token(device)) for device in runner.devices)
    arena = runner.new_arena(max(chunk_tokens, min(aligned(context), room)), rows)
    Prefill(runner, arena, Extent(0, chunk_tokens), np.zeros(chunk_tokens, dtype=np.int64), 0, chunk_tokens).step()
    longest = min(context, arena.capacity)
    read_ends(runner, arena, [longest, *_doublings(_block(runner), longest)], _block(runner))
    read_tails(runner, arena, longest)
    batch = DecodeBatch(rows, runner.device, runner.vocabulary)
    DecodeRunner(runner, arena, batch, longest, use_graphs=False, lookup=lookup).launch_kernels()


def _goes_by_values(runner: ModelRunner) -> bool:
    """Whether what kernels compute decides what is launched next, so that all of them must run."""
    return bool(runner.states) or any(map(_holds_experts, runner.model.modules()))


def _holds_experts(module: nn.Module) -> bool:
    return isinstance(module, Fp8Experts) or is_experts_class(type(module))


def _block(runner: ModelRunner) -> int:
    """Tokens of the least chunk that is not a prompt's last."""
    return chunk_size(1, runner.layers[-1][0].config)


def _doublings(block: int, below: int) -> list[int]:
    """1, 2, 4, ... blocks, as long as that is less than `below` tokens."""
    lengths: list[int] = []
    while (length := block << len(lengths)) < below:
        lengths.append(length)
    return lengths


@torch.inference_mode()
def rehearse(runner: ModelRunner, arena: Arena, longest: int, chunk_tokens: int) -> None:
    """Run the last chunk of a document of `longest` tokens. Raises torch.OutOfMemoryError.

    The last blocks of documents of 1, 2, 4, ... blocks follow: some kernels are compiled for powers of two of what was
    read so far, and none should be while a document waits.
    """
    read_ends(runner, arena, [longest], chunk_tokens)
    read_ends(runner, arena, _doublings(_block(runner), longest), _block(runner))
    if _goes_by_values(runner):  # else these kernels were compiled ahead
        read_tails(runner, arena, longest)


def read_tails(runner: ModelRunner, arena: Arena, longest: int) -> None:
    """Read what stands behind a prefix, as every request of a job is read, once for each set of kernels."""
    prefix = Extent(0, ALIGNMENT)
    Prefill(runner, arena, prefix, np.zeros(ALIGNMENT, dtype=np.int64), 0, chunk_size(ALIGNMENT, None)).step()
    for tokens in TAILS:
        if ALIGNMENT + tokens <= arena.capacity:
            place = Extent(ALIGNMENT, tokens)
            TailPrefill(runner, arena, prefix, ALIGNMENT, place, np.zeros(tokens, dtype=np.int64), longest).step()
            arena.forget(place)
    arena.forget(prefix)


def read_ends(runner: ModelRunner, arena: Arena, lengths: Sequence[int], chunk_tokens: int) -> None:
    """Read the last chunk of a document of each length, as if zeros had come before; each at the arena's beginning."""
    for length in lengths:
        start = (length - 1) // chunk_tokens * chunk_tokens
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
    """Bytes of key_states(), of which nothing is allocated, and of the biases of keys in fp8."""
    states = key_states(runner, prompt_tokens, torch.device("meta"), on).values()
    biases = [
        empty_bias(scales, prompt_tokens, torch.device("meta"))
        for layer, scales in runner.calibration.scales.items()
        if scales is not None and (on is None or runner.layer_devices[layer] == on)
    ]
    return tensor_bytes([*biases, *(tensor for state in states for tensor in state.tensors)])


def _past_keys(runner: ModelRunner, context: PrefillContext) -> None:
    """Key states and biases as earlier chunks of zeros would have left them."""
    for layer, kv in context.quantized.items():
        context.bias[layer] = empty_bias(kv.scales, context.prompt_length).zero_()
    context.keys.update(key_states(runner, context.prompt_length))
    for layer, state in context.keys.items():
        for tensor in state.tensors:
            tensor.zero_()
        policy = next(policy for policy, _ in runner.layers if policy.layer == layer)
        assert policy.config is not None
        state.blocks = context.start // policy.config.block_size
