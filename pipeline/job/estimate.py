"""How long a job will take, for its dry run: from rows that were measured, or from the benchmarks of the same GPU.

Where neither knows the GPU and a model of this size, nothing is said: no figure here is a guess at hardware.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.job.progress import duration
from pipeline.results.parts import part_names, read_columns
from pipeline.results.store import Store
from stem_core.budget import prompt_budget
from stem_core.config import StemConfig

_COLUMNS = (
    "status", "model", "gpu", "precision", "worker", "prompt_tokens", "prefix_tokens", "output_tokens",
    "prefill_seconds", "started_at", "finished_at",
)  # fmt: skip
# A model counts as of a measured one's size if its weights take so many times as much memory.
LIKE = (0.8, 1.25)
GIB = 1 << 30


@dataclass(frozen=True)
class Speed:
    """What a worker's time goes into.

    lengths, seconds: of prompts, ascending, and seconds of prefill for a token of one; shorter and longer prompts are
    taken to cost as much a token as the nearest. output_seconds: a worker's other time for a generated token.
    outputs: tokens of an output, None if that is not known. source: where this was measured.
    """

    lengths: tuple[int, ...]
    seconds: tuple[float, ...]
    output_seconds: float
    outputs: float | None
    source: str

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Seconds for prompts of `tokens` tokens, float64 [prompts]."""
        return np.asarray(tokens * np.interp(np.log2(np.maximum(tokens, 1)), np.log2(self.lengths), self.seconds))


@dataclass(frozen=True)
class Benchmark:
    """A table of docs/speed.md: one GPU, its name as CUDA has it; one model, dense, of `weights` GiB.

    first_token: seconds by tokens of the prompt, alone. job_seconds: of 16 documents, four of each of JOB_LENGTHS, with
    256 tokens generated for each.
    """

    gpu: str
    weights: float
    precision: str
    attention: str
    what: str
    first_token: tuple[tuple[int, float], ...]
    job_seconds: float

    def speed(self) -> Speed:
        """As of a job: what is not prefill there is the time of the outputs."""
        lengths = tuple(length for length, _ in self.first_token)
        seconds = tuple(first / length for length, first in self.first_token)
        alone = Speed(lengths, seconds, 0.0, None, "")
        rest = self.job_seconds - 4 * float(alone.prefill(np.array(JOB_LENGTHS)).sum())
        source = f"{PAGE}: {self.what}, {self.precision}, on one {self.gpu}; prompts of 32,768 to 131,072"
        return Speed(lengths, seconds, rest / JOB_OUTPUTS, None, source + " tokens, 256 new ones each")


# Documents in the smallest share that is worth measuring first.
SHARE = 8
PAGE = "docs/speed.md"
JOB_LENGTHS = (32768, 65536, 98304, 131072)
JOB_OUTPUTS = 16 * 256
_H100, _H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
_STEM = "Llama-3.1-8B shape, Stem at density 0.297"
_SAMPLED = "Llama-3.1-8B shape, preset sampled"
_DENSE = "Llama-3.1-8B shape, dense"
# "vLLM beside us" and "The engine, Llama-3.1-8B shape" of that page. Its older figures in fp8 are of kernels that were
# repaired since, and not taken. That of the H100 in fp8 is of the budgets of before 2026-11-30: 5% less at most since.
BENCHMARKS = (
    Benchmark(
        _H100, 8.5, "fp8", "stem", _SAMPLED, ((32768, 0.585), (65536, 1.284), (131072, 3.047)), 39.0,
    ),
    Benchmark(_H200, 8.9, "fp8", "stem", _SAMPLED, ((32768, 0.577), (65536, 1.276), (131072, 2.877)), 33.8),
    Benchmark(_H100, 15.0, "bf16", "stem", _STEM, ((32768, 0.86), (65536, 1.99), (131072, 5.01)), 65.9),
    Benchmark(_H100, 15.0, "bf16", "dense", _DENSE, ((32768, 1.17), (65536, 3.18), (131072, 9.73)), 100.3),
    Benchmark(_H200, 15.0, "bf16", "stem", _SAMPLED, ((32768, 0.917), (65536, 1.967), (131072, 4.41)), 54.2),
    Benchmark(_H200, 15.0, "bf16", "dense", _DENSE, ((32768, 1.17), (65536, 3.22), (131072, 9.88)), 94.0),
)  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """What a job has to do. prompts: tokens of each prompt that is read. answers, most: how many outputs there will be,
    and how many tokens they have together at most.
    """

    prompts: np.ndarray
    answers: int
    most: int


