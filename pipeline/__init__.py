"""Documents in, Parquet out: sources, prompts, the engine, Ray workers, the scheduler, the sink.

from pipeline import Summarizer, StemlineStage, read_results, run_job, summarize

table = summarize(["a text", "another"], model="path/or/hub-id")           # here and now: a pyarrow table
report = run_job(input="docs/", output="out/", model="path/or/hub-id")     # the job, on Ray
table = read_results("out/")                                               # its rows: a table like the first
dataset.map_batches(StemlineStage, fn_constructor_kwargs={"model": "path/or/hub-id"}, ...)  # Ray Data
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import Summarizer, summarize
    from pipeline.job.job import run_job
    from pipeline.ray_data import StemlineStage
    from pipeline.results.parts import read_results

__all__ = ["StemlineStage", "Summarizer", "read_results", "run_job", "summarize"]

_PLACES = {
    "StemlineStage": "pipeline.ray_data",
    "Summarizer": "pipeline.api",
    "read_results": "pipeline.results.parts",
    "run_job": "pipeline.job.job",
    "summarize": "pipeline.api",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: a worker that imports pipeline.engine needs none of them.
    if name not in _PLACES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
