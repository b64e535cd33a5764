"""Time per document outside the model: short documents through the whole pipeline on Ray.

Of each worker the time from its first document to its last row counts; what its engine did not compute in it is
overhead: reading, tokenising that nothing hid, Ray, waiting for the driver. The driver writes Parquet meanwhile.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from jobs.measurement import stamp
from pipeline.errors import JobError
from pipeline.job.job import run
from pipeline.settings.config import JobConfig
from tools.benchmark._measure import write_json

SENTENCE = "The quiet committee reviewed the harbour budget in the spring. "
TARGET_MS = 15.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this benchmark."""
    parser.add_argument("--model", default="models/tiny-reader", help="a small model (default: the bundled one)")
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--commit", default="", help="what is measured, where this is not a git checkout")
    parser.add_argument("--output", help="write the figures to this JSON file")


def main(options: argparse.Namespace) -> int:
    """Run it; 0 if the target is met, 2 if not. Raises JobError if a document is not ok."""
    figures = measure(options.model, options.documents, options.workers, options.max_new_tokens)
    for name, value in figures.items():
        print(f"{name:>28}  {value:,.2f}")
    if options.output:
        write_json(Path(options.output), {**stamp(torch.device("cpu"), options.commit), "figures": figures})
    return 0 if figures["overhead_ms_per_document"] <= TARGET_MS else 2


def measure(model: str, documents: int, workers: int, max_new_tokens: int) -> dict[str, float]:
    """Seconds and milliseconds of a run over `documents` short documents. Raises JobError if one is not ok."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "docs.jsonl"
        rows = [json.dumps({"id": i, "text": SENTENCE * (3 + i % 5)}) for i in range(documents)]
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
        config = JobConfig(
            input=(str(path),),
            output=str(Path(folder) / "out"),
            model=model,
            max_new_tokens=max_new_tokens,
            workers=workers,
        )
        report = run(config)
    if report.ok != documents:
        raise JobError(f"{report.failed} of {documents} documents failed: {report.first_errors[:1]}")
    stats = report.stats
    return {
        "documents": documents,
        "workers": stats["workers"],
        "overhead_ms_per_document": (stats["span_seconds"] - stats["engine_seconds"]) / documents * 1000,
        "engine_ms_per_document": stats["engine_seconds"] / documents * 1000,
        "reader_ms_per_document": stats["reader_seconds"] / documents * 1000,
        "run_seconds": stats["seconds"],
        "documents_per_hour": documents / stats["seconds"] * 3600,
    }
