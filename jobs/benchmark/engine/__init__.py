"""Documents through the engine and through Hugging Face generate (sdpa, one at a time), in one run.

First it asks whether both write the same tokens (bundled trained model, dense, greedy); if they do not, nothing is
timed. Then, on random weights of the asked shape: time to first token, decode steps, peak memory, documents an hour,
Stem and dense. Results are written to OUTPUT/engine.json after every phase.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from jobs.benchmark._shapes import SHAPES, shape_folder
from jobs.benchmark._stamp import stamp
from jobs.benchmark.engine.agreement import check_agreement
from jobs.benchmark.engine.baseline import Baseline, BaselinePoint, job_baseline
from jobs.benchmark.engine.phases import decode_by_batch, gpu_busy, job, latency, warm_up
from jobs.benchmark.engine.report import plot, show
from pipeline.engine import Engine, EngineConfig
from pipeline.engine.config import PRECISIONS
from pipeline.engine.loading import load_config
from pipeline.errors import JobError
from stem_core import StemConfig

PHASES = ("agreement", "baseline", "latency", "decode", "job", "busy")
ARMS = ("stem", "dense")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("--shape", default="llama-3.1-8b", help=f"{', '.join(SHAPES)} or a model folder's config")
    parser.add_argument("--output", default="benchmark", help="folder for engine.json and engine.png")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072, 98304, 65536, 32768], metavar="N")
    parser.add_argument("--documents", type=int, default=16, help="documents of the job, over the lengths in turn")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--latency-lengths", type=int, nargs="+", default=[32768, 131072], metavar="N")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 3, 4, 8], metavar="N")
    parser.add_argument("--baseline-steps", type=int, default=16, help="decode steps of generate to time, per length")
    parser.add_argument("--preset", choices=("paper", "release", "robust"), help="instead of --density")
    parser.add_argument("--density", type=float, default=0.25, help="Stem's share of causal blocks (default: 0.25)")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--dense-layers", type=int, default=2, help="Stem's leading dense layers (default: 2)")
    parser.add_argument("--chunk-tokens", type=int, default=8192)
    parser.add_argument("--max-live", type=int, default=16)
    parser.add_argument("--agreement-tokens", type=int, nargs="+", default=[1200, 2500, 5000, 8000], metavar="N")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--commit", default="", help="what is measured, where this is not a git checkout")
    parser.add_argument("--limit-seconds", type=float, default=3600.0, help="start no phase after this many seconds")


class Run:
    """The results so far, and the file that holds them."""

    def __init__(self, arguments: argparse.Namespace, config: EngineConfig) -> None:
        self.arguments = arguments
        self.folder = Path(arguments.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.begin = time.perf_counter()
        self.results: dict[str, Any] = {
            "shape": arguments.shape,
            "stamp": stamp(config.torch_device(), arguments.commit),
            "arguments": vars(arguments) | {},
            "engine": {arm: {} for arm in arguments.arms},
            "skipped": [],
        }

    def phase(self, name: str, what: Callable[[], None]) -> None:
        """Run a phase if it was asked for and time is left; write what there is."""
        kind = name.split(":")[0]
        if kind not in self.arguments.phases:
            return
        elapsed = time.perf_counter() - self.begin
        if elapsed > self.arguments.limit_seconds:
            self.results["skipped"].append(f"{name}: {elapsed:.0f} s had passed")
        else:
            print(f"[{elapsed:6.1f} s] {name}", flush=True)
            try:
                what()
            except torch.OutOfMemoryError as error:
                self.results["skipped"].append(f"{name}: {str(error).splitlines()[0]}")
        self.write()

    def write(self) -> None:
        """engine.json, whole or not at all."""
        self.results["seconds"] = time.perf_counter() - self.begin
        temporary = self.folder / "engine.json.tmp"
        temporary.write_text(json.dumps(self.results, indent=1))
        temporary.replace(self.folder / "engine.json")


def main(arguments: argparse.Namespace) -> int:
    """Run all phases; 0, or 2 if engine and generate do not agree."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = shape_folder(arguments.shape, Path(scratch) / "shape")
        config = EngineConfig(
            str(folder),
            device=arguments.device,
            precision=arguments.precision,
            load_format="dummy",
            chunk_tokens=arguments.chunk_tokens,
            max_live=arguments.max_live,
            max_context=max(*arguments.lengths, *arguments.latency_lengths) + max(arguments.new_tokens, 64),
        )
        run = Run(arguments, config)
        run.phase("agreement", lambda: _agreement(run, config))
        if not all(check["ok"] for check in run.results.get("agreement", [])):
            show(run.results)
            print("engine and generate do not write the same tokens: nothing was timed")
            return 2
        run.phase("baseline", lambda: _baseline(run, config))
        vocabulary = load_config(config).get_text_config().vocab_size
        for arm in arguments.arms:
            attention = _stem(arguments) if arm == "stem" else None
            _measure_arm(run, replace(config, attention=attention), arm, vocabulary)
    show(run.results)
    if not plot(run.results, run.folder / "engine.png"):
        print("no plot: pip install matplotlib")
    print(f"written to {run.folder / 'engine.json'}")
    return 0


