"""Answer a batch of OpenAI's format: python -m jobs.batch --input BATCH.jsonl --output OUT --model PATH_OR_ID

Exit codes: 0 all requests ok, 2 some failed (their lines say why), 1 the job could not run, 130 stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.batch.files import DOCUMENTS, FOLDER, OUTPUT, below, documents_of, write_documents, write_output
from jobs.batch.requests import Request, model_of, read_requests, settings_of
from jobs.cli import Parser, add_job_flags, run_main, unheard
from jobs.summarize import carry_out, refuse_unpacked_paths
from pipeline.errors import JobError, visible
from pipeline.results.store import Store
from pipeline.settings.config import JobConfig, read_job_file

# What the requests say, what is made of them, and what would speak of documents instead of requests.
WITHOUT = (
    "input", "text_column", "id_column", "keep_columns", "shard", "task", "question", "questions", "questions_column",
    "prompt_file", "encoding", "conversion_seconds", "conversion_memory", "on_finish",
)  # fmt: skip
PROMPT = Path(__file__).with_name("prompt.jinja")
FIRST_FAILED = 5


def main(arguments: Sequence[str]) -> int:
    """Answer the batch that the command line names; the exit code. Raises JobError."""
    parser = Parser(
        prog="python -m jobs.batch", description=(__doc__ or "").splitlines()[0],
        epilog=f"What a request says goes before the flags. {(__doc__ or '').splitlines()[-1]}", allow_abbrev=False,
    )  # fmt: skip
    about = "file of requests to /v1/chat/completions; local, s3:// or gs://"
    parser.add_argument("--input", metavar="BATCH.jsonl", default=argparse.SUPPRESS, help=about)
    add_job_flags(parser, WITHOUT)
    location, settings = _settings(parser.parse_args(arguments))
    requests = read_requests(location)
    answered = [request for request in requests if not request.refused]
    if not settings.get("output"):
        raise JobError("--output is missing; it is needed: folder for the results; made if missing")
    places: dict[str, tuple[str, str]] = {}
    if answered:
        code, places = _answer(answered, location, settings)
        if code is not None:
            return code
    store = Store(settings["output"])
    store.create()
    with store.locked():
        failed = write_output(store, requests, places)
    with unheard():
        _show(below(store.name, OUTPUT), len(requests), failed)
    return 2 if failed else 0


def _settings(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The batch file, and settings of the job: flags over those of --config. Raises JobError."""
    flags = vars(options)
    path = flags.pop("config")
    of_file = read_job_file(path) if path else {}
    for name in WITHOUT[1:]:
        if name in of_file:
            raise JobError(f"--config {path}: {name} has no meaning for a batch; leave it out")
    settings = of_file | flags
    location = settings.pop("input", None)
    if not location or not isinstance(location, str):
        raise JobError("--input is missing; it is needed: one file of requests")
    return location, settings


def _answer(
    requests: Sequence[Request], location: str, settings: dict[str, Any]
) -> tuple[int | None, dict[str, tuple[str, str]]]:
    """Run the job of the requests: (exit code if it ends here, the row of each request by its custom_id)."""
    agreed = settings_of(requests, location)
    settings = settings | {"model": settings.get("model") or model_of(requests, location)} | agreed
    table, places = documents_of(requests, agreed)
    with contextlib.ExitStack() as stack:
        folder = below(settings["output"], FOLDER)
        if settings.get("dry_run"):  # it leaves nothing in the output
            folder = stack.enter_context(tempfile.TemporaryDirectory())
        config = JobConfig(
            **settings, input=(below(folder, DOCUMENTS),), text_column="text", id_column="id",
            questions_column="questions", prompt_file=str(PROMPT),
        )  # fmt: skip
        refuse_unpacked_paths(config)
        if config.dry_run:
            write_documents(table, folder)
        else:
            store = Store(config.output)
            store.create()
            with store.locked():
                write_documents(table, folder)
        report = carry_out(config)
    if report is None:
        return 0, places
    return (report.exit_code if report.stopped else None), places


def _show(output: str, count: int, failed: Sequence[tuple[str, str]]) -> None:
    """Say where the output is, and why some requests have no answer."""
    for custom_id, why in failed[:FIRST_FAILED]:
        print(visible(f"failed: {custom_id}: {why}"))
    print(visible(f"{count - len(failed):,} of {count:,} requests are answered, in their order: {output}"), flush=True)


if __name__ == "__main__":
    run_main(main)
