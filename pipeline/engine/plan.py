"""How the memory of the device is divided: weights, a reserve for a prefill chunk and decoding, KV for the rest."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.engine.arena import ALIGNMENT, LayerShape, aligned
from pipeline.engine.config import EngineConfig, EngineError
from pipeline.engine.loading import context_limit, load_config
from pipeline.engine.precision import Precision, check_fp8_attention, resolve_precision
from stem_core.fp8 import quantize_linears

GIB = 2**30
# On a CPU the arena shares memory with everything else on the machine.
HOST_SHARE = 0.4
# Allocator fragmentation, cuBLAS workspaces and what else a process takes unasked.
SLACK_BYTES = 512 * 2**20
# A measured peak is stretched by this, since other lengths split memory differently.
RESERVE_FACTOR = 1.15


@dataclass(frozen=True)
class MemoryPlan:
    """Where the device's memory goes; all sizes in bytes, lengths in tokens.

    total_bytes: memory of the device (of the host, on a CPU). reserve_bytes: kept free for activations, decode
    graphs and the allocator. bytes_per_token: KV of all layers. max_context: longest document, prompt and output.
    estimated: made from the config alone, before anything was loaded or measured. precision: of weights and KV.
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

    @property
    def arena_bytes(self) -> int:
        """KV of the whole arena."""
        return self.arena_tokens * self.bytes_per_token

    def documents(self, tokens: int) -> int:
        """How many documents of `tokens` tokens (prompt and output) decode at the same time."""
        if tokens > self.max_context:
            return 0
        return min(self.max_live, self.arena_tokens // aligned(tokens))

    def to_dict(self) -> dict[str, Any]:
        """Fields and derived sizes as plain values."""
        return asdict(self) | {"arena_bytes": self.arena_bytes}

    def lines(self) -> list[str]:
        """The plan for a person."""
        kind = "estimated before loading" if self.estimated else "after loading"
        context = f"{self.max_context:,} tokens a document at most (prompt and output)"
        kv = f"{self.arena_bytes / GIB:.2f} GiB = {self.arena_tokens:,} tokens x {self.bytes_per_token:,} bytes"
        return [
            f"memory of {self.device} ({kind}): {self.total_bytes / GIB:.1f} GiB, precision {self.precision}",
            f"  weights  {self.weight_bytes / GIB:.2f} GiB",
            f"  reserve  {self.reserve_bytes / GIB:.2f} GiB for activations and decoding",
            f"  KV       {kv}",
            f"  {context}; at once: {self.documents(32_768)} of 32K, {self.documents(131_072)} of 128K",
        ]


def host_memory() -> tuple[int, int]:
    """(available, total) bytes of the host, or of its container where that is smaller."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    total = available = pages * size
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        bound = int(limit.read_text())
        total, available = min(total, bound), min(available, max(0, bound - int(used.read_text())))
    return available, total


def fit_arena(config: EngineConfig, free_bytes: int, bytes_per_token: int, context: int) -> int:
    """Tokens of KV that `free_bytes` hold, at most what `max_live` documents of `context` tokens could use.

    Raises EngineError if not even the smallest extent fits, or the arena asked for does not.
    """
    if config.arena_tokens is not None:
        wanted = aligned(config.arena_tokens)
        if (wanted + ALIGNMENT) * bytes_per_token > free_bytes:
            raise EngineError(
                f"arena_tokens={config.arena_tokens} need {wanted * bytes_per_token / GIB:.2f} GiB, but "
                f"{max(0, free_bytes) / GIB:.2f} GiB are free for KV; lower it or leave it out"
            )
        return wanted
    fits = free_bytes // bytes_per_token // ALIGNMENT * ALIGNMENT - ALIGNMENT
    tokens = min(fits, config.max_live * aligned(context))
    if tokens < ALIGNMENT:
        raise EngineError(
            f"{max(0, free_bytes) / GIB:.2f} GiB are left for KV at {bytes_per_token:,} bytes a token: too little; use "
            "a smaller model or chunk_tokens, or precision fp8"
        )
    return tokens


def estimate_plan(config: EngineConfig, total_bytes: int | None = None) -> MemoryPlan:
    """The plan from the model's config alone: nothing is loaded and no GPU is needed if `total_bytes` is given.

    Activations are counted roughly (the engine measures them). Raises EngineError.
    """
    hf_config = load_config(config)
    device = config.torch_device()
    precision = resolve_precision(config.precision, device, hf_config)
    free = total_bytes
    if free is None or total_bytes is None:
        free, total_bytes = torch.cuda.mem_get_info(device) if device.type == "cuda" else host_memory()
    weights = _weight_bytes(hf_config, config, precision)
    text = hf_config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if precision.fp8:
        check_fp8_attention({0: LayerShape(kv_heads, head_dim, head_dim)}, config.attention)
    per_token = text.num_hidden_layers * kv_heads * head_dim * 2 * precision.kv_dtype.itemsize
    widest = 3 * getattr(text, "intermediate_size", 4 * text.hidden_size) + 6 * text.hidden_size
    reserve = config.chunk_tokens * widest * precision.dtype.itemsize + SLACK_BYTES
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


def _weight_bytes(hf_config: Any, config: EngineConfig, precision: Precision) -> int:
    """Parameters of the architecture, built without memory; tied ones once."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            hf_config, dtype=precision.dtype, trust_remote_code=config.trust_remote_code
        )
        if precision.fp8:
            quantize_linears(model)
    return sum(parameter.nbytes for parameter in model.parameters())
