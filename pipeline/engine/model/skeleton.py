"""What a model's config alone tells of it: its modules without memory, what a token and a chunk of them take."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.engine.config import EngineConfig
from pipeline.engine.kv.arena import LayerShape
from pipeline.engine.model.precision import Precision
from stem_core.fp8 import quantize_linears

# Allocator fragmentation, cuBLAS workspaces and what else a process takes unasked.
SLACK_BYTES = 512 * 2**20


def skeleton(config: EngineConfig, hf_config: Any, precision: Precision) -> nn.Module:
    """The architecture on the device "meta", its linears in fp8 if that is the precision."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            hf_config, dtype=precision.dtype, trust_remote_code=config.trust_remote_code
        )
        return quantize_linears(model) if precision.fp8 else model


def layer_shape(hf_config: Any) -> LayerShape:
    """What a layer caches of a token, as far as the config tells."""
    text = hf_config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return LayerShape(getattr(text, "num_key_value_heads", None) or heads, head_dim, head_dim)


def chunk_bytes(config: EngineConfig, hf_config: Any, precision: Precision) -> int:
    """Roughly what a prefill chunk takes beside weights and KV (the engine measures it)."""
    text = hf_config.get_text_config()
    widest = 3 * getattr(text, "intermediate_size", 4 * text.hidden_size) + 6 * text.hidden_size
    return config.chunk_tokens * widest * precision.dtype.itemsize + SLACK_BYTES


def rooms(devices: Sequence[torch.device], reserve: int, total: int | None = None) -> list[int]:
    """Bytes for weights and KV of each stage, beside `reserve` bytes on each device.

    total: memory of each device; None asks for what is free there. Stages on one device share what it has.
    """

    def free(device: torch.device) -> int:
        if total is not None:
            return total
        return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory()[0]

    stages = Counter(devices)
    # Each device is asked once: what is free changes from moment to moment, and its stages are to share it equally.
    shares = {device: (free(device) - reserve) // count for device, count in stages.items()}
    return [shares[device] for device in devices]


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
