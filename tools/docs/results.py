"""docs/results.md: the columns of a result row, and the files of a results folder."""

from __future__ import annotations

import pyarrow as pa

from pipeline.job import manifest
from pipeline.results import lock, parts, store
from pipeline.results.columns import Column
from pipeline.results.rows import COLUMNS, PASSAGES, STATUSES
from pipeline.settings.config import JobConfig
from tools.docs.markdown import table

TYPES = {
    "string": "text", "double": "float64", "float": "float32", "timestamp[us, tz=UTC]": "timestamp (µs, UTC)",
    str(pa.list_(pa.float32())): "list of float32", str(pa.list_(pa.string())): "list of text",
    str(PASSAGES): "list of `output_start`, `output_end` (int32), `start`, `end` (int64), `score` (float32)",
}  # fmt: skip


def results_page() -> str:
    """The text of docs/results.md."""
    statuses = table(("status", "meaning"), [(f"`{name}`", meaning) for name, meaning in STATUSES.items()])
    columns = table(("column", "type", "unit", "meaning", "null when", "from"), map(_column, COLUMNS))
    files = table(("file", "what it is"), _files())
    return "\n".join(
        [
            _INTRO, "## Statuses\n", statuses, _STATUSES, "## Columns\n", columns, _COLUMNS,
            "## Files in the folder\n", files, _FILES, _READING, _RESUME,
        ]
    )  # fmt: skip


def _column(column: Column) -> tuple[str, ...]:
    kind = TYPES.get(str(column.type), str(column.type))
    return f"`{column.name}`", kind, column.unit, column.meaning, column.null or "never", column.origin


def _files() -> list[tuple[str, str]]:
    part = f"{parts.PREFIX}NNNNNN-xxxxxxxx{parts.SUFFIX}"
    return [
        (f"`{part}`", "the rows: a running number and random digits; zstd, with checksums of pages and a hash of all"),
        (f"`{manifest.NAME}`", "what the rows were made from (below)"),
        (
            f"`{lock.FILE}`",
            "local folders: locked while a job writes; when none does, the file stays and means nothing",
        ),
        (
            f"`{lock.CLAIM}xxxx`",
            f"`s3://` and `gs://`: the claim of the job that writes, renewed every {lock.BEAT_SECONDS:g} s; one that "
            f"stays the same for {lock.LEASE_SECONDS:g} s is a crashed job's, and the next job removes it",
        ),
        (f"`{parts.JOURNAL}`", "there while part files are merged: which ones the merged file replaces"),
        (f"`.*{store.TEMPORARY}`", "a write under way, or one that a crash left; the next job removes it"),
        (f"`*{parts.SUFFIX}.damaged`", "a part whose checksums or hash were wrong; its documents are done again"),
        ("`report.html`", "the page of `python -m jobs.report`, if it was asked for"),
    ]


