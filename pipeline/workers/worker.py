"""One engine in a process of its own: takes documents, gives back rows."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from typing import Any, TypeVar, cast

import pyarrow as pa

from pipeline.answers.grammar import Grammar
from pipeline.answers.schema import AnswerError, Schema, compile_schema
from pipeline.engine.config import Completion, EngineConfig, Request, Sampling
from pipeline.engine.laps import Laps
from pipeline.errors import DocumentError, JobError, one_line
from pipeline.imports import check_kernels
from pipeline.prompts.prompt import Prompt, PromptBuilder, Task
from pipeline.prompts.tokens import Tokens, load_tokens
from pipeline.results.columns import utc_now
from pipeline.results.kept_columns import Kept
from pipeline.results.rows import EngineFields, Outcome, Row, WorkerFields
from pipeline.review.evidence import find_evidence
from pipeline.review.flags import find_flags
from pipeline.settings.shared import ReadSettings
from pipeline.source import Document, DocumentReader, input_hash
from pipeline.source.processes import TOGETHER
from pipeline.workers.loop import EngineBrokenError, EngineLike, EngineLoop
from pipeline.workers.metrics import report_arena

T = TypeVar("T")
# How long after its deadline a document may still hold the reader or the engine before the worker counts as hung. The
# end of a neighbour's prefill is one step of the engine, tens of seconds for a long prompt in a large model.
GRACE_SECONDS = 60.0
# A document that ran out of memory is tried once more, alone and in prefill chunks smaller by this factor.
CAREFUL = 4


@dataclass(frozen=True)
class WorkerConfig:
    """All that a worker needs to know. threads: for torch on a CPU; 0 leaves its default. deadline: seconds; 0 none.

    schema: JSON text of what answers are held to, or None.
    model_name: what the rows call the model. today: the date for chat templates that print one.
    evidence: whether rows get the passages that support the output.
    engine_factory: "module:name" of a callable EngineConfig -> engine.
    """

    engine: EngineConfig
    task: Task
    too_long: str
    max_new_tokens: int
    sampling: Sampling
    text_column: str
    model_name: str
    config_hash: str
    today: date
    template_args: Mapping[str, Any] | None = None
    thinking: str = "off"
    schema: str | None = None
    kept: tuple[pa.Field, ...] = ()
    evidence: bool = True
    reading: ReadSettings = ReadSettings()
    deadline: float = 0.0
    grace: float = GRACE_SECONDS
    threads: int = 0
    engine_factory: str = "pipeline.engine:Engine"


@dataclass
class Work:
    """A document in the worker: its row's columns as far as they are known, and what it has in the engine.

    completions: of its prompts, in the order in which they came back. requests: ids of those that are out.
    chunk_tokens: prefill steps at most so long; None: as the engine's configuration says. unread: characters
    [start, end) of the document's text that were cut out to make it fit.
    """

    fields: WorkerFields
    chunk_tokens: int | None = None
    unread: tuple[int, int] | None = None
    completions: list[Completion] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


class Worker:
    """Reads, tokenises and completes documents, several at a time. Runs as a Ray actor; all its methods are coroutines.

    The engine has a thread, reading and tokenising have another, so that the next prompts are ready when it asks.
    """

    def __init__(self, config: WorkerConfig) -> None:
        check_kernels()
        self._config = config
        self._name = f"{socket.gethostname()}/{os.getpid()}"
        self._gpu = ""
        self._precision = ""
        self._limit = 0
        self._hf_config: Any = None  # with the context that the model was made for
        self._reader = ThreadPoolExecutor(1, "reader")
        self._converting = ThreadPoolExecutor(TOGETHER, "converting")  # these threads wait for other processes
        self._documents = DocumentReader(config.text_column, list(config.kept), config.reading)
        self._schema: Schema | None = None
        self._grammar: Grammar | None = None
        self._busy_read = 0.0
        self._first = self._last = 0.0  # when the first document came and the last row went

    async def load(self) -> dict[str, Any]:
        """Load tokenizer and engine. Returns the engine's description, and the seconds of the parts of the start.

        Raises what loading raises.
        """
        config = self._config
        loop = asyncio.get_running_loop()
        laps = Laps()
        await loop.run_in_executor(self._reader, _import_engine, config)
        laps.end("imports")
        # Before the engine: what is wrong there shows in a second. Not beside it: transformers' lazy imports
        # are not safe in two threads at once.
        self._hf_config, self._tokens = await loop.run_in_executor(self._reader, _load_tokens, config.engine)
        self._builder = PromptBuilder(self._tokens, config.task, config.template_args, config.today, config.thinking)
        if config.schema is not None:
            self._builder.check_answers()
            self._schema = compile_schema(config.schema)
            make = partial(self._schema.grammar, self._tokens.tokenizer, self._tokens.eos_ids)
            self._grammar = await loop.run_in_executor(self._reader, make)
        laps.end("tokenizer")
        self._loop = EngineLoop(lambda: _build_engine(config))
        engine = await asyncio.wrap_future(self._loop.ready)
        laps.end("engine")
        self._limit = engine.max_context - config.max_new_tokens
        if self._limit < 1:
            raise JobError(
                f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt: "
                f"the context is {engine.max_context} tokens"
            )
        self._arena_report = asyncio.create_task(report_arena(engine, self._name))
        about = engine.describe()
        self._gpu = str(about.get("gpu") or about.get("device") or "cpu")
        self._precision = str(about["precision"])
        return {
            "worker": self._name,
            "max_context": engine.max_context,
            "max_live": config.engine.max_live,
            "engine": about,
            "start_seconds": _start_seconds(laps, about),
        }

    async def stats(self) -> dict[str, float]:
        """Seconds: engine busy, reader busy, and from the first document to the last row."""
        span = self._last - self._first
        return {"engine_seconds": self._loop.busy_seconds, "reader_seconds": self._busy_read, "span_seconds": span}

    async def process(self, document: Document, careful: bool = False) -> Row:
        """The row of a document; whatever is wrong with it is in the row.

        careful: it ran out of memory before, so its prompt is read in smaller chunks.
        Raises EngineBrokenError if this worker cannot go on; then any of the documents in it may be the cause.
        """
        begin = time.perf_counter()
        work = Work(
            WorkerFields(
                precision=self._precision, worker=self._name, gpu=self._gpu, model=self._config.model_name,
                config_hash=self._config.config_hash, prompt_hash=self._config.task.fingerprint(), started_at=utc_now(),
            )
        )  # fmt: skip
        if careful:
            work.chunk_tokens = max(1, self._config.engine.chunk_tokens // CAREFUL)
        self._first = self._first or begin
        kept = Kept()
        limit = asyncio.timeout(self._config.deadline or None)
        try:
            async with limit:
                text, kept = await self._read(document, work)
                outcome = await self._complete(document.document_id, text, work)
                outcome = await self._review(text, outcome, work)
        except EngineBrokenError:
            raise
        except DocumentError as error:
            hint = self._stretch_hint(error.tokens)
            outcome = Outcome(status=error.status, error=one_line(f"{error}; {hint}" if hint else error))
        except Exception as error:  # a tokenizer or template that raises costs this document alone
            if limit.expired():
                outcome = Outcome(status="timeout", error=f"not done after {self._config.deadline:g} s in the worker")
            else:
                outcome = Outcome(status="error", error=one_line(f"{type(error).__name__}: {error}"))
        if limit.expired():
            await self._let_go(work.requests)
        elif work.requests:  # other parts of a document of which one failed
            self._loop.abort(work.requests)
        self._last = time.perf_counter()
        work.fields.total_seconds = self._last - begin
        return Row(
            document_id=document.document_id, source=document.source, outcome=outcome,
            from_engine=EngineFields.of_parts(work.completions) if work.completions else None,
            from_worker=work.fields, input_stamp=document.stamp, finished_at=utc_now(), kept=kept.columns,
        )  # fmt: skip

    def _stretch_hint(self, prompt_tokens: int) -> str:
        """What helps a prompt that is too long for the model, and not for the memory or for --max-context."""
        from pipeline.engine.model.loading import context_limit
        from pipeline.engine.model.rope import stretch_hint

        engine = self._config.engine
        own = self._hf_config
        if not prompt_tokens or engine.max_context is not None or own is None:
            return ""
        if self._limit + self._config.max_new_tokens < int(context_limit(own) * (engine.rope_scaling or 1)):
            return ""
        return stretch_hint(own, prompt_tokens + self._config.max_new_tokens)

    async def _read(self, document: Document, work: Work) -> tuple[str, Kept]:
        def read() -> tuple[str, Kept]:
            text, kept = self._documents.read(document)
            work.fields.input_hash = input_hash(text, kept)
            return text, kept

        (text, kept), seconds = await self._in_reader(work, read, converts=self._documents.converts(document))
        work.fields.load_seconds += seconds
        work.fields.kept_error = kept.problem or None
        work.fields.page_starts, work.fields.input_note = kept.page_starts, kept.note or None
        return text, kept

    async def _complete(self, document_id: str, text: str, work: Work) -> Outcome:
        """What becomes of a document."""
        policy = self._config.too_long
        try:
            prompt = await self._prompt(work, text, truncate=policy == "truncate")
        except DocumentError as error:
            if error.status != "too_long" or policy != "map-reduce":
                raise
            return await self._map_reduce(document_id, text, work, merging=False)
        work.fields.truncated_tokens += prompt.truncated_tokens
        work.unread = prompt.unread
        return await self._run(whole_request(document_id), prompt, work)

    async def _map_reduce(self, document_id: str, text: str, work: Work, merging: bool) -> Outcome:
        """Process parts that fit, then merge their outputs; where those do not fit either, in parts again."""
        parts, seconds = await self._in_reader(work, self._builder.split, text, self._limit)
        work.fields.tokenize_seconds += seconds
        before = work.fields.parts
        work.fields.parts = before - 1 + len(parts) if before > 1 else len(parts)

        async def one(index: int, part: str) -> Outcome:
            prompt = await self._prompt(work, part, merging=merging)
            return await self._run(part_request(document_id, work.fields.parts, index), prompt, work)

        tasks = [asyncio.ensure_future(one(index, part)) for index, part in enumerate(parts)]
        try:
            results = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        for index, result in enumerate(results):
            if result.status != "ok":
                return replace(result, output=None, error=f"part {index + 1} of {len(parts)}: {result.error}")
        joined = "\n\n".join(result.output or "" for result in results)
        if not joined.strip():
            raise DocumentError(f"none of its {len(parts)} parts gave any output to merge")
        try:
            prompt = await self._prompt(work, joined, merging=True)
        except DocumentError as error:
            if error.status != "too_long" or len(joined) > 0.9 * len(text):
                raise DocumentError(
                    f"the outputs of its {len(parts)} parts do not fit the context either", "too_long"
                ) from None
            merged = await self._map_reduce(document_id, joined, work, merging=True)
        else:
            merged = await self._run(whole_request(document_id), prompt, work)
        cut = merged.status == "ok" and any(result.is_cut for result in results)
        return replace(merged, finish_reason="length") if cut else merged

    async def _prompt(self, work: Work, text: str, *, truncate: bool = False, merging: bool = False) -> Prompt:
        def build() -> Prompt:
            return self._builder.build(text, self._limit, truncate=truncate, merging=merging)

        prompt, seconds = await self._in_reader(work, build)
        work.fields.tokenize_seconds += seconds
        return prompt

    async def _run(self, request_id: str, prompt: Prompt, work: Work) -> Outcome:
        config = self._config
        request = Request(
            request_id, cast(Sequence[int], prompt.ids), config.max_new_tokens, config.sampling, self._tokens.eos_ids,
            work.chunk_tokens, self._grammar,
        )  # fmt: skip
        work.requests.append(request_id)
        completion = await asyncio.wrap_future(self._loop.submit(request))
        work.requests.remove(request_id)
        work.completions.append(completion)
        work.fields.queue_seconds += completion.queue_seconds
        if completion.status != "ok":
            return Outcome(status=completion.status, error=one_line(completion.error))
        begin = time.perf_counter()
        answer = self._tokens.answer(list(completion.token_ids), self._builder.opens_thinking)
        work.fields.tokenize_seconds += time.perf_counter() - begin
        if answer.text is None:
            return Outcome(status="error", error=_no_answer(completion, config), reasoning=answer.reasoning)
        outcome = Outcome(
            status="ok", output=answer.text, finish_reason=completion.finish_reason, reasoning=answer.reasoning
        )
        return outcome if self._schema is None else _answered(outcome, self._schema, config.max_new_tokens)

    async def _review(self, text: str, outcome: Outcome, work: Work) -> Outcome:
        """An outcome that is ok with what its document's text tells of the output."""
        output = outcome.output
        if outcome.status != "ok" or output is None:
            return outcome

        def review() -> Outcome:
            flags = tuple(find_flags(text, output, outcome.finish_reason))
            passages = tuple(find_evidence(text, output, work.unread)) if self._config.evidence else None
            return replace(outcome, flags=flags, evidence=passages)

        reviewed, seconds = await self._in_reader(work, review)
        work.fields.tokenize_seconds += seconds
        return reviewed

    async def _in_reader(
        self, work: Work, call: Callable[..., T], *args: Any, converts: bool = False
    ) -> tuple[T, float]:
        """Run something in the reader thread; its result and seconds. The wait before counts as queueing.

        converts: it waits for another process, in a thread that is there for that.
        """
        asked = time.perf_counter()

        def timed() -> tuple[T, float, float]:
            begin = time.perf_counter()
            try:
                result = call(*args)
            finally:
                if not converts:
                    self._busy_read += time.perf_counter() - begin
            return result, begin, time.perf_counter()

        executor = self._converting if converts else self._reader
        result, begin, end = await asyncio.get_running_loop().run_in_executor(executor, timed)
        work.fields.queue_seconds += begin - asked
        return result, end - begin

    async def _let_go(self, requests: list[str]) -> None:
        """Take a document's requests out of the engine. Raises EngineBrokenError if reader or engine do not answer."""
        waits = [asyncio.wrap_future(self._loop.abort(requests))]
        waits.append(asyncio.get_running_loop().run_in_executor(self._reader, lambda: None))
        _, pending = await asyncio.wait(waits, timeout=self._config.grace)
        if pending:
            raise EngineBrokenError(
                f"the worker hangs: no answer for {self._config.grace:g} s after a document was given up", hung=True
            )


