"""The engine's side: latency of one document, decode steps by batch, a whole job, what fills the GPU."""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pipeline.engine import Completion, Engine, Request
from pipeline.engine.probes.timing import decode_step_ms
from pipeline.errors import JobError

UTILISATION_PERIOD = 0.2
TOP_KERNELS = 14

# (name, start, end), in nanoseconds.
Event = tuple[str, int, int]


def random_prompts(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[np.ndarray]:
    """Token ids drawn evenly from the vocabulary."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocabulary, size=length) for length in lengths]


def run_documents(engine: Engine, prompts: list[np.ndarray], new_tokens: int) -> tuple[float, list[Completion]]:
    """All documents at once: seconds from the first add() to the last completion, and the completions in order.

    Raises JobError if one of them does not end well.
    """
    begin = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), prompt, new_tokens))
    done: dict[str, Completion] = {}
    while engine.has_work:
        done.update((completion.request_id, completion) for completion in engine.step())
    seconds = time.perf_counter() - begin
    bad = [completion for completion in done.values() if completion.status != "ok"]
    if bad:
        raise JobError(f"document {bad[0].request_id} ended with {bad[0].status}: {bad[0].error}")
    return seconds, [done[str(i)] for i in range(len(prompts))]


def warm_up(engine: Engine, vocabulary: int) -> None:
    """One document of three chunks, the last part-filled, and a short one, which is read densely, so that nothing is
    compiled or loaded while it is timed.
    """
    chunk = int(engine.describe()["chunk_tokens"])
    for length in (min(2 * chunk + 100, engine.max_context - 4), min(700, engine.max_context - 4)):
        run_documents(engine, random_prompts([length], vocabulary, seed=1), 4)


def latency(engine: Engine, lengths: Sequence[int], new_tokens: int, vocabulary: int) -> list[dict[str, Any]]:
    """Each length as the only document: time to first token, decode steps, density, peak memory."""
    points = []
    for length, prompt in zip(lengths, random_prompts(lengths, vocabulary), strict=True):
        _, (done,) = run_documents(engine, [prompt], new_tokens)
        points.append(
            {
                "prompt_tokens": length,
                "first_token_seconds": done.queue_seconds + done.prefill_seconds,
                "decode_step_ms": 1000 * done.decode_seconds / (done.output_tokens - 1),
                "measured_steps": done.output_tokens - 1,
                "peak_bytes": done.peak_gpu_bytes,
                "attention": done.attention,
                "density": done.density,
                "kernel": done.kernel,
            }
        )
    return points


def decode_by_batch(engine: Engine, lengths: Sequence[int], batches: Sequence[int]) -> list[dict[str, Any]]:
    """Milliseconds of a decode step for each batch of equally long documents that fits the arena."""
    points = []
    for length in lengths:
        for documents in batches:
            milliseconds = decode_step_ms(engine, [length] * documents)
            if milliseconds is not None:
                points.append({"prompt_tokens": length, "documents": documents, "step_ms": milliseconds})
    return points


def job(engine: Engine, lengths: Sequence[int], new_tokens: int, vocabulary: int) -> dict[str, Any]:
    """The whole job: throughput, latencies, and how busy the GPUs say they are."""
    with Utilisation([torch.device(name) for name in engine.describe()["device"].split(", ")]) as utilisation:
        seconds, done = run_documents(engine, random_prompts(lengths, vocabulary), new_tokens)
    new = sum(completion.output_tokens for completion in done)
    prompt = sum(completion.prompt_tokens for completion in done)
    return {
        "documents": len(done),
        "prompt_tokens": list(lengths),
        "new_tokens": new_tokens,
        "seconds": seconds,
        "documents_per_hour": 3600 * len(done) / seconds,
        "output_tokens_per_second": new / seconds,
        "prompt_tokens_per_second": prompt / seconds,
        "prefill_seconds": sum(completion.prefill_seconds for completion in done),
        "mean_decode_step_ms": 1000 * statistics.mean(c.decode_seconds / max(1, c.output_tokens - 1) for c in done),
        "largest_queue_seconds": max(completion.queue_seconds for completion in done),
        "peak_bytes": max(completion.peak_gpu_bytes for completion in done),
        "density": statistics.mean(c.density for c in done if c.density is not None),
        "gpu_utilisation": utilisation.mean(),
    }


def gpu_busy(engine: Engine, lengths: Sequence[int], new_tokens: int, vocabulary: int) -> dict[str, Any] | None:
    """A small job under the profiler: share of its time in which the GPU ran something, and its largest kernels.

    The profiler costs time of its own, so the share is a lower bound. None on a CPU.
    """
    if engine.describe()["device"] == "cpu":
        return None
    prompts = random_prompts(lengths, vocabulary)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run_documents(engine, prompts, new_tokens)
        torch.cuda.synchronize()
    events = gpu_events(profiler)
    if not events:
        return None
    by_name: Counter[str] = Counter()
    for name, start, end in events:
        by_name[name] += end - start
    wall = max(end for *_, end in events) - min(start for _, start, _ in events)
    total = sum(by_name.values())
    return {
        "how": f"torch profiler, {len(prompts)} documents of {max(lengths):,} tokens, {new_tokens} new tokens each",
        "busy_share": union_length([(start, end) for _, start, end in events]) / wall,
        "kernels": [
            {"name": name[:120], "ms": nanoseconds / 1e6, "share": nanoseconds / total}
            for name, nanoseconds in by_name.most_common(TOP_KERNELS)
        ],
    }


def gpu_events(profiler: torch.profiler.profile) -> list[Event]:
    """What the GPU ran while the profiler was on."""
    return [
        (event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.device_type() == torch.autograd.DeviceType.CUDA
    ]


def union_length(spans: list[tuple[int, int]]) -> int:
    """Length of the union of [start, end) spans."""
    covered, reach = 0, None
    for start, end in sorted(spans):
        first = start if reach is None else max(start, reach)
        if end > first:
            covered += end - first
            reach = end
    return covered


class Utilisation:
    """Samples the utilisation (share of time in which any kernel ran) of all devices in a thread; GPUs only."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = devices
        self._samples: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Utilisation:
        if self._devices[0].type == "cuda":
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def mean(self) -> float | None:
        """Between 0 and 1; None where the driver cannot be asked."""
        return statistics.mean(self._samples) / 100 if self._samples else None

    def _sample(self) -> None:
        while not self._stop.wait(UTILISATION_PERIOD):
            try:
                self._samples.extend(map(torch.cuda.utilization, self._devices))
            except Exception:  # nvidia-ml-py is missing or the driver does not answer: then there is no figure
                return
