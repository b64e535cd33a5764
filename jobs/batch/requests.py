"""The requests of a batch file: which a job can answer, and with which of its settings."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import JobError, one_line
from pipeline.interruptible import interruptible
from pipeline.location import is_remote, open_filesystem, safe_name, split_location
from pipeline.settings.options import holdable, short
from pipeline.settings.questions import OWN_KEYS, SAMPLING, asked_as
from pipeline.settings.vllm import NOT_HERE

URL = "/v1/chat/completions"
# Settings of which a job has one, by what people are told; the names of the flags.
SHARED = {
    "system": "the system message", "stop": "stop", "schema": "the schema of response_format",
    "chat_template_args": "chat_template_kwargs",
}  # fmt: skip
# What changes no answer, and values with which the others do not.
IGNORED = (
    "metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store",
    "stream_options", "user",
)  # fmt: skip
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "stream": (False,), "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},),
    "frequency_penalty": (0,), "presence_penalty": (0,), "length_penalty": (1,), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "modalities": (["text"],), "min_tokens": (0,),
    "ignore_eos": (False,), "stop_token_ids": ([],), "bad_words": ([],), "skip_special_tokens": (True,),
    "add_generation_prompt": (True,), "echo": (False,),
}  # fmt: skip
READ = ("model", "messages", "max_tokens", "max_completion_tokens", "stop", "response_format", "chat_template_kwargs")


class RefusedError(ValueError):
    """A request asks for something that there is not here; the message says what."""


@dataclass(frozen=True)
class Request:
    """A line of a batch. refused: why it is not answered, empty if it is.

    message: the user's. model: as its body names it. shared: by the names in SHARED, what a job has one of. own: by the
    names of the settings, how this request samples and how many tokens it may have. line: counts from 1.
    """

    custom_id: str
    line: int
    refused: str = ""
    message: str = ""
    model: str | None = None
    shared: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)


def read_requests(location: str) -> list[Request]:
    """The requests of a batch file, in its order. Raises JobError with the line of what is no request."""
    found: dict[str, Request] = {}
    for number, line in enumerate(_text(location).split("\n"), 1):
        if not line.strip():
            continue
        try:
            request = _request(line, number)
        except ValueError as error:
            raise JobError(f"--input {safe_name(location)}: line {number}: {error}") from None
        other = found.setdefault(request.custom_id, request)
        if other is not request:
            what = f"its custom_id {short(request.custom_id)} is that of line {other.line}; expected one of its own"
            raise JobError(f"--input {safe_name(location)}: line {number}: {what}")
    if not found:
        raise JobError(f"--input {safe_name(location)}: holds no requests; expected a line of JSON for each")
    return list(found.values())


def settings_of(requests: Collection[Request], location: str) -> dict[str, Any]:
    """What all requests agree on, by the names of a job's settings. Raises JobError where they must and do not."""
    found: dict[str, Any] = {}
    for name, told in SHARED.items():
        values = [request.shared.get(name) for request in requests]
        differ(requests, values, told, "a job has one for all: split the file", location)
        if values and values[0]:
            found[name] = values[0]
    for name in ("max_new_tokens", *SAMPLING):
        values = [request.own.get(name) for request in requests]
        if values and values[0] is not None and all(value == values[0] for value in values):
            found[name] = values[0]
    return found


def model_of(requests: Collection[Request], location: str) -> str:
    """The one model that all requests name. Raises JobError."""
    names = [request.model for request in requests]
    differ(requests, names, "their model", "give --model, or split the file", location)
    if not names or names[0] is None:
        raise JobError(f"--input {safe_name(location)}: its requests name no model; give --model")
    return names[0]


def differ(requests: Collection[Request], values: list[Any], what: str, mend: str, location: str) -> None:
    """Raise JobError, with the first two requests that have different values, if there are such."""
    for request, value in zip(requests, values, strict=True):
        if value != values[0]:
            first = next(iter(requests))
            which = f"line {first.line} ({short(first.custom_id)}) and line {request.line} ({short(request.custom_id)})"
            got = f"{short(values[0])} and {short(value)}"
            raise JobError(f"--input {safe_name(location)}: {which} differ in {what}, {got}; {mend}")


