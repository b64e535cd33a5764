"""The files of a batch in its output folder: the documents that the job reads, and the output, a line for each request.

Documents are a Parquet file in a folder of its own, where nobody takes them for results.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.batch.grouping import group
from jobs.batch.requests import Request
from pipeline.location import is_uri
from pipeline.prompts.questions import OWN
from pipeline.results.parts import part_names, read_columns
from pipeline.results.store import Store

FOLDER, DOCUMENTS, OUTPUT = "batch", "documents.parquet", "batch_output.jsonl"
# Rows are read out of row groups that are in memory as a whole.
GROUP_BYTES = 32 << 20
COLUMNS = (
    "document_id", "question_id", "status", "error", "output", "finish_reason", "prompt_tokens", "output_tokens",
    "model", "finished_at",
)  # fmt: skip
Key = tuple[str, str]


def below(location: str, name: str) -> str:
    """The location of `name` in a folder."""
    base, mark, query = location.partition("?") if is_uri(location) else (location, "", "")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def documents_of(requests: Sequence[Request], agreed: Collection[str] = ()) -> tuple[pa.Table, dict[str, Key]]:
    """Documents with questions of their own that come to the requests' messages, and by custom_id where each is.

    Columns: id, text, space (between text and question) and questions, JSON. The id is the custom_id of the group's
    first message in their order. agreed: settings that the job has for all requests.
    """
    rows: list[tuple[str, ...]] = []
    places: dict[str, Key] = {}
    for found in group([request.message for request in requests]):
        members = [requests[number] for number in found.members]
        asked = []
        for number, (request, question) in enumerate(zip(members, found.questions, strict=True), 1):
            own = {name: value for name, value in request.own.items() if name not in agreed}
            asked.append({"question": question, **own})
            places[request.custom_id] = (members[0].custom_id, f"{OWN}-{number}")
        rows.append((members[0].custom_id, found.document, found.space, json.dumps(asked)))
    columns = [pa.array(values, pa.large_string()) for values in zip(*rows, strict=True)]
    return pa.table(columns, names=["id", "text", "space", "questions"]), places


def write_documents(table: pa.Table, folder: str) -> None:
    """Write the documents, unless they are there: rows know a file that nobody has written to since by its time."""
    stream = pa.BufferOutputStream()
    rows = max(1, GROUP_BYTES * len(table) // max(1, table.nbytes))
    pq.write_table(table, stream, compression="zstd", row_group_size=rows)
    data, store = stream.getvalue().to_pybytes(), Store(folder)
    store.create()
    if store.read(DOCUMENTS) != data:
        store.write(DOCUMENTS, data)


def write_output(store: Store, requests: Sequence[Request], places: Mapping[str, Key]) -> list[tuple[str, str]]:
    """Write the output, in the order of the requests. Gives (custom_id, why) of those without an answer."""
    table = read_columns(store, COLUMNS) if part_names(store) else pa.table({})
    rows = {(row["document_id"], row["question_id"]): row for row in table.to_pylist()}
    lines, failed = [], []
    for request in requests:
        document, question = places.get(request.custom_id, ("", ""))
        # A document that came to nothing has one row for all of its questions.
        row = rows.get((document, question)) or rows.get((document, OWN)) or {}
        line = line_of(request, row)
        if line["error"]:
            failed.append((request.custom_id, line["error"]["message"]))
        lines.append(json.dumps(line) + "\n")
    store.write(OUTPUT, "".join(lines).encode())
    return failed


def line_of(request: Request, row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the output. row: COLUMNS of the request's row; empty without one. All ids are made of the custom_id."""
    mark = hashlib.sha256(request.custom_id.encode()).hexdigest()[:24]
    response = error = None
    if request.refused:
        error = {"code": "invalid_request", "message": request.refused}
    elif row.get("status") != "ok":
        error = {"code": row.get("status", "missing"), "message": row.get("error") or "it has no row in the results"}
    else:
        usage = {"prompt_tokens": row["prompt_tokens"], "completion_tokens": row["output_tokens"]}
        reason = "length" if row["finish_reason"] == "length" else "stop"
        message = {"role": "assistant", "content": row["output"]}
        body = {
            "id": f"chatcmpl-{mark}",
            "object": "chat.completion",
            "created": int(row["finished_at"].timestamp()),
            "model": row["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": reason}],
            "usage": usage | {"total_tokens": sum(usage.values())},
        }
        response = {"status_code": 200, "request_id": f"req-{mark}", "body": body}
    return {"id": f"batch_req_{mark}", "custom_id": request.custom_id, "response": response, "error": error}
