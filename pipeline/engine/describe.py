"""Which kernels and versions the engine runs with, for result rows and benchmarks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from kernels.block_sparse_attention import choose_block_sparse_attention
from kernels.block_sparse_attention_fp8 import choose_block_sparse_attention_fp8
from kernels.decode_attention import choose_decode_attention
from kernels.decode_attention_fp8 import choose_decode_attention_fp8
from kernels.dispatch import Choice
from pipeline.engine.config import EngineConfig
from pipeline.engine.model.precision import describe_precision
from pipeline.engine.model.runner import ModelRunner
from pipeline.versions import versions
from stem_core.config import StemConfig
from stem_core.estimators import ESTIMATORS
from stem_core.fp8 import describe_fp8
from stem_core.fuse import describe_fusion
from stem_core.policy import DENSE_BLOCK_SIZE, cutting_window
from stem_core.selection import selection_rule

# Share of the layers of attention, without a window, up to which a model counts as one that has few such.
FEW = 0.25


def describe_engine(runner: ModelRunner, config: EngineConfig) -> dict[str, Any]:
    """A loaded model and how it runs, as plain values."""
    attention = config.attention
    return {
        "model": config.model,
        "adapter": config.adapter,
        "rope_scaling": config.rope_scaling,
        "device": ", ".join(map(str, runner.devices)),
        "gpu": _gpus(runner.devices),
        "precision": describe_precision(runner.precision, runner.calibration)
        + (f", weights dequantised from {runner.weights}" if runner.weights else ""),
        "dtype": str(runner.dtype).removeprefix("torch."),
        "fp8": describe_fp8(runner.model) | _describe_layers(runner) if runner.precision.fp8 else None,
        "attention": "dense" if attention is None else "stem",
        "attention_config": None if attention is None else attention.to_dict(),
        "fusion": describe_fusion(runner.model),
        "versions": versions(),
    }


def _describe_layers(runner: ModelRunner) -> dict[str, Any]:
    """{"wide_layers": [...], "attention_errors": [...] of all layers}, see stem_core.kv_scales."""
    found = runner.calibration
    return {"wide_layers": list(found.wide), "attention_errors": [round(error, 4) for error in found.errors.values()]}


def _gpus(devices: Sequence[torch.device]) -> str:
    """Name of the GPU, or "2 x " and the name of both; empty for a CPU."""
    names = Counter(torch.cuda.get_device_name(device) for device in devices if device.type == "cuda")
    return " + ".join(name if count == 1 else f"{count} x {name}" for name, count in names.items())


def describe_kernels(runner: ModelRunner, prompt_tokens: int, dense: bool = False) -> dict[str, str]:
    """Implementation of each operation on the runner's device, dtype and head size, for a prompt of so many tokens.

    dense: no layer is sparse, whatever the model's attention says. Where layers differ in their implementation of
    prefill (dense ones beside sparse ones, sliding windows), all are named; where some are wide, those of either kind.
    """
    choices = _choices(runner, prompt_tokens, dense)
    chosen = {
        name: " + ".join(
            kind + " and ".join(dict.fromkeys(map(str, found))) for kind, found in by_kind.items() if found
        )
        for name, by_kind in choices.items()
    }
    if runner.precision.fp8:
        fast = describe_fp8(runner.model)["fast_accumulation"]
        chosen["linears"] = f"fp8 with {'fast' if fast else 'precise'} accumulation"
    return chosen


def slower_paths(runner: ModelRunner, prompt_tokens: int) -> list[str]:
    """A sentence for each operation that runs on a slower path than there is; nothing on a CPU."""
    sentences = []
    for name, by_kind in _choices(runner, prompt_tokens, dense=False).items():
        found = [choice for kind in by_kind.values() for choice in kind]
        sentences += [choice.slower(name if len(found) == 1 else f"{name} of some layers") for choice in found]
    return [sentence for sentence in dict.fromkeys(sentences) if sentence] + _plain_linear_attention(runner)


def few_whole_layers(runner: ModelRunner) -> list[str]:
    """A sentence where most layers have a window and sparse reading is left to the few others; none otherwise."""
    windows = [window for _, window in runner.layers]
    whole = sum(window is None for window in windows)
    sparse = any(policy.config is not None for policy, window in runner.layers if window is None)
    if not sparse or whole > FEW * len(windows):
        return []
    return [
        f"only {whole} of this model's {len(windows)} layers of attention look beyond a window: sparse reading was "
        "seen to lose more on such a model than on others (docs/quality.md, Gemma 3 270M); jobs.audit measures it on "
        "your documents, attention dense reads exactly"
    ]


def _plain_linear_attention(runner: ModelRunner) -> list[str]:
    """A sentence where transformers computes linear attention in plain torch, for want of a library; none on a CPU."""
    if not runner.states or runner.device.type != "cuda":
        return []
    wanted = {"causal_conv1d": "causal-conv1d"}
    for module in runner.model.modules():
        if hasattr(module, "head_k_dim"):
            wanted["fla"] = "flash-linear-attention"
        elif hasattr(module, "ssm_state_size"):
            wanted["mamba_ssm"] = "mamba-ssm"
    missing = [name for package, name in wanted.items() if find_spec(package) is None]
    if not missing:
        return []
    return [f"linear attention runs in plain torch, not in kernels: {' and '.join(missing)} not installed (optional)"]


def _choices(runner: ModelRunner, prompt_tokens: int, dense: bool) -> dict[str, dict[str, list[Choice]]]:
    """The implementations of each operation, by what they are called with ("fp8 ", say); different ones once.

    Windows and budgets are those of stem_core.policy, by which attention itself goes.
    """
    queries = {
        size: torch.empty(1, 1, 1, size, dtype=runner.dtype, device=runner.device)
        for size in dict.fromkeys(shape.head_dim for shape in runner.shapes.values())
    }
    sparse: dict[int, StemConfig] = {}  # by head size
    fp8: dict[tuple[int, int, int | None], None] = {}  # head and block size and window, in the order of the layers
    wide: dict[tuple[int, int, int | None], None] = {}
    for policy, window in runner.layers:
        size = runner.shapes[runner.sources.get(policy.layer, policy.layer)].head_dim
        block_size = DENSE_BLOCK_SIZE
        if not dense and policy.budget(prompt_tokens, window).budgets is not None:
            assert policy.config is not None
            sparse[size], block_size = policy.config, policy.config.block_size
        (fp8 if runner.is_fp8(policy.layer) else wide)[size, block_size, cutting_window(prompt_tokens, window)] = None
    other = f"{runner.precision.dtype_name} " if runner.precision.fp8 else ""
    found: dict[str, dict[str, list[Choice]]] = {
        "prefill": {
            "fp8 ": [
                choose_block_sparse_attention_fp8(queries[size], block_size, window=window, dtype=runner.dtype)
                for size, block_size, window in fp8
            ],
            other: [
                choose_block_sparse_attention(queries[size], block_size, window=window)
                for size, block_size, window in wide
            ],
        },
        "decode": {
            "fp8 ": [choose_decode_attention_fp8(queries[size][0]) for size, _, _ in fp8],
            other: [choose_decode_attention(queries[size][0]) for size, _, _ in wide],
        },
    }
    if fp8:
        found["shared decode"] = {
            "fp8 ": [
                choose_decode_attention_fp8(queries[size][0], prefixes=True, window=window) for size, _, window in fp8
            ]
        }
    if sparse:
        stem = next(iter(sparse.values()))
        estimator = ESTIMATORS[stem.estimator]
        found["scores"] = {f"{stem.estimator} ": [estimator.choose(queries[size], stem) for size in sparse]}
        found["selection"] = {"": [selection_rule(stem).choose(runner.device)]}
    return {
        name: {kind: list(dict.fromkeys(choices)) for kind, choices in by_kind.items()}
        for name, by_kind in found.items()
    }