def _stem(arguments: argparse.Namespace) -> StemConfig:
    common = {"block_size": arguments.block_size, "dense_layers": arguments.dense_layers}
    try:
        if arguments.preset:
            return StemConfig.preset(arguments.preset, **common)
        return StemConfig(schedule="density", density=arguments.density, **common)
    except ValueError as error:
        raise JobError(str(error)) from error


def _job_lengths(arguments: argparse.Namespace) -> list[int]:
    """The job's documents, longest first, as the scheduler hands them out."""
    lengths = [arguments.lengths[i % len(arguments.lengths)] for i in range(arguments.documents)]
    return sorted(lengths, reverse=True)


def _agreement(run: Run, config: EngineConfig) -> None:
    precisions = ["fp32"] if config.torch_device().type == "cpu" else ["fp32", "bf16"]
    lengths = run.arguments.agreement_tokens
    run.results["agreement"] = [check_agreement(config.device, precision, lengths, 48) for precision in precisions]


def _baseline(run: Run, config: EngineConfig) -> None:
    baseline = Baseline(config)
    arguments = run.arguments
    points: dict[int, BaselinePoint] = {}
    found: dict[str, Any] = {}
    run.results["baseline"] = found
    prompts = {n: torch.arange(n).remainder(1000).numpy() for n in {*arguments.lengths, *arguments.latency_lengths}}
    # Out of memory skips the phase: the model must not stay for the next one.
    with closing(baseline):
        for length in sorted(prompts):
            points[length] = baseline.measure(prompts[length], arguments.baseline_steps)
            found["points"] = [asdict(point) for point in points.values()]
            run.write()
    found["job"] = job_baseline(points, _job_lengths(arguments), arguments.new_tokens)


def _measure_arm(run: Run, config: EngineConfig, arm: str, vocabulary: int) -> None:
    arguments = run.arguments
    found = run.results["engine"][arm]
    new = arguments.new_tokens

    def one_document() -> None:
        # An arena for one document alone, so that the peak is what such a document needs.
        longest = max(arguments.latency_lengths) + new
        with closing(Engine(replace(config, arena_tokens=longest, max_live=1))) as engine:
            warm_up(engine, vocabulary)
            found["latency"] = latency(engine, arguments.latency_lengths, min(new, 65), vocabulary)

    run.phase(f"latency: {arm}", one_document)
    if not {"decode", "job", "busy"} & set(arguments.phases):
        return
    engine = Engine(config)
    found["about"], found["plan"] = engine.describe(), engine.plan().to_dict()
    warm_up(engine, vocabulary)
    if arm == arguments.arms[0]:
        lengths = sorted({min(arguments.lengths), max(arguments.lengths)})
        run.phase("decode", lambda: found.update(decode=decode_by_batch(engine, lengths, arguments.batches)))
    busy = [min(arguments.lengths)] * 2
    run.phase(f"busy: {arm}", lambda: found.update(busy=gpu_busy(engine, busy, min(new, 24), vocabulary)))
    run.phase(f"job: {arm}", lambda: found.update(job=job(engine, _job_lengths(arguments), new, vocabulary)))
    engine.close()