@dataclass(frozen=True)
class Machine:
    """What a job runs on. gpu: name of one GPU, empty if that is not known, "cpu" on CPUs. gpus_per_worker: of these.
    workers: None if that is not known. weights: bytes. plain: whether each weight takes part in each token (a mixture
    of experts and linear attention take other times than a dense model of their size).
    """

    gpu: str
    gpus_per_worker: int
    workers: int | None
    model: str
    weights: int
    precision: str
    attention: str
    plain: bool


def estimate_lines(
    work: Workload, machine: Machine, store: Store, price: float | None, *, only: bool = False
) -> Iterator[str]:
    """The lines of a dry run on time, GPU hours and cost.

    store: where rows may lie. only: nothing but these is to be asked. price: of a GPU hour.
    """
    speed, why = _speed(machine, store, only)
    if speed is None:
        where = machine.gpu if machine.gpu not in ("", "cpu") else "these CPUs" if machine.gpu else "the cluster's GPUs"
        yield f"time: not known for this model on {where}{why}"
        shares = min(50, len(work.prompts) // SHARE)
        if shares > 1:
            how = f"--shard 0/{shares}, another --output"
            yield f"  do some documents first ({how}), then give --estimate-from that folder"
        if price is not None:
            yield "cost: not known, since the time is not"
        return
    outputs = work.most if speed.outputs is None else min(work.most, round(speed.outputs * work.answers))
    prefill = speed.prefill(work.prompts)
    seconds = float(prefill.sum()) + outputs * speed.output_seconds
    workers = machine.workers or 1
    wall = max(seconds / workers, float(prefill.max(initial=0.0)))
    hours = seconds * machine.gpus_per_worker / 3600
    with_workers = "1 worker" if workers == 1 else f"{workers:,} workers"
    in_all = "" if machine.gpu == "cpu" else f", {_figure(hours)} GPU hours in all"
    yield f"time: about {duration(wall)} with {with_workers}{in_all}; loading the model comes on top"
    each = "each as long as it may be" if speed.outputs is None else f"of {speed.outputs:,.0f} tokens as in those rows"
    yield f"  from {speed.source}"
    yield f"  outputs: {work.answers:,}, {each}"
    if price is not None:
        cost = f"about {hours * price:,.2f} at {price:g} a GPU hour"
        yield f"cost: {'none of GPUs, the job runs on CPUs' if machine.gpu == 'cpu' else cost}"


def _figure(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.2g}"


def _speed(machine: Machine, store: Store, only: bool) -> tuple[Speed | None, str]:
    """How fast the machine is; else None and why that is not known, if there is more to say."""
    speed, why = speed_of_rows(store, machine)
    if speed is not None:
        return speed, ""
    if machine.plain and machine.gpus_per_worker == 1 and not only:
        for each in BENCHMARKS:
            same = (each.gpu, each.precision, each.attention) == (machine.gpu, machine.precision, machine.attention)
            if same and LIKE[0] <= machine.weights / GIB / each.weights <= LIKE[1]:
                return each.speed(), ""
    return None, why


def speed_of_rows(store: Store, machine: Machine) -> tuple[Speed | None, str]:
    """What the rows of a folder tell; else None and why they do not. If the machine has a GPU, those of it count."""
    if not part_names(store):
        return None, ""
    rows = read_columns(store, _COLUMNS)
    rows = rows.filter(
        pc.fill_null(pc.and_(pc.equal(rows["status"], "ok"), pc.greater(rows["prompt_tokens"], 0)), False)
    )
    models, rows = Counter(rows["model"].to_pylist()), rows.filter(pc.equal(rows["model"], machine.model))
    if not len(rows):
        others = f"; those in {store.name} are of {models.most_common(1)[0][0]}" if models else ""
        return None, others
    several = f"{machine.gpus_per_worker} x " if machine.gpus_per_worker > 1 else ""
    counts = Counter(rows["gpu"].to_pylist())
    gpu = several + machine.gpu if machine.gpu else counts.most_common(1)[0][0]
    rows = rows.filter(pc.equal(rows["gpu"], gpu))
    if not len(rows):
        return None, f"; the rows in {store.name} are of {counts.most_common(1)[0][0]}"
    return _measured(rows, f"{len(rows):,} rows in {store.name} ({gpu}, {rows['precision'][0].as_py()})"), ""


def _measured(rows: pa.Table, source: str) -> Speed:
    """The speed of rows that are ok. A worker's time that is not prefill is that of its outputs, waiting included."""
    tokens, shared, output, prefill = (
        np.array(rows[name].to_pylist(), np.float64)
        for name in ("prompt_tokens", "prefix_tokens", "output_tokens", "prefill_seconds")
    )
    shared = np.nan_to_num(shared)
    whole = shared == 0  # another row of the document has the time for the rest
    sizes = np.unique(np.floor(np.log2(tokens[whole])))
    lengths, seconds = [], []
    for size in sizes:
        chosen = whole & (np.floor(np.log2(tokens)) == size)
        lengths.append(int(tokens[chosen].mean()))
        seconds.append(float(prefill[chosen].sum() / tokens[chosen].sum()))
    rest = max(0.0, _worked(rows) - float(prefill.sum()))
    made = max(1.0, float(output.sum()))
    source += f"; prompts of {int(tokens.min()):,} to {int(tokens.max()):,} tokens"
    return Speed(tuple(lengths), tuple(seconds), rest / made, float(output.mean()), source)


def _worked(rows: pa.Table) -> float:
    """Seconds of all workers together, each from its first document to its last row."""
    grouped = rows.group_by("worker").aggregate([("started_at", "min"), ("finished_at", "max")])
    spans = zip(grouped["started_at_min"].to_pylist(), grouped["finished_at_max"].to_pylist(), strict=True)
    return sum((last - first).total_seconds() for first, last in spans if first and last)


def machine_of(config: Any, model: str, memory: Any, hf_config: Any, documents: int) -> Machine:
    """What a job with these settings runs on, as far as this machine can tell. memory: its MemoryPlan."""
    import torch

    cluster = bool(config.ray_address or os.environ.get("RAY_ADDRESS"))
    here = torch.cuda.device_count() if config.device != "cpu" else 0
    if here:
        gpu, workers = torch.cuda.get_device_name(0), max(1, here // config.gpus_per_worker)
    else:
        gpu = "" if config.device == "cuda" or (cluster and config.device == "auto") else "cpu"
        workers = min(4, os.cpu_count() or 1)
    known = None if cluster or not gpu else min(workers, max(1, documents))
    text = hf_config.get_text_config()
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    plain = not memory.state_bytes and not any((getattr(text, name, None) or 0) > 1 for name in experts)
    return Machine(
        gpu=gpu,
        gpus_per_worker=config.gpus_per_worker,
        workers=config.workers if isinstance(config.workers, int) else known,
        model=model,
        weights=memory.weight_bytes,
        precision=memory.precision,
        attention=config.attention,
        plain=plain,
    )


def dense_line(prompts: np.ndarray, stem: StemConfig | None) -> str:
    """How many of these prompts (tokens of each) attend densely since they are short; empty if none does."""
    if stem is None:
        return ""
    total = len(prompts)
    # A budget knows whole blocks only, of which there are few numbers, however many documents there are.
    blocks, places = np.unique(-(-prompts // stem.block_size), return_inverse=True)
    covered = np.array([prompt_budget(int(n) * stem.block_size, stem).budgets is None for n in blocks], dtype=bool)
    count = int(((prompts < stem.dense_below) | covered[places]).sum())
    if not count:
        return ""
    why = "too short for sparse attention"
    if total == 1:
        return f"the only document is {why}: it attends densely"
    many = f"all {count:,} documents" if count == total else f"{count:,} of {total:,} documents"
    return f"{many} are {why}: they attend densely"