_COMPACT_MIB = parts.COMPACT_BYTES >> 20
_INTRO = """\
# Results

A job ends with one row for each document, whatever became of it, in Parquet files in the folder of `--output`.

This page is written by `python -m tools.docs` from the code; do not edit it by hand.
"""
_STATUSES = """
A row that is not `ok` says why in `error`. It stays until `--retry-failed` does its document again, or the document
changes.
"""
_COLUMNS = """
The columns of `--keep-columns` follow, with the types of the input; they are null where the document could not be
read or has no such value. Where files have different types for a column, it has one that holds the values of all:
a wider number, or text (JSON of nested values). A value that does not go into it all the same is null, and
`kept_error` says so; the output stays. Meaning, unit and origin of a column, and when it is null, are also in the
files, in its metadata.

When a document fails early, columns of later stages have no value. "No worker made the row": the listing of the
input already found the document unreadable, or the row stands for a document that was lost with its worker.
"The engine gave nothing back": the document failed before, its prompt did not fit the context, or it ran out of
time; then it did not start on the prompt either, and generated no token. A row that does not fit the columns,
because an engine gave a value of another type, is replaced by an `error` row in which all others are null.

Where a document was processed in parts, seconds and tokens are sums over its parts, `density` and `density_by_layer`
are means by prompt tokens, `peak_gpu_bytes` their largest, `output_error` their largest, and `time_to_first_token`
that of the first part that came back. Documents share the engine, so the seconds of several do not add up to the time
of the run.
"""
_FILES = f"""
A part file is complete or not there. Rows are written when {JobConfig.flush_documents} of them wait or the oldest
has waited {JobConfig.flush_seconds:g} s (`--flush-documents`, `--flush-seconds`). At the end of a job more than
{parts.COMPACT_ABOVE} parts are merged, into files of up to {parts.COMPACT_ROWS:,} rows or {_COMPACT_MIB} MiB;
`--no-compact` leaves them. Only one job at a time writes to a folder; a second one is refused with the name of the
first.

`{manifest.NAME}`:

""" + table(
    ("key", "meaning"),
    [
        ("`format`", f"version of this file, {manifest.FORMAT}"),
        ("`written_at`", "when it was written, UTC"),
        ("`state`", "`running`, `stopped` or `finished`; `running` without a running job: it was killed, or failed"),
        ("`documents`", "how many the input holds"),
        ("`seconds`", "how long the last run took; not there while it runs"),
        (
            "`fingerprints`",
            f"of {', '.join(manifest.DECIDING)} and input; all but the input's decide whether a job goes on",
        ),
        ("`prompt_date`", "the date in prompts whose chat template prints one; that of the day on which the job began"),
        ("`config`", "all settings, without credentials"),
        ("`versions`", "of Python and the packages"),
        ("`seal`", "a hash of the rest: a file that was damaged or edited is refused, unless by `--force`"),
    ],
)
_READING = """
## Reading them

```python
from pipeline import read_results

rows = read_results("results")  # a pyarrow table; also s3://, gs://
rows = read_results(["shard-0", "shard-1"], ["document_id", "status", "output"])  # several folders, some columns
frame = rows.to_pandas()
```

Anything that reads Parquet can do it too:

```python
from glob import glob

import pyarrow.parquet as pq

parts = glob("results/part-*.parquet")
rows = pq.read_table(parts)
print(pq.read_schema(parts[0]).field("density").metadata[b"meaning"].decode())
```

All of this may be done while the job runs. Only `read_results` knows of merges: while parts are merged, or after a
crash in that moment and before the next run, other readers may miss a file that went away, or see a row twice.
"""
_RESUME = (
    """\
## What a resume replaces

The same command continues the job. Each document of the input is compared with its row, by `document_id`:

"""
    + table(
        ("the document", "what happens"),
        [
            ("has no row", "it is done"),
            ("has a row, and its `input_stamp` is the same", "the row stays, also if it failed"),
            (
                "another stamp, but the text and kept columns have the same `input_hash`",
                "the row stays: the file was only touched",
            ),
            (
                "another text or other kept columns, or the earlier row has no hash",
                "it is done again, and its new row replaces the old one",
            ),
            (
                "its row is not `ok`, and `--retry-failed` is given",
                "it is done again, and its new row replaces the old one",
            ),
            ("its row stands in a damaged part file", "the file is set aside, and all its documents are done again"),
            ("is no longer in the input", "the job is refused; with `--force` the row stays"),
            (
                "its row stands for a line or file that could not be read, and that is mended or gone",
                "the row is removed",
            ),
        ],
    )
    + """

An old row stays until the new one takes its place, by one write of the part file that holds it. So at any
moment, whatever is interrupted, a document has its old row or its new one, never both. Rows that were not yet
written when a job was killed are computed again.

If settings with a star in [configuration.md](configuration.md), the model's files or the prompt differ from the
earlier run's, the job is refused. With `--force` it goes on: the rows that are there stay as they are, only what is
left is done with the new settings, and `config_hash` tells apart rows made with other settings of the output.
`--no-resume` refuses a folder that holds results.
"""
)
