"""The files of a batch in its output folder: the documents that the job reads, and the output, a line for each request.

Documents are a Parquet file in a folder of its own, where nobody takes them for results.
"""

from __future__ import annotations

import contextlib
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
from pipeline.results.parts import part_names, read_columns, read_part
from pipeline.results.store import Store

FOLDER, DOCUMENTS, OUTPUT = "batch", "documents.parquet", "batch_output.jsonl"
# Rows are read out of row groups that are in memory as a whole.
GROUP_BYTES = 32 << 20
COLUMNS = (
    "document_id", "question_id", "status", "error", "output", "finish_reason", "prompt_tokens", "output_tokens",
    "model", "finished_at",
)  # fmt: skip
Key = tuple[str, str]
# A request of a group, and its question.
Member = tuple[Request, str]


def below(location: str, name: str) -> str:
    """The location of `name` in a folder."""
    base, mark, query = location.partition("?") if is_uri(location) else (location, "", "")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def names_of(store: Store) -> set[str]:
    """Ids of the documents that have rows. Damaged parts are passed over: the job sets them aside, with their rows."""
    names: set[str] = set()
    for part in part_names(store):
        with contextlib.suppress(OSError, pa.ArrowException):
            names.update(read_part(store, part, ["document_id"])["document_id"].to_pylist())
    return names


def documents_of(
    requests: Sequence[Request], agreed: Collection[str] = (), named: Collection[str] = ()
) -> tuple[pa.Table, dict[str, Key]]:
    """Documents with questions of their own that come to the requests' messages, and by custom_id where each is.

    Columns: id, text, space (between text and question) and questions, JSON. The id is the custom_id of the group's
    first message in their order. agreed: settings that the job has for all requests. named: ids of documents that have
    rows; each names a document again as long as its request is there, so that rows of a batch that grew stay known.
    """
    rows: list[tuple[str, ...]] = []
    places: dict[str, Key] = {}
    for found in group([request.message for request in requests]):
        members = list(zip([requests[number] for number in found.members], found.questions, strict=True))
        for document_id, asking in _by_document(members, named):
            asked = []
            for number, (request, question) in enumerate(asking, 1):
                own = {name: value for name, value in request.own.items() if name not in agreed}
                asked.append({"question": question, **own})
                places[request.custom_id] = (document_id, f"{OWN}-{number}")
            rows.append((document_id, found.document, found.space, json.dumps(asked)))
    schema = pa.schema([(name, pa.large_string()) for name in ("id", "text", "space", "questions")])
    return pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema), places


def _by_document(members: Sequence[Member], named: Collection[str]) -> list[tuple[str, Sequence[Member]]]:
    """The members of a group by the id of their document: one, unless requests of several documents have met in it."""
    ids = [request.custom_id for request, _ in members]
    first, *others = [custom_id for custom_id in ids if custom_id in named] or ids[:1]
    apart = {custom_id: [member] for custom_id, member in zip(ids, members, strict=True) if custom_id in others}
    together = [member for member in members if member[0].custom_id not in apart]
    return [(first, together), *apart.items()]


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
