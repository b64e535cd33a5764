"""Compare Stem with dense attention on your own documents: python -m jobs.audit --input DOCS --model PATH_OR_ID

Reads a sample of the documents with dense attention and with Stem, in the product's engine, and writes what that
changes, in time and in outputs, to --output: audit.html, rows.parquet (a row for each document and arm), audit.json.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jobs.audit.advice import recommend
from jobs.audit.figures import arm_figures
from jobs.audit.known import Known, known_documents
from jobs.audit.measure import Clock, Measured, measure
from jobs.audit.options import Options, options_of, parser
from jobs.audit.page import page, short_sections, subtitle
from jobs.audit.results import FIGURES, PAGE, ROWS, AuditRow, read_audit, rows_of, write_rows
from jobs.audit.sample import Sample, draw
from jobs.cli import check_output, run_main
from jobs.measurement import stamp
from jobs.page.charts import graph_objects
from jobs.page.terminal import print_sections
from pipeline.errors import without_secrets
from pipeline.location import safe_name
from pipeline.prompts.tokens import load_tokens
from pipeline.settings.questions import questions_of


def main(arguments: Sequence[str]) -> int:
    """Run an audit, or write an earlier one's page again; the exit code. Raises JobError."""
    graph_objects()  # fail before the work, not after it
    flags = parser((__doc__ or "").splitlines()[0]).parse_args(arguments)
    if flags.report:
        rows, audit = read_audit(flags.report)
        write_page(audit, rows, flags.report)
        return 0
    check_output(flags.output)
    options = options_of(flags)
    rows, audit = run(options, Clock())
    audit["command"] = without_secrets(shlex.join(["python", "-m", "jobs.audit", *arguments]))
    options.output.mkdir(parents=True, exist_ok=True)
    write_rows(rows, options.output)
    (options.output / FIGURES).write_text(json.dumps(audit, indent=1) + "\n", encoding="utf-8")
    write_page(audit, rows, options.output)
    failed = audit["refused"] or any(arm["failed"] for arm in audit["arms"])
    return 2 if failed else 0


def run(options: Options, clock: Clock) -> tuple[list[AuditRow], dict[str, Any]]:
    """Measure; the rows, and all else that the page shows. Raises JobError."""
    tokens = load_tokens(options.tokenizer, options.job.revision, options.job.trust_remote_code)
    options = replace(options, stop_ids=() if options.random_weights else tokens.eos_ids)
    sample = draw(options, tokens)
    text: Callable[[Sequence[int]], str] = lambda ids: tokens.decode(list(ids))  # noqa: E731
    if not options.own_tokenizer:
        text = lambda ids: " ".join(map(str, ids))  # noqa: E731
    known = known_documents(options, sample.documents)
    found = measure(options, sample.documents, known, clock)
    rows = [row for each in found.runs for row in rows_of(each, sample.documents, found.reference, text)]
    clock.say("measured")
    return rows, summary(options, sample, known, found, rows)


def summary(
    options: Options, sample: Sample, known: Known, found: Measured, rows: Sequence[AuditRow]
) -> dict[str, Any]:
    """What audit.json holds, but for the command."""
    dense = {each.arm.precision: each for each in found.runs if each.arm.dense}
    arms = []
    for each in found.runs:
        own = [row for row in rows if row.arm == each.arm.name]
        arms.append(arm_figures(each, own, dense.get(each.arm.precision), found.runs[0]))
    random, total = options.random_weights, sample.total
    advice = recommend(arms, options.limits, total, random_weights=random, why_none=known.why_none)
    return {
        "model": safe_name(options.job.model),
        "stamp": stamp(options.arms[0].config.torch_device()),
        "command": "",
        "random_weights": options.random_weights,
        "question": questions_of(options.job).tasks[0].question,
        "questions": len(questions_of(options.job).tasks),
        "max_new_tokens": options.job.max_new_tokens,
        "kl_tokens": options.kl_tokens,
        "limits": asdict(options.limits),
        "show": options.show,
        "known": len(known.readings),
        "why_none": known.why_none,
        "sample": {
            "documents": len(sample.documents),
            "of": sample.total,
            "seed": options.seed,
            "prompt_tokens": [len(document.prompt) for document in sample.documents],
            "left_out": sample.left_out,
        },
        "arms": arms,
        "refused": found.refused,
        "advice": asdict(advice),
    }


def write_page(audit: dict[str, Any], rows: Sequence[AuditRow], folder: Path) -> None:
    """The page, and its beginning on the terminal."""
    (folder / PAGE).write_text(page(audit, rows), encoding="utf-8")
    print_sections("Audit", subtitle(audit), short_sections(audit), sys.stdout)
    print(f"{folder / PAGE}, {ROWS} ({len(rows)} rows), {FIGURES}")


if __name__ == "__main__":
    run_main(main)
