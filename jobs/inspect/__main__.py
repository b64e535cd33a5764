"""Show what sparse prefill keeps of a document: python -m jobs.inspect --document FILE --model PATH_OR_ID

Writes inspect.html to --output: which key blocks each head's query blocks keep in chosen layers, the
budget against position, and the density of each layer, as the engine's own prefill selects them.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from jobs.cli import Parser, add_job_flags, check_output, job_config, run_main
from jobs.inspect.capture import Capture, capture
from jobs.inspect.page import sections
from jobs.page import render_page
from jobs.page.charts import graph_objects
from pipeline.errors import DocumentError, JobError, nearest, without_secrets
from pipeline.settings.config import JobConfig
from pipeline.settings.shared import Sampling
from pipeline.source import DocumentReader, find_files, list_documents

PAGE = "inspect.html"
SHOWN = 4
# Settings of the job that a single prefill knows nothing of.
WITHOUT = {
    *("input", "output", "keep_columns", "shard", "max_live", "arena_tokens", "stop", "schema"),
    *(item.name for item in fields(Sampling) if item.name != "seed"),  # which is that of dummy weights, too
    *(item.name for item in fields(JobConfig) if item.metadata["group"] == "run"),
}


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit code. Raises JobError."""
    graph_objects()  # fail before the work, not after it
    parser = _parser()
    flags = parser.parse_args(arguments)
    flags.input = [flags.document]
    folder = Path(flags.output or f"inspect-{Path(flags.document).stem}")
    check_output(folder)
    flags.output = str(folder)
    job = job_config(flags)
    name, text = read_document(job, flags.document_id)
    seen = capture(job, text)
    shown = chosen_layers(seen, flags.layers)
    folder.mkdir(parents=True, exist_ok=True)
    command = without_secrets(shlex.join(["python", "-m", "jobs.inspect", *arguments]))
    title = f"What sparse prefill keeps of {name}"
    subtitle = f"{job.model}, preset {job.preset}, {len(seen.prompt):,} tokens"
    page = render_page(title, subtitle, sections(seen, shown), command)
    (folder / PAGE).write_text(page, encoding="utf-8")
    print(f"density {seen.density:.3f} over {len(seen.densities)} layers; open {folder / PAGE} in a browser")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m jobs.inspect", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--document", required=True, metavar="FILE", help="an input file; with --id if it holds several documents"
    )
    parser.add_argument("--id", dest="document_id", metavar="TEXT", help="which document of the file")
    parser.add_argument(
        "--layers", nargs="+", metavar="N", help=f"layers to show, or all; unset: up to {SHOWN} that differ"
    )
    parser.add_argument("--output", metavar="DIR", help="folder for the page; unset: inspect-<name>")
    add_job_flags(parser, without=WITHOUT)
    return parser


def read_document(job: JobConfig, document_id: str | None) -> tuple[str, str]:
    """Id and text of the document to look at. Raises JobError."""
    try:
        files, _ = find_files(job.input)
    except JobError as error:
        raise JobError(str(error).replace("--input", "--document", 1)) from None
    catalogue = list_documents(files, text_column=job.text_column, id_column=job.id_column, settings=job)
    ids = catalogue.ids.to_pylist()
    if document_id is None and len(ids) > 1:
        raise JobError(f"--document {job.input[0]} holds {len(ids):,} documents: give --id, e.g. --id {ids[0]}")
    if document_id is not None and document_id not in ids:
        raise JobError(f"--id {document_id}: there is none in {job.input[0]}{nearest(document_id, ids)}")
    document = catalogue.document(ids.index(document_id) if document_id is not None else 0)
    try:
        if document.error:
            raise DocumentError(document.error)
        return document.document_id, DocumentReader(job.text_column, [], job).read(document)[0]
    except DocumentError as error:
        raise JobError(f"{document.source}: {error}") from None


def chosen_layers(seen: Capture, asked: Sequence[str] | None) -> list[int]:
    """The layers that get a map of their own: those asked for, or the first, the last and the most different ones.

    Raises JobError for a layer that there is none of or that drops nothing.
    """
    if asked is None:
        patterns = {layer: cells.pattern() for layer, cells in seen.layers.items()}
        layers = [*patterns]
        telling = [max(layers, key=lambda layer: patterns[layer].columns), layers[0], layers[-1]]
        telling.append(max(layers, key=lambda layer: patterns[layer].diagonals))
        return sorted(set(telling))[:SHOWN]
    if asked == ["all"]:
        return [*seen.layers]
    chosen = []
    for text in asked:
        layer = int(text) if text.isdecimal() else -1
        if layer in seen.dense:
            raise JobError(f"--layers {layer}: {seen.dense[layer]}; it has no selection to show")
        if layer not in seen.layers:
            raise JobError(f"--layers {text}: must be all, or layers from 0 to {len(seen.densities) - 1}")
        chosen.append(layer)
    return [*dict.fromkeys(chosen)]


if __name__ == "__main__":
    run_main(main)
