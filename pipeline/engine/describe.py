"""Which kernels and versions the engine runs with, for result rows and benchmarks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from kernels.block_sparse_attention import choose_block_sparse_attention
from kernels.block_sparse_attention_fp8 import choose_block_sparse_attention_fp8
from kernels.decode_attention import choose_decode_attention
from kernels.decode_attention_fp8 import choose_decode_attention_fp8
from pipeline.engine.config import EngineConfig
from pipeline.engine.runner import ModelRunner
from pipeline.versions import versions
from stem_core.config import StemConfig
from stem_core.estimators import ESTIMATORS
from stem_core.fp8 import describe_fp8
from stem_core.fuse import describe_fusion
from stem_core.policy import DENSE_BLOCK_SIZE
from stem_core.selection import selection_rule


def describe_engine(runner: ModelRunner, config: EngineConfig) -> dict[str, Any]:
    """A loaded model and how it runs, as plain values."""
    attention = config.attention
    return {
        "model": config.model,
        "device": ", ".join(map(str, runner.devices)),
        "gpu": _gpus(runner.devices),
        "precision": runner.precision.name,
        "dtype": str(runner.dtype).removeprefix("torch."),
        "fp8": describe_fp8(runner.model) if runner.precision.fp8 else None,
        "attention": "dense" if attention is None else "stem",
        "attention_config": None if attention is None else attention.to_dict(),
        "fusion": describe_fusion(runner.model),
        "versions": versions(),
    }


def _gpus(devices: Sequence[torch.device]) -> str:
    """Name of the GPU, or "2 x " and the name of both; empty for a CPU."""
    names = Counter(torch.cuda.get_device_name(device) for device in devices if device.type == "cuda")
    return " + ".join(name if count == 1 else f"{count} x {name}" for name, count in names.items())


def describe_kernels(runner: ModelRunner, attention: StemConfig | None) -> dict[str, str]:
    """Implementation of each operation on the runner's device, dtype and head size.

    attention: the model's, or None for what runs on a prompt that is dense anyway. Where layers differ in their
    implementation of prefill (dense ones beside sparse ones, sliding windows), all are named.
    """
    shape = next(iter(runner.shapes.values()))
    q = torch.empty(1, 1, 1, shape.head_dim, dtype=runner.dtype, device=runner.device)
    prefill = []
    for policy, window in runner.layers:
        sparse = attention is not None and policy.layer >= attention.dense_layers and window is None
        block_size = attention.block_size if attention is not None and sparse else DENSE_BLOCK_SIZE
        if runner.precision.fp8:
            choice = choose_block_sparse_attention_fp8(q, block_size, window=window, dtype=runner.dtype)
        else:
            choice = choose_block_sparse_attention(q, block_size, window=window)
        prefill.append(str(choice))
    kind = "fp8 " if runner.precision.fp8 else ""
    decode = choose_decode_attention_fp8(q[0]) if runner.precision.fp8 else choose_decode_attention(q[0])
    chosen = {"prefill": kind + " and ".join(dict.fromkeys(prefill)), "decode": f"{kind}{decode}"}
    if attention is not None:
        chosen["scores"] = f"{attention.estimator} {ESTIMATORS[attention.estimator].choose(q)}"
        chosen["selection"] = str(selection_rule(attention).choose(runner.device))
    if runner.precision.fp8:
        fast = describe_fp8(runner.model)["fast_accumulation"]
        chosen["linears"] = f"fp8 with {'fast' if fast else 'precise'} accumulation"
    return chosen