def part_request(document_id: str, parts: int, index: int) -> str:
    """The request id of a part of a document that comes to `parts` parts."""
    return f"{document_id}#{parts}.{index}"


def whole_request(document_id: str) -> str:
    """The request id of a whole document: its own id, and never what a part of another one is called."""
    return f"{document_id}#" if re.search(r"#\d+\.\d+#*$", document_id) else document_id


def _answered(outcome: Outcome, schema: Schema, max_new_tokens: int) -> Outcome:
    """An outcome with the answer that its output is by the schema; an error if it is none.

    An output that was cut is none, even if what there is of it happens to be valid: 12 of 1250, say. (What is complete
    ends with "stop", however many tokens it may have.)
    """
    answer = schema.parse(outcome.output or "")
    why = answer.reason if isinstance(answer, AnswerError) else ""
    if outcome.is_cut:
        more = "give a larger one, or the schema limits (maxLength, maxItems)"
        why = f"is cut off by --max-new-tokens {max_new_tokens}; {more}"
    if not why:
        return replace(outcome, answer=answer)
    return replace(outcome, status="error", error=f"the answer {why}", finish_reason=None, answer_error=why)


def _no_answer(completion: Completion, config: WorkerConfig) -> str:
    """Why a document has thinking and no answer, and what to do about it."""
    off = "--thinking off did not keep it from thinking"
    if config.thinking != "off":
        off = "--thinking off helps if the model's chat template can switch it"
    if completion.finish_reason == "length":
        cut = f"--max-new-tokens {config.max_new_tokens} cut the model off inside its thinking, before its answer"
        return f"{cut}; give a larger one ({off})"
    return f"the model stopped by itself inside its thinking, before its answer; {off}"


