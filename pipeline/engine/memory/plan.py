"""How the memory of the device is divided: weights, a reserve for a prefill chunk and decoding, KV for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import torch

from kernels.fp8_heads import BIAS_KEYS, bias_shape
from pipeline.engine.config import EngineConfig, EngineError
from pipeline.engine.devices import GIB, device_memory, weight_bytes
from pipeline.engine.kv.arena import ALIGNMENT, ID_BYTES, LayerShape, aligned
from pipeline.engine.kv.states import slots_for
from pipeline.engine.model.loading import context_limit, load_config, stored_weights
from pipeline.engine.model.meta_model import cached_shapes, chunk_bytes, meta_model, state_shapes
from pipeline.engine.model.placement import place
from pipeline.engine.model.precision import DTYPES, Precision, resolve_precision
from stem_core.kv_scales import MOST_FP8_HEAD

# On a CPU the arena shares memory with everything else on the machine.
HOST_SHARE = 0.4
# A measured peak is stretched by this, since other lengths split memory differently.
RESERVE_FACTOR = 1.15
# Which layers are wide (stem_core.kv_scales) is measured on the loaded model, and the engine's own plan goes by it.
ESTIMATED_IN_FP8 = (
    "           with all layers in fp8; after loading, those that it would harm, at most a third, have 16 bits"
)


@dataclass(frozen=True)
class DevicePlan:
    """Where the memory of one of several devices goes, as in MemoryPlan; layers: "0-39", say."""

    device: str
    layers: str
    total_bytes: int
    weight_bytes: int
    reserve_bytes: int
    bytes_per_token: int
    state_bytes: int = 0

    def line(self, arena_tokens: int) -> str:
        """The plan for a person."""
        kv = f"{self.bytes_per_token:,} bytes of KV a token"
        if self.total_bytes:
            arena = arena_tokens * self.bytes_per_token
            kv += (
                f" ({arena / GIB:.2f} GiB), reserve {self.reserve_bytes / GIB:.2f}, of {self.total_bytes / GIB:.1f} GiB"
            )
        return f"  {self.device}: layers {self.layers}, weights {self.weight_bytes / GIB:.2f} GiB, {kv}"


@dataclass(frozen=True)
class MemoryPlan:
    """Where the memory of the device, or of all devices together, goes; all sizes in bytes, lengths in tokens.

    total_bytes: memory of the device (of the host, on a CPU); 0 if there is none to ask. reserve_bytes: kept free for
    activations, decode graphs and the allocator. bytes_per_token: KV of all layers. state_bytes: recurrent and
    convolution states of max_live documents, of models with linear attention. max_context: longest document, prompt and
    output.
    estimated: made from the config alone, before anything was loaded or measured. precision: of weights and KV.
    devices: of a model spread over several, each; a token lies on all of them, so that the fullest sets arena_tokens.
    dequantised_from: how the checkpoint holds weights that take more memory than its files; empty if it does not.
    """

    device: str
    total_bytes: int
    weight_bytes: int
    reserve_bytes: int
    bytes_per_token: int
    arena_tokens: int
    max_context: int
    max_live: int
    estimated: bool = False
    precision: str = ""
    devices: tuple[DevicePlan, ...] = ()
    dequantised_from: str = ""
    state_bytes: int = 0

    @property
    def arena_bytes(self) -> int:
        """KV of the whole arena."""
        return self.arena_tokens * self.bytes_per_token

    def documents(self, tokens: int) -> int:
        """How many documents of `tokens` tokens (prompt and output) decode at the same time."""
        if tokens > self.max_context:
            return 0
        return min(self.max_live, self.arena_tokens // aligned(tokens))

    def shrunk(self, tokens: int) -> MemoryPlan:
        """The plan with an arena of fewer tokens; what becomes free is reserve."""
        less = self.arena_tokens - tokens
        return replace(
            self,
            arena_tokens=tokens,
            max_context=min(self.max_context, tokens),
            reserve_bytes=self.reserve_bytes + less * self.bytes_per_token,
            devices=tuple(
                replace(part, reserve_bytes=part.reserve_bytes + less * part.bytes_per_token) for part in self.devices
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """Fields and derived sizes as plain values."""
        return asdict(self) | {"arena_bytes": self.arena_bytes}

    def lines(self) -> list[str]:
        """The plan for a person."""
        kind = "estimated before loading" if self.estimated else "after loading"
        context = f"{self.max_context:,} tokens a document at most (prompt and output)"
        parts = [part.line(self.arena_tokens) for part in self.devices]
        weights = f"  weights  {self.weight_bytes / GIB:.2f} GiB"
        if self.dequantised_from:
            weights += f", dequantised from {self.dequantised_from}"
        reserve = f"  reserve  {self.reserve_bytes / GIB:.2f} GiB for activations and decoding"
        if not self.total_bytes:
            gpus = f"{len(parts)} GPUs ({kind}; there are not so many" if parts else f"a GPU ({kind}; there is none"
            own = parts or [reserve, f"  KV       {self.bytes_per_token:,} bytes a token"]
            return [f"memory of {gpus} here to ask), precision {self.precision}", weights, *own]
        kv = f"{self.arena_bytes / GIB:.2f} GiB = {self.arena_tokens:,} tokens x {self.bytes_per_token:,} bytes"
        return [
            f"memory of {self.device} ({kind}): {self.total_bytes / GIB:.1f} GiB, precision {self.precision}",
            weights,
            reserve,
            f"  KV       {kv}",
            *([f"  states   {self.state_bytes / GIB:.2f} GiB for {self.max_live} documents"] * bool(self.state_bytes)),
            *([ESTIMATED_IN_FP8] if self.estimated and self.precision == "fp8" else []),
            *parts,
            f"  {context}; at once: {self.documents(32_768)} of 32K, {self.documents(131_072)} of 128K",
        ]


def fit_arena(config: EngineConfig, free_bytes: int, bytes_per_token: int, context: int, where: str = "") -> int:
    """Tokens of KV that `free_bytes` hold beside the ids of the tokens, at most what `max_live` documents of `context`
    tokens could use.

    where: names the device for a message, if there are several.
    Raises EngineError if not even the smallest extent fits, or the arena asked for does not.
    """
    on = f" on {where}" if where else ""
    if config.arena_tokens is not None:
        wanted = aligned(config.arena_tokens)
        if (wanted + ALIGNMENT) * (bytes_per_token + ID_BYTES) > free_bytes:
            raise EngineError(
                f"arena_tokens={config.arena_tokens} need {wanted * bytes_per_token / GIB:.2f} GiB, but "
                f"{max(0, free_bytes) / GIB:.2f} GiB are free for KV{on}; lower it or leave it out"
            )
        return wanted
    fits = free_bytes // (bytes_per_token + ID_BYTES) // ALIGNMENT * ALIGNMENT - ALIGNMENT
    tokens = min(fits, config.max_live * aligned(context))
    if tokens < ALIGNMENT:
        raise EngineError(
            f"{max(0, free_bytes) / GIB:.2f} GiB are left for KV at {bytes_per_token:,} bytes a token{on}: too little; "
            f"use a smaller model or chunk_tokens, {'more GPUs a worker, ' if where else ''}or precision fp8"
        )
    return tokens


def build_plan(
    config: EngineConfig,
    precision: Precision,
    parts: Sequence[DevicePlan],
    free: Sequence[int],
    context: int,
    estimated: bool = False,
) -> MemoryPlan:
    """The plan of one device or several: the arena has the tokens that the fullest of them holds.

    parts: of each device, with a total of 0 where there is none to ask: then there is no arena. free: bytes for KV and
    states on each. context: most tokens of a document. Raises EngineError as fit_arena does.
    """
    several = len(parts) > 1
    tokens = 0
    if parts[0].total_bytes:
        tokens = min(
            fit_arena(config, room - part.state_bytes, part.bytes_per_token, context, part.device if several else "")
            for room, part in zip(free, parts, strict=True)
            if part.bytes_per_token
        )
    return MemoryPlan(
        device=", ".join(part.device for part in parts),
        total_bytes=sum(part.total_bytes for part in parts),
        weight_bytes=sum(part.weight_bytes for part in parts),
        reserve_bytes=sum(part.reserve_bytes for part in parts),
        bytes_per_token=sum(part.bytes_per_token for part in parts),
        arena_tokens=tokens,
        max_context=min(tokens, context) if tokens else context,
        max_live=config.max_live,
        estimated=estimated,
        precision=precision.name,
        devices=tuple(parts) if several else (),
        state_bytes=sum(part.state_bytes for part in parts),
    )


def estimate_plan(config: EngineConfig, total_bytes: int | None = None) -> MemoryPlan:
    """The plan from the model's config alone: nothing is loaded and no GPU is needed if `total_bytes` is given.

    total_bytes: memory of each device; None asks them. Where there are fewer GPUs than are asked for (a driver's node
    may have none), the plan has the weights of each and no arena. Activations are counted roughly (the engine measures
    them). Raises EngineError.
    """
    hf_config = load_config(config)
    here = config.device == "cpu" or (config.gpus == 1 and (config.device != "cuda" or torch.cuda.is_available()))
    here = here or (total_bytes is None and torch.cuda.device_count() >= config.gpus)
    if here:
        devices = config.torch_devices()
        precision = resolve_precision(config.precision, devices[0], hf_config)
    else:
        devices = tuple(torch.device("cuda", i) for i in range(config.gpus))
        precision = _precision_unseen(config.precision, hf_config)
    model = meta_model(config, hf_config, precision)
    layers = hf_config.get_text_config().num_hidden_layers
    states = state_shapes(model, precision)
    shapes = cached_shapes(hf_config, model).values()
    per_token, biases = _token_bytes(shapes, precision), _bias_bytes(shapes, precision, hf_config)
    all_states = slots_for(config.max_live) * sum(shape.nbytes for shape in states.values())
    reserve = chunk_bytes(config, hf_config, precision)
    if total_bytes is not None:
        memory = [(total_bytes, total_bytes)] * len(devices)
    else:
        memory = [device_memory(device) if here else (0, 0) for device in devices]
    there = [free - reserve for free, _ in memory]
    if not memory[0][1]:  # as much again as the weights, to divide by
        there = [2 * weight_bytes(model) // len(devices)] * len(devices)
    placement = place(model, devices, there)
    counts = placement.counts or (layers,)
    context = config.max_context or context_limit(hf_config)
    parts, left, first = [], [], 0
    for device, (free, total), weights, count in zip(
        devices, memory, placement.weight_bytes(model), counts, strict=True
    ):
        share = per_token * count // sum(counts)
        if device.type == "cpu":
            kept = max(reserve, int((free - weights) * (1 - HOST_SHARE)))
        else:
            longest = min(context, max(0, free - weights - reserve) // max(1, share))
            kept = reserve + longest * biases * count // sum(counts)
        here_states = all_states * count // sum(counts)
        parts.append(DevicePlan(str(device), f"{first}-{first + count - 1}", total, weights, kept, share, here_states))
        left.append(free - weights - kept)
        first += count
    plan = build_plan(config, precision, parts, left, context, estimated=True)
    return replace(plan, dequantised_from=stored_weights(config, hf_config))


def _token_bytes(shapes: Iterable[LayerShape], precision: Precision) -> int:
    """A token's KV in layers of these shapes."""
    return sum(
        shape.bytes_per_token(
            precision.dtype if precision.fp8 and shape.head_dim > MOST_FP8_HEAD else precision.kv_dtype
        )
        for shape in shapes
    )


def _bias_bytes(shapes: Iterable[LayerShape], precision: Precision, hf_config: Any) -> int:
    """What layers of these shapes keep for each token of the document that is being read in fp8."""
    if not precision.fp8:
        return 0
    heads = hf_config.get_text_config().num_attention_heads
    return sum(
        prod(bias_shape(heads, shape.kv_heads, BIAS_KEYS)) // BIAS_KEYS
        for shape in shapes
        if shape.head_dim <= MOST_FP8_HEAD
    )


def _precision_unseen(asked: str, hf_config: Any) -> Precision:
    """What a precision would be on GPUs that are not here."""
    if asked == "auto":
        # As a CPU has it, fp8 only for what is kept in fp8; what is dequantised may come to less than in bf16.
        asked = "fp8" if resolve_precision("auto", torch.device("cpu"), hf_config).fp8 else "bf16"
    name = resolve_precision(asked, torch.device("cpu"), hf_config).name
    return Precision(name, DTYPES.get(name, torch.bfloat16))
