"""Single bits flipped in the files of a finished job: whoever reads them, or runs it again, is told or sees no harm."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa

from pipeline import read_results
from pipeline.errors import JobError
from pipeline.imports import ROOT
from pipeline.job import manifest
from pipeline.job.plan import Survey, make_plan, survey_input
from pipeline.results.lock import FILE
from pipeline.results.parts import part_names, recover
from pipeline.results.rows import Outcome, Row, result_schema
from pipeline.results.sink import Sink
from pipeline.results.store import Store
from pipeline.settings.config import JobConfig
from tools.faults.runs import refuse_used

MODEL = ROOT / "models" / "tiny-reader"
DOCUMENTS = 12
# Of 20 flips: in pages and in footers of parts, in the manifest, in the lock.
SHARES = {"page": 8, "footer": 7, "manifest": 4, "lock": 1}


def flips(folder: Path, count: int, seed: int = 0) -> Counter[tuple[str, str]]:
    """Flip `count` bits, one at a time; how often what was (place, "detected" | "harmless" | "silent")."""
    survey, rows = finished_job(folder)
    store = Store(survey.config.output)
    chance, found = random.Random(seed), Counter[tuple[str, str]]()
    whole = {path: path.read_bytes() for path in sorted(folder.joinpath("out").iterdir())}
    for number in range(count):
        place = chance.choices(list(SHARES), list(SHARES.values()))[0]
        path, at = _choose(chance, whole, place)
        data = bytearray(whole[path])
        data[at] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        what = _outcome(store, survey, rows)
        found[place, what] += 1
        if what == "silent":
            print(f"flip {number} is silent: byte {at} of {path.name}", flush=True)
        for name in store.list():  # what was set aside
            if folder / "out" / name not in whole:
                store.delete(name)
        for other, content in whole.items():
            if other == path or not other.exists():
                other.write_bytes(content)
    return found


def finished_job(folder: Path) -> tuple[Survey, pa.Table]:
    """Input, and the output of a job over it as it stands when all is done; what the job read, and the rows."""
    refuse_used(folder)
    (folder / "docs").mkdir(parents=True)
    texts = [{"id": f"d{i:02}", "text": f"text {i} " * 9, "year": 2000 + i} for i in range(DOCUMENTS)]
    (folder / "docs" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    config = JobConfig(
        input=(str(folder / "docs"),), output=str(folder / "out"), model=str(MODEL), keep_columns=("year",)
    )
    survey = survey_input(config)
    store = Store(config.output)
    store.create()
    with store.locked():
        sink = Sink(store, result_schema(survey.catalogue.kept), flush_documents=DOCUMENTS // 2, flush_seconds=60)
        for position, text in enumerate(texts):
            document = survey.catalogue.document(position)
            outcome = Outcome(status="ok", output=f"Of {text['text']}")
            year = pa.array([text["year"]], survey.catalogue.kept[0].type)
            sink.add(
                Row(
                    document_id=document.document_id, source=document.source, outcome=outcome, attempts=1,
                    input_stamp=document.stamp, kept={"year": year},
                )
            )  # fmt: skip
        manifest.save(store, config, survey.prints, state="finished", documents=DOCUMENTS)
    return survey, read_results(config.output)


def _choose(chance: random.Random, whole: dict[Path, bytes], place: str) -> tuple[Path, int]:
    """A file and a byte in it."""
    if place in ("manifest", "lock"):
        path = next(path for path in whole if path.name == (manifest.NAME if place == "manifest" else FILE))
        return path, chance.randrange(len(whole[path]))
    path = chance.choice([path for path in whole if path.suffix == ".parquet"])
    data = whole[path]
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return path, chance.randrange(footer, len(data)) if place == "footer" else chance.randrange(footer)


def _outcome(store: Store, survey: Survey, rows: pa.Table) -> str:
    """What a reader of the rows, and then the job run again, make of the folder as it is."""
    told = False
    try:
        if not read_results(store.location).equals(rows):
            return "silent"
    except JobError:
        told = True
    try:
        with store.locked():
            told = bool(recover(store)) or told
            plan = make_plan(survey, store)
        if len(plan.pending) + plan.already != DOCUMENTS or (len(plan.pending) and not told):
            return "silent"
        if part_names(store) and not _within(read_results(store.location), rows):
            return "silent"
    except JobError:
        told = True
    return "detected" if told else "harmless"


def _within(some: pa.Table, rows: pa.Table) -> bool:
    known = {row["document_id"]: row for row in rows.to_pylist()}
    return all(known.get(row["document_id"]) == row for row in some.to_pylist())