def _load_tokens(config: EngineConfig) -> tuple[Any, Tokens]:
    """The transformers config, its context as the model has it, and the tokenizer. Raises JobError."""
    from pipeline.engine.model.loading import load_config  # here: the driver needs this file without torch

    own = load_config(replace(config, rope_scaling=None))
    return own, load_tokens(config.model, config.revision, config.trust_remote_code)


def _import_engine(config: WorkerConfig) -> None:
    """Import what a worker needs and its driver does not: torch, transformers, the engine."""
    from pipeline.engine.model import loading  # noqa: F401

    module, _, name = config.engine_factory.partition(":")
    getattr(importlib.import_module(module), name)


def _start_seconds(laps: Laps, about: Mapping[str, Any]) -> dict[str, float]:
    """The parts of the start, in their order: the engine's own where it tells of them."""
    parts = {name: round(seconds, 3) for name, seconds in laps.seconds.items()}
    inside = about.get("start_seconds") or {}
    if inside:
        whole = parts.pop("engine")
        parts |= {**inside, "other": round(max(0.0, whole - sum(inside.values())), 3)}
    return parts


def _build_engine(config: WorkerConfig) -> EngineLike:
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    module, _, name = config.engine_factory.partition(":")
    return getattr(importlib.import_module(module), name)(config.engine)