def _text(location: str) -> str:
    """Raises JobError."""

    def read() -> bytes:
        place = split_location(location)
        with open_filesystem(place.filesystem).open_input_stream(place.path) as file:
            return file.readall()

    try:
        return interruptible(is_remote(location), read).decode("utf-8-sig")
    except JobError:
        raise
    except Exception as error:  # filesystems of fsspec raise what they like
        raise JobError(f"--input {safe_name(location)}: cannot be read: {one_line(error)}") from None


def _request(line: str, number: int) -> Request:
    """Raises ValueError if it is none: what was got, and what is expected."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = line
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object with custom_id, method, url and body, got {short(values)}")
    custom_id, url, body = (values.get(name) for name in ("custom_id", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id or not holdable(custom_id):
        raise ValueError(f"expected a text as its custom_id, got {short(custom_id)}")
    if not isinstance(body, dict):
        raise ValueError(f"expected a JSON object as its body, got {short(body)}")
    if url != URL or values.get("method", "POST") != "POST":
        asked = f"{values.get('method', 'POST')} {url}"
        return Request(custom_id, number, f"only POST {URL} is answered here, got {short(asked)}")
    if not isinstance(body.get("messages"), list):
        raise ValueError(f"expected a list as its body.messages, got {short(body.get('messages'))}")
    try:
        return _answerable(custom_id, number, body)
    except RefusedError as error:
        return Request(custom_id, number, one_line(error))


def _answerable(custom_id: str, number: int, body: Mapping[str, Any]) -> Request:
    """Raises RefusedError."""
    for name, value in body.items():
        if value is not None and name not in (*READ, *IGNORED, *SAMPLING) and value not in NEUTRAL.get(name, ()):
            why = NOT_HERE.get(name, "" if name in NEUTRAL else "there is no such setting here")
            raise RefusedError(f"body.{name} {short(value)}" + (f": {why}" if why else " is not possible here"))
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise RefusedError(f"body.model must be a text, got {short(model)}")
    system, message = _messages(body["messages"])
    shared = {
        "system": system, "stop": _stop(body.get("stop")), "schema": _schema(body.get("response_format")),
        "chat_template_args": body.get("chat_template_kwargs") or None,
    }  # fmt: skip
    return Request(custom_id, number, "", message, model, shared, _own(body))


def _messages(messages: list[Any]) -> tuple[str | None, str]:
    """The system message, if there is one, and the user's. Raises RefusedError."""
    roles = [item.get("role") if isinstance(item, dict) else None for item in messages]
    if roles not in (["user"], ["system", "user"], ["developer", "user"]):
        found = ", ".join(map(str, roles)) or "none"
        raise RefusedError(
            f"body.messages: a system message and one of the user's are answered, no conversations, got {found}"
        )
    *before, message = (_content(item.get("content")).rstrip() for item in messages)
    if len(message.strip()) < 2:
        raise RefusedError(f"body.messages: the user's must have two characters or more, got {short(message)}")
    return (before[0] if before else "") or None, message


def _content(content: Any) -> str:
    """The text of a message; of several parts one in a line, as vLLM has it. Raises RefusedError."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise RefusedError(f"body.messages: only texts are read, no images and sounds, got {short(kind)}")
        if not isinstance(part.get("text"), str) or not holdable(part["text"]):
            raise RefusedError(f"body.messages: the content must be a text, got {short(part.get('text'))}")
    return "\n".join(part["text"] for part in parts)


def _stop(stop: Any) -> list[str] | None:
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(text, str) and text and holdable(text) for text in stops):
        raise RefusedError(f"body.stop must be a text or a list of texts, got {short(stop)}")
    return stops or None


def _schema(form: Any) -> dict[str, Any] | None:
    kind = form.get("type") if isinstance(form, dict) else form
    if kind in (None, "text"):
        return None
    inner = form.get("json_schema") if isinstance(form, dict) else None
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if kind != "json_schema" or not isinstance(schema, dict) or not schema:
        raise RefusedError(f"body.response_format must be text, or json_schema with a schema, got {short(form)}")
    return schema


def _own(body: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of this request, checked as those of a question are. Raises RefusedError."""
    found = {name: body[name] for name in SAMPLING if body.get(name) is not None}
    if found.get("top_k") in (-1, 0):  # so vLLM says: all of them
        del found["top_k"]
    most = next((body[name] for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None), None)
    if most is not None:
        found["max_new_tokens"] = most
    try:
        asked_as({"question": "-", **found}, "body", OWN_KEYS)
    except JobError as error:
        raise RefusedError(str(error)) from None
    return found
