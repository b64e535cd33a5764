"""Where the time of a long prefill goes: GPU time by group of kernels, and the gaps in which nothing runs."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from pipeline.engine import Engine
from tools.benchmark.engine.phases import Event, gpu_events, random_prompts, run_documents, union_length

KERNELS = Path(__file__).parents[3] / "kernels"
# Folders and files of kernels/, whose GPU functions are found by name in their sources.
OPERATIONS = {
    "linears": ("grouped_linear",),
    "attention": (
        "block_sparse_attention",
        "block_sparse_attention_fp8",
        "decode_attention",
        "decode_attention_fp8",
        "_common/decode_triton.py",
    ),
    "selection": ("oam_scores", "sample_scores", "block_selection"),
    "elementwise": ("rms_norm", "silu_mul", "rope", "quantize", "fp8_heads"),
}
# What libraries call theirs. The names of matrix products come first: they can hold "elementwise" too (epilogues).
PATTERNS = (
    ("linears", re.compile(r"gemm|cutlass|nvjet|xmma|scaled_mm|cublas|splitk|gemv", re.IGNORECASE)),
    (
        "elementwise",
        re.compile(r"at::native|at_cuda|memcpy|memset|elementwise|vectorized|reduce|index|copy|fill", re.I),
    ),
)
JIT = re.compile(r"^@(?:triton|gluon)\.jit(?:\([^)]*\))?[^\n]*\ndef (\w+)", re.MULTILINE)
GROUPS = ("linears", "attention", "selection", "elementwise", "other")
TOP = 5


@lru_cache(maxsize=1)
def own_kernels() -> dict[str, str]:
    """Name of each GPU function in kernels/ -> its group."""
    names = {}
    for group, folders in OPERATIONS.items():
        for folder in folders:
            place = KERNELS / folder
            for path in place.glob("*.py") if place.is_dir() else [place]:
                for name in JIT.findall(path.read_text()):
                    names[name] = group
    return names


def group_of(name: str) -> str:
    """The group of a kernel by its name in the profile."""
    own = own_kernels().get(name)
    if own is not None:
        return own
    return next((group for group, pattern in PATTERNS if pattern.search(name)), "other")


def breakdown(events: Iterable[Event]) -> dict[str, Any]:
    """Milliseconds by group, the largest kernels of each, and what of the span from first to last is idle.

    Kernels on two streams at once count twice in their groups and once in `busy_ms`.
    """
    events = list(events)
    by_group: dict[str, Counter[str]] = {group: Counter() for group in GROUPS}
    for name, start, end in events:
        by_group[group_of(name)][name] += end - start
    wall = max(end for *_, end in events) - min(start for _, start, _ in events)
    busy = union_length([(start, end) for _, start, end in events])
    return {
        "wall_ms": wall / 1e6,
        "busy_ms": busy / 1e6,
        "gaps_ms": (wall - busy) / 1e6,
        "groups_ms": {group: sum(names.values()) / 1e6 for group, names in by_group.items()},
        "launches": len(events),
        "largest": {
            group: [{"name": name[:100], "ms": ns / 1e6} for name, ns in names.most_common(TOP)]
            for group, names in by_group.items()
            if names
        },
    }


def profile_prefill(engine: Engine, length: int, vocabulary: int) -> dict[str, Any] | None:
    """One document of `length` tokens and one new token under the profiler; None on a CPU.

    host_ms: from add() to the end as the host sees it; the profiler makes launches slower, so gaps are an upper bound.
    """
    if engine.describe()["device"] == "cpu":
        return None
    prompts = random_prompts([length], vocabulary)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        begin = time.perf_counter()
        run_documents(engine, prompts, 1)
        torch.cuda.synchronize()
        host = time.perf_counter() - begin
    events = gpu_events(profiler)
    if not events:
        return None
    return {"prompt_tokens": length, "host_ms": 1000 * host, **breakdown(events)}
