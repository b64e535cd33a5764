"""Answer a batch of OpenAI's format: python -m jobs.batch --input BATCH.jsonl --output OUT --model PATH_OR_ID

Exit codes: 0 all requests ok, 2 some failed (their lines say why), 1 the job could not run, 130 stopped.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.batch.files import DOCUMENTS, FOLDER, OUTPUT, below, documents_of, names_of, write_documents, write_output
from jobs.batch.requests import Request, model_of, read_requests, settings_of
from jobs.cli import Parser, add_job_flags, run_main, unheard
from jobs.summarize import carry_out, refuse_unpacked_paths
from pipeline.errors import JobError, visible
from pipeline.results.parts import part_names, recover
from pipeline.results.store import Store
from pipeline.settings.config import JobConfig, read_job_file
from pipeline.settings.options import short

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
    if not settings.get("output"):
        raise JobError("--output is missing; it is needed: folder for the results; made if missing")
    answered = [request for request in requests if not request.refused]
    config, agreed = _job(answered, location, settings)
    refuse_unpacked_paths(config)
    store = Store(config.output)
    if not answered:
        _refuse_rows(store, requests[0], config)
    table, places = documents_of(answered, agreed, names_of(store))
    if config.dry_run:
        return _describe(table, requests, config)
    if answered:
        _write_accepted(table, config)
        report = carry_out(config)
        if report and report.stopped:
            return report.exit_code
    store.create()
    with store.locked():
        failed = write_output(store, requests, places)
    with unheard():
        _show("failed", failed)
        told = f"{len(requests) - len(failed):,} of {len(requests):,} requests are answered, in their order"
        print(visible(f"{told}: {below(store.name, OUTPUT)}"), flush=True)
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


def _job(requests: Sequence[Request], location: str, settings: dict[str, Any]) -> tuple[JobConfig, dict[str, Any]]:
    """The job that answers the requests, and which of its settings they agree on. Raises JobError."""
    agreed = settings_of(requests, location)
    # Where no request can be answered, no model is loaded, and none needs to be named.
    model = settings.get("model") or (model_of(requests, location) if requests else "-")
    config = JobConfig(
        **settings | {"model": model} | agreed, input=(below(below(settings["output"], FOLDER), DOCUMENTS),),
        text_column="text", id_column="id", questions_column="questions", prompt_file=str(PROMPT),
    )  # fmt: skip
    return config, agreed


def _refuse_rows(store: Store, refused: Request, config: JobConfig) -> None:
    """Raise JobError if the output holds rows and --force is not given: with no request to answer, they are not ours.

    refused: one of the requests.
    """
    if part_names(store) and not config.force:
        why = f"no request can be answered ({short(refused.custom_id)}: {refused.refused})"
        raise JobError(
            f"--output {store.name}: it holds rows, and {why}; choose another output, or --force to keep them"
        )


def _describe(table: pa.Table, requests: Sequence[Request], config: JobConfig) -> int:
    """Tell which requests are refused, and the plan of the others' job; the exit code. Writes nothing that stays."""
    refused = [(request.custom_id, request.refused) for request in requests if request.refused]
    _show("refused", refused)
    print(f"requests: {len(requests) - len(refused):,} of {len(requests):,} can be answered", flush=True)
    if len(table):
        with tempfile.TemporaryDirectory() as folder:
            write_documents(table, folder)
            carry_out(replace(config, input=(below(folder, DOCUMENTS),)))
    return 2 if refused else 0


def _write_accepted(table: pa.Table, config: JobConfig) -> None:
    """Write the documents of the job into its output, if the job can go on there.

    Raises JobError if it cannot; the output is then as it was, with the documents that jobs.report shows.
    """
    from pipeline.job.plan import make_plan, survey_input

    store = Store(config.output)
    with tempfile.TemporaryDirectory() as folder:
        write_documents(table, folder)
        survey = survey_input(replace(config, input=(below(folder, DOCUMENTS),)))
        store.create()
        with store.locked():
            for message in recover(store):
                print(visible(message), file=sys.stderr, flush=True)
            make_plan(survey, store)
            write_documents(table, below(config.output, FOLDER))


def _show(what: str, failed: Sequence[tuple[str, str]]) -> None:
    """Say why some requests have no answer."""
    for custom_id, why in failed[:FIRST_FAILED]:
        print(visible(f"{what}: {custom_id}: {why}"))


if __name__ == "__main__":
    run_main(main)
