"""Write the demo's documents and the findings that they hold: python -m tools.demo_documents

Eight synthetic reports, and copies of the two real texts with findings planted in them. The same seed gives the same
files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

from transformers import AutoTokenizer

from jobs.cli import Parser, run_main
from jobs.known.grammar import NAMES, PLACES
from tools.demo_documents.reports import Report, invent_facts, plant, synthetic_report

# Length in tokens of models/tiny-reader's tokenizer, and the number of findings, of each synthetic report.
SYNTHETIC = [(8200, 4), (8200, 6), (8300, 3), (8400, 5), (8600, 7), (9000, 4), (10000, 6), (14000, 5)]
REAL_TEXTS = ["jargon-file", "newton-opticks"]
REAL_FINDINGS = 4
NOTES_PER_REPORT = 8


def make_reports(model: str, documents: Path, seed: int) -> dict[str, Report]:
    """All documents with known findings, by document id. The real texts are read from `documents`."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    reports = {}
    for index, (n_tokens, n_findings) in enumerate(SYNTHETIC, start=1):
        rng = Random(f"{seed}/report-{index}")
        title = f"Report on the {rng.choice(NAMES)} {rng.choice(PLACES)}"
        report = synthetic_report(rng, title, n_tokens, n_findings, NOTES_PER_REPORT, count_tokens)
        reports[f"report-{index:02}"] = report
    for name in REAL_TEXTS:
        rng = Random(f"{seed}/{name}")
        findings, _ = invent_facts(rng, REAL_FINDINGS, n_notes=0)
        text = (documents / f"{name}.txt").read_text(encoding="utf-8")
        reports[f"{name}-planted"] = plant(rng, text, findings, notes=[])
    return reports


def main(arguments: Sequence[str]) -> int:
    """Write the documents and the findings; 0."""
    parser = Parser(prog="python -m tools.demo_documents", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--documents", type=Path, default=Path("examples/documents"), help="folder to write the texts to"
    )
    parser.add_argument(
        "--findings", type=Path, default=Path("examples/findings.jsonl"), help="file to write the findings to"
    )
    parser.add_argument("--model", default="models/tiny-reader", help="whose tokenizer measures the lengths")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(arguments)

    reports = make_reports(args.model, args.documents, args.seed)
    for document_id, report in reports.items():
        (args.documents / f"{document_id}.txt").write_text(report.text, encoding="utf-8")
    lines = [
        json.dumps({"document_id": f"{name}.txt", "findings": list(report.findings)})
        for name, report in reports.items()
    ]
    args.findings.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {len(reports)} documents to {args.documents} and their findings to {args.findings}")
    return 0


if __name__ == "__main__":
    run_main(main)
