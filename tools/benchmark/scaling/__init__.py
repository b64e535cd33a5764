"""How a job's throughput grows with its workers: the same documents through the whole pipeline on Ray, once for each.

Random weights of the asked shape, documents of exact lengths. Every run must end with one ok row a document. Work
counts from the first document's start to the last row; loading stands beside it. Each run has a Ray cluster of its own:
several of these commands can run at once, on the GPUs that CUDA_VISIBLE_DEVICES gives each, into files of their own.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from jobs.measurement import stamp
from pipeline.engine.config import EngineConfig
from pipeline.errors import JobError
from pipeline.job.job import run
from pipeline.results.columns import utc_now
from pipeline.results.parts import read_results
from pipeline.settings.config import JobConfig
from pipeline.settings.shared import PRECISIONS
from stem_core.config import DEFAULT_PRESET, PRESETS
from tools.benchmark._measure import write_json
from tools.benchmark.scaling.documents import model_folder, write_documents
from tools.benchmark.scaling.figures import COLUMNS, check_rows, figures, join, read, show
from tools.shapes import ALIASES, SHAPES

# What runs must have in common to stand in one table.
SETTINGS = (
    "shape", "device", "precision", "gpus_per_worker", "documents", "lengths", "new_tokens", "preset", "budget",
    "chunk_tokens", "max_live",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    shapes = ", ".join((*SHAPES, *ALIASES))
    parser.add_argument("--shape", default="llama-3.1-8b", help=f"{shapes} or a model folder's config")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="(default: 1 2 4)")
    parser.add_argument("--gpus-per-worker", type=int, default=1, metavar="K", help="spread the layers over K GPUs (1)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--precision", default="auto", choices=PRECISIONS)
    parser.add_argument("--documents", type=int, default=192, help="best a multiple of workers x max-live (192)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768], metavar="N", help="prompts, in turn (32768)")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--preset", default=DEFAULT_PRESET, choices=tuple(PRESETS))
    parser.add_argument("--budget", type=float, help="share of the blocks, instead of the preset's schedule")
    parser.add_argument("--chunk-tokens", type=int, default=EngineConfig.chunk_tokens)
    parser.add_argument("--max-live", type=int, default=8, help="documents that a worker decodes together (8)")
    parser.add_argument("--commit", default="", help="what is measured, where this is not a git checkout")
    parser.add_argument("--output", help="JSON file, written after every run; runs that it holds already stay")
    parser.add_argument("--merge", nargs="+", metavar="FILE", help="measure nothing: show these files together")


def main(options: argparse.Namespace) -> int:
    """Measure, or merge, and print the table; 0. Raises JobError if a document is not ok."""
    output = Path(options.output) if options.output else None
    if options.merge:
        content = join([read(Path(name)) for name in options.merge])
        if output:
            write_json(output, content)
        print(show(content))
        return 0
    if min(*options.workers, options.documents) < 1:
        raise JobError("--workers and --documents: at least 1")
    settings = {name: getattr(options, name) for name in SETTINGS}
    content = {"settings": settings, "runs": []}
    earlier = [read(output)] if output and output.exists() else []
    content = join([*earlier, (str(output or "this run"), content)])
    with tempfile.TemporaryDirectory(prefix="stemline_scaling_") as scratch:
        config, expected = prepare(options, Path(scratch))
        for workers in options.workers:
            measured = measure(config, workers, expected)
            measured["stamp"] = _stamp(options)
            content = join([("earlier runs", content), ("this one", {"settings": settings, "runs": [measured]})])
            if output:
                write_json(output, content)
            print(show(content), flush=True)
    return 0


def prepare(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Model and documents in a folder: settings of the jobs, and prompt tokens by document."""
    lengths = [options.lengths[i % len(options.lengths)] for i in range(options.documents)]
    model = model_folder(options.shape, folder / "model")
    expected = write_documents(folder / "documents.jsonl", model, lengths)
    config = {
        "input": (str(folder / "documents.jsonl"),),
        "output": str(folder / "results"),
        "model": str(model),
        "load_format": "dummy",
        "device": options.device,
        "precision": options.precision,
        "gpus_per_worker": options.gpus_per_worker,
        "preset": options.preset,
        "budget": options.budget,
        "max_new_tokens": options.new_tokens,
        "max_context": max(lengths) + options.new_tokens,
        "chunk_tokens": options.chunk_tokens,
        "max_live": options.max_live,
        "ray_address": "local",
    }
    JobConfig(**config)  # what is wrong is said before anything is started
    return config, expected


def measure(config: dict[str, Any], workers: int, expected: dict[str, int]) -> dict[str, Any]:
    """Run the job with so many workers; its figures. Raises JobError if the rows are not as they must be."""
    output = f"{config['output']}-{workers}"
    print(f"{workers} worker{'s' * (workers != 1)}: {len(expected)} documents", flush=True)
    with tempfile.TemporaryDirectory(prefix=f"{output}-") as folder:
        begun = utc_now()
        report = run(JobConfig(**config | {"output": folder, "workers": workers}))
        rows = read_results(folder, COLUMNS).to_pylist()
    check_rows(rows, expected, workers)
    return figures(rows, begun, report.stats, workers)


def _stamp(options: argparse.Namespace) -> dict[str, Any]:
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    return stamp(torch.device("cuda" if on_gpu else "cpu"), options.commit)
