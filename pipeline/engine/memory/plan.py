"""How the memory of the device is divided: weights, a reserve for a prefill chunk and decoding, KV for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from pipeline.engine.config import EngineConfig, EngineError
from pipeline.engine.kv.arena import ALIGNMENT, aligned
from pipeline.engine.model.loading import context_limit, load_config
from pipeline.engine.model.placement import place, tensor_bytes
from pipeline.engine.model.precision import DTYPES, Precision, check_fp8_attention, resolve_precision
from pipeline.engine.model.skeleton import chunk_bytes, host_memory, layer_shape, rooms, skeleton

GIB = 2**30
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
    activations, decode graphs and the allocator. bytes_per_token: KV of all layers. max_context: longest document,
    prompt and output.
    estimated: made from the config alone, before anything was loaded or measured. precision: of weights and KV.
    devices: of a model spread over several, each; a token lies on all of them, so that the fullest sets arena_tokens.
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
        if not self.total_bytes:
            return [
                f"memory of {len(parts)} GPUs ({kind}; there are not so many here to ask), precision {self.precision}",
                f"  weights  {self.weight_bytes / GIB:.2f} GiB",
                *parts,
            ]
        kv = f"{self.arena_bytes / GIB:.2f} GiB = {self.arena_tokens:,} tokens x {self.bytes_per_token:,} bytes"
        return [
            f"memory of {self.device} ({kind}): {self.total_bytes / GIB:.1f} GiB, precision {self.precision}",
            f"  weights  {self.weight_bytes / GIB:.2f} GiB",
            f"  reserve  {self.reserve_bytes / GIB:.2f} GiB for activations and decoding",
            f"  KV       {kv}",
            *([ESTIMATED_IN_FP8] if self.estimated and self.precision == "fp8" else []),
            *parts,
            f"  {context}; at once: {self.documents(32_768)} of 32K, {self.documents(131_072)} of 128K",
        ]


def fit_arena(config: EngineConfig, free_bytes: int, bytes_per_token: int, context: int, where: str = "") -> int:
    """Tokens of KV that `free_bytes` hold, at most what `max_live` documents of `context` tokens could use.

    where: names the device for a message, if there are several.
    Raises EngineError if not even the smallest extent fits, or the arena asked for does not.
    """
    on = f" on {where}" if where else ""
    if config.arena_tokens is not None:
        wanted = aligned(config.arena_tokens)
        if (wanted + ALIGNMENT) * bytes_per_token > free_bytes:
            raise EngineError(
                f"arena_tokens={config.arena_tokens} need {wanted * bytes_per_token / GIB:.2f} GiB, but "
                f"{max(0, free_bytes) / GIB:.2f} GiB are free for KV{on}; lower it or leave it out"
            )
        return wanted
    fits = free_bytes // bytes_per_token // ALIGNMENT * ALIGNMENT - ALIGNMENT
    tokens = min(fits, config.max_live * aligned(context))
    if tokens < ALIGNMENT:
        raise EngineError(
            f"{max(0, free_bytes) / GIB:.2f} GiB are left for KV at {bytes_per_token:,} bytes a token{on}: too little; "
            f"use a smaller model or chunk_tokens, {'more GPUs a worker, ' if where else ''}or precision fp8"
        )
    return tokens


def estimate_plan(config: EngineConfig, total_bytes: int | None = None) -> MemoryPlan:
    """The plan from the model's config alone: nothing is loaded and no GPU is needed if `total_bytes` is given.

    Activations are counted roughly (the engine measures them). Raises EngineError.
    """
    hf_config = load_config(config)
    if config.gpus > 1:
        return _estimate_split(config, hf_config, total_bytes)
    device = config.torch_device()
    precision = resolve_precision(config.precision, device, hf_config)
    free = total_bytes
    if free is None or total_bytes is None:
        free, total_bytes = torch.cuda.mem_get_info(device) if device.type == "cuda" else host_memory()
    weights = _weight_bytes(hf_config, config, precision)
    per_token = _bytes_per_token(config, hf_config, precision)
    reserve = chunk_bytes(config, hf_config, precision)
    if device.type == "cpu":
        reserve = max(reserve, int((free - weights) * (1 - HOST_SHARE)))
    context = config.max_context or context_limit(hf_config)
    tokens = fit_arena(config, free - weights - reserve, per_token, context)
    return MemoryPlan(
        device=str(device),
        total_bytes=total_bytes,
        weight_bytes=weights,
        reserve_bytes=reserve,
        bytes_per_token=per_token,
        arena_tokens=tokens,
        max_context=min(tokens, context),
        max_live=config.max_live,
        estimated=True,
        precision=precision.name,
    )


def _estimate_split(config: EngineConfig, hf_config: Any, total_bytes: int | None) -> MemoryPlan:
    """The estimate for a model spread over GPUs. total_bytes: of each; None asks them.

    Where they are not (a driver's node may have none), the plan has the weights of each and no arena.
    """
    here = torch.cuda.device_count() >= config.gpus and total_bytes is None
    if here or config.device == "cpu":
        devices = config.torch_devices()
        precision = resolve_precision(config.precision, devices[0], hf_config)
    else:
        devices = tuple(torch.device("cuda", i) for i in range(config.gpus))
        precision = _precision_unseen(config.precision, hf_config)
    model = skeleton(config, hf_config, precision)
    per_token = _bytes_per_token(config, hf_config, precision)
    reserve = chunk_bytes(config, hf_config, precision)
    if here or total_bytes is not None:
        there = rooms(devices, reserve, total_bytes)
    else:
        there = [2 * tensor_bytes(model) // config.gpus] * config.gpus  # as much again as the weights, to divide by
    placement = place(model, devices, there)
    parts = [
        DevicePlan(
            device=str(device),
            layers=layers,
            total_bytes=torch.cuda.mem_get_info(device)[1] if here else total_bytes or 0,
            weight_bytes=weights,
            reserve_bytes=reserve,
            bytes_per_token=per_token * count // sum(placement.counts),
        )
        for device, layers, weights, count in zip(
            devices, placement.spans(), placement.weight_bytes, placement.counts, strict=True
        )
    ]
    context = config.max_context or context_limit(hf_config)
    if not parts[0].total_bytes:
        return replace(_sum(config, precision, parts, 0, context), estimated=True)
    free = [room - part.weight_bytes for room, part in zip(there, parts, strict=True)]
    return replace(combine(config, precision, parts, free, context), estimated=True)


def combine(
    config: EngineConfig, precision: Precision, parts: Sequence[DevicePlan], free: Sequence[int], context: int
) -> MemoryPlan:
    """The plan of several devices: the arena has the tokens that the fullest of them holds.

    free: bytes for KV on each. Raises EngineError as fit_arena does.
    """
    tokens = min(
        fit_arena(config, room, part.bytes_per_token, context, part.device)
        for room, part in zip(free, parts, strict=True)
        if part.bytes_per_token
    )
    return _sum(config, precision, parts, tokens, min(tokens, context))


def _sum(
    config: EngineConfig, precision: Precision, parts: Sequence[DevicePlan], tokens: int, context: int
) -> MemoryPlan:
    return MemoryPlan(
        device=", ".join(part.device for part in parts),
        total_bytes=sum(part.total_bytes for part in parts),
        weight_bytes=sum(part.weight_bytes for part in parts),
        reserve_bytes=sum(part.reserve_bytes for part in parts),
        bytes_per_token=sum(part.bytes_per_token for part in parts),
        arena_tokens=tokens,
        max_context=context,
        max_live=config.max_live,
        precision=precision.name,
        devices=tuple(parts),
    )


def _bytes_per_token(config: EngineConfig, hf_config: Any, precision: Precision) -> int:
    """KV of all layers. Raises EngineError for heads or blocks that the fp8 kernels cannot take."""
    shape = layer_shape(hf_config)
    if precision.fp8:
        check_fp8_attention({0: shape}, config.attention)
    return hf_config.get_text_config().num_hidden_layers * shape.bytes_per_token(precision.kv_dtype)


def _precision_unseen(asked: str, hf_config: Any) -> Precision:
    """What a precision would be on GPUs that are not here."""
    if asked == "auto":
        asked = "bf16" if getattr(hf_config, "quantization_config", None) is None else "fp8"
    name = resolve_precision(asked, torch.device("cpu"), hf_config).name
    return Precision(name, DTYPES.get(name, torch.bfloat16))


def _weight_bytes(hf_config: Any, config: EngineConfig, precision: Precision) -> int:
    """Parameters of the architecture, built without memory; tied ones once."""
    return sum(parameter.nbytes for parameter in skeleton(config, hf_config, precision).parameters())
