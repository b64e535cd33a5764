"""Documents in, Parquet out: sources, prompts, the engine, Ray workers, the scheduler, the sink.

from pipeline import summarize, read_results
report = summarize(input="docs/", output="out/", model="path/or/hub-id")
table = read_results("out/")          # a pyarrow table, one row a document
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.job import summarize
    from pipeline.sink import read_results

__all__ = ["read_results", "summarize"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: a worker that imports pipeline.engine needs neither.
    if name == "summarize":
        from pipeline.job import summarize

        return summarize
    if name == "read_results":
        from pipeline.sink import read_results

        return read_results
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
