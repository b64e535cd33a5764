"""One engine in a process of its own: takes documents, gives back rows."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import date
from threading import Thread
from typing import Any, TypeVar, cast

import pyarrow as pa

from pipeline.answers.grammar import Grammar
from pipeline.answers.schema import AnswerError, Schema, compile_schema
from pipeline.engine.config import Completion, EngineConfig, Request, Sampling, SharedPrompt
from pipeline.engine.laps import Laps
from pipeline.errors import DocumentError, JobError, one_line
from pipeline.imports import check_kernels
from pipeline.prompts.prompt import Prompt, PromptBuilder, Task
from pipeline.prompts.questions import OWN, Questions
from pipeline.prompts.stops import STOP_STRING, StopStrings, before_stop
from pipeline.prompts.tokens import Tokens, load_tokens
from pipeline.results.columns import utc_now
from pipeline.results.kept_columns import Kept, prompt_text
from pipeline.results.rows import EngineFields, Outcome, Row, WorkerFields
from pipeline.review.evidence import Passage, find_evidence
from pipeline.review.flags import find_flags
from pipeline.settings.shared import ReadSettings
from pipeline.source import Asked, Document, DocumentReader, input_hash
from pipeline.source.processes import TOGETHER
from pipeline.workers.gpu import warm_up
from pipeline.workers.loop import EngineBrokenError, EngineLike, EngineLoop
from pipeline.workers.metrics import report_arena

T = TypeVar("T")
# How long after its deadline a document may still hold the reader or the engine before the worker counts as hung. The
# end of a neighbour's prefill is one step of the engine, tens of seconds for a long prompt in a large model.
GRACE_SECONDS = 60.0
# A document that ran out of memory is tried once more, alone and in prefill chunks smaller by this factor.
CAREFUL = 4
# Documents that are cut, or processed in parts, are cut at whole numbers of so many tokens, or of this share of a small
# context: questions of like length then read the same, each question by itself as well as beside others.
CUT_STEP, CUT_SHARE = 256, 16


@dataclass(frozen=True)
class WorkerConfig:
    """All that a worker needs to know. threads: for torch on a CPU; 0 leaves its default. deadline: seconds; 0 none.

    schemas: by question, JSON text of what its answers are held to. typed_answers: whether their column has the type of
    all of them; otherwise they are JSON text there.
    model_name: what the rows call the model. today: the date for chat templates that print one.
    evidence: whether rows get the passages that support the output.
    engine_factory: "module:name" of a callable EngineConfig -> engine.
    """

    engine: EngineConfig
    questions: Questions
    too_long: str
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    text_column: str
    model_name: str
    config_hash: str
    today: date
    template_args: Mapping[str, Any] | None = None
    thinking: str = "off"
    schemas: Mapping[str, str] = field(default_factory=dict)
    typed_answers: bool = True
    kept: tuple[pa.Field, ...] = ()
    evidence: bool = True
    reading: ReadSettings = ReadSettings()
    deadline: float = 0.0
    grace: float = GRACE_SECONDS
    threads: int = 0
    engine_factory: str = "pipeline.engine:Engine"


@dataclass(frozen=True)
class Place:
    """What a text is of its document. parts, index: of so many parts that one; 0: not a part of it.

    made_from: characters of the text of whose parts' outputs it is made; 0 for what stands in the document.
    """

    parts: int = 0
    index: int = 0
    made_from: int = 0

    @property
    def merges(self) -> bool:
        """Whether outputs of parts are to be merged."""
        return self.made_from > 0

    @property
    def is_document(self) -> bool:
        """Whether it is the document itself."""
        return not self.parts and not self.merges

    def may_split(self, size: int) -> bool:
        """Whether a text of `size` characters is processed in parts if it is too long: if there is an end to that."""
        return not self.parts and (not self.merges or size <= 0.9 * self.made_from)

    @property
    def name(self) -> str:
        """Of its prompts; empty for a whole."""
        return f"{self.parts}.{self.index}" if self.parts else ""


@dataclass(frozen=True)
class Answers:
    """What the answers to a question are held to."""

    schema: Schema
    grammar: Grammar


@dataclass
class Ask:
    """A question to a document that is in the worker: its row's columns as far as they are known.

    completions: of its prompts, in the order in which they came back. outcome: what became of it, once that is known.
    unread: characters [start, end) of the document's text that were cut out to make it fit.
    """

    task: Task
    builder: PromptBuilder
    fields: WorkerFields
    completions: list[Completion] = field(default_factory=list)
    outcome: Outcome | None = None
    unread: tuple[int, int] | None = None


@dataclass
class Work:
    """A document in the worker.

    fields: what its rows have in common, and the seconds that are spent once for all questions. columns: texts of the
    columns in its prompts. text: of the document. requests: ids of those that are in the engine. chunk_tokens: prefill
    steps at most so long; None: as the engine's configuration says. asks: its questions, once it is read.
    tokens: that prompts and outputs can come to which went to the engine; ended: of these, those that it is done with.
    """

    document: Document
    fields: WorkerFields
    begun: float
    text: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    chunk_tokens: int | None = None
    requests: list[str] = field(default_factory=list)
    asks: list[Ask] = field(default_factory=list)
    tokens: int = 0
    ended: int = 0


class Worker:
    """Reads, tokenises and completes documents, several at a time. Runs as a Ray actor: its methods are coroutines.

    The engine has a thread, reading and tokenising have another, so that the next prompts are ready when it asks.
    """

    def __init__(self, config: WorkerConfig) -> None:
        check_kernels()
        self._config = config
        self._name = f"{socket.gethostname()}/{os.getpid()}"
        self._gpu = ""
        self._precision = ""
        self._context = 0
        self._hf_config: Any = None  # with the context that the model was made for
        self._reader = ThreadPoolExecutor(1, "reader")
        self._converting = ThreadPoolExecutor(TOGETHER, "converting")  # these threads wait for other processes
        self._documents = DocumentReader(
            config.text_column, list(config.kept), config.reading, tuple(config.questions.columns)
        )
        self._answers: dict[str, Answers] = {}  # by the question's name
        self._busy_read = 0.0
        self._first = self._last = 0.0  # when the first document came and the last row went
        self._works: dict[str, Work] = {}  # by document id

    async def load(self) -> dict[str, Any]:
        """Load tokenizer and engine. Returns the engine's description, and the seconds of the parts of the start.

        Raises what loading raises.
        """
        config = self._config
        loop = asyncio.get_running_loop()
        laps = Laps()
        if config.engine.device.startswith("cuda"):
            Thread(target=warm_up, name="warm-up", daemon=True).start()
        await loop.run_in_executor(self._reader, _import_engine)
        laps.end("imports")
        # Before the engine: what is wrong there shows in a second. Not beside it: transformers' lazy imports
        # are not safe in two threads at once.
        self._hf_config, self._tokens = await loop.run_in_executor(self._reader, _load_tokens, config.engine)
        tasks = [*config.questions.tasks, *([config.questions.own] if config.questions.own else [])]
        builders = await loop.run_in_executor(self._reader, lambda: [self._builder(task) for task in tasks])
        self._builders = {task.name: builder for task, builder in zip(tasks, builders, strict=True)}
        self._answers = await loop.run_in_executor(self._reader, self._compile_answers)
        laps.end("tokenizer")
        self._loop = EngineLoop(lambda: _build_engine(config))
        engine = await asyncio.wrap_future(self._loop.ready)
        laps.end("engine")
        self._context = engine.max_context
        self._step = max(1, min(CUT_STEP, self._context // CUT_SHARE))
        for task in tasks:
            if self._limit(task) < 1:
                raise JobError(
                    f"--max-new-tokens {self._most(task)} leaves no room for a prompt: "
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

    def close(self, wait: float) -> None:
        """Let the engine end after its current step; waits up to `wait` seconds until its memory is free.

        An actor needs none of this: it ends with its process.
        """
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._converting.shutdown(wait=False, cancel_futures=True)
        if hasattr(self, "_loop"):
            self._loop.close(wait)

    async def reading(self) -> tuple[int, int]:
        """How far it is with the documents that it holds: tokens that are read and written, and their share of all that
        there are, in bytes of those documents.
        """
        works = [work for work in self._works.values() if work.tokens]
        tokens, size = sum(work.tokens for work in works), sum(work.document.size_bytes for work in works)
        done = sum(work.ended for work in works) + await asyncio.wrap_future(self._loop.tokens_read())
        return done, round(size * min(1.0, done / tokens)) if tokens else 0

    async def process(self, document: Document, careful: bool = False) -> list[Row]:
        """The rows of a document, one for each question; whatever is wrong with it is in the rows.

        careful: it ran out of memory before, so its prompt is read in smaller chunks.
        Raises EngineBrokenError if this worker cannot go on; then any of the documents in it may be the cause.
        """
        config = self._config
        work = Work(
            document,
            WorkerFields(
                precision=self._precision, worker=self._name, gpu=self._gpu, model=config.model_name,
                config_hash=config.config_hash, prompt_hash="", started_at=utc_now(),
            ),
            time.perf_counter(),
        )  # fmt: skip
        if careful:
            work.chunk_tokens = max(1, config.engine.chunk_tokens // CAREFUL)
        self._first = self._first or work.begun
        self._works[document.document_id] = work
        kept, failure = Kept(), None
        limit = asyncio.timeout(config.deadline or None)
        try:
            async with limit:
                text, kept = await self._read(work)
                work.text = text
                await self._in_reader(work, self._take_questions, work, kept)
                await self._answer(text, work.asks, work)
        except EngineBrokenError:
            raise
        except Exception as error:
            if limit.expired():
                failure = Outcome(status="timeout", error=f"not done after {config.deadline:g} s in the worker")
            else:
                failure = self._failure(error)
        if limit.expired():
            await self._let_go(work.requests)
        elif work.requests:  # other parts of a document of which one failed
            self._loop.abort(work.requests)
        self._last = time.perf_counter()
        del self._works[document.document_id]
        return self._rows(work, kept, failure)

    def _rows(self, work: Work, kept: Kept, failure: Outcome | None) -> list[Row]:
        """A row for each question. failure: of those that have no outcome."""
        work.asks = work.asks or [self._unread(work, name) for name, _ in self._asked(work.document)]
        once = work.asks[0].fields  # what was spent once for all questions
        for name in ("queue_seconds", "load_seconds", "tokenize_seconds"):
            setattr(once, name, getattr(once, name) + getattr(work.fields, name))
        texts = dict(self._asked(work.document))
        document, rows = work.document, []
        for ask in work.asks:
            for name in ("input_hash", "kept_error", "page_starts", "input_note"):
                setattr(ask.fields, name, getattr(work.fields, name))
            ask.fields.total_seconds = ask.fields.total_seconds or self._last - work.begun
            ask.fields.prompt_hash = ask.task.fingerprint()
            outcome = ask.outcome or failure
            assert outcome is not None, "a question without an outcome ended without a failure"
            rows.append(
                Row(
                    document_id=document.document_id, question_id=ask.task.name,
                    question=texts.get(ask.task.name, ask.task.question),
                    source=document.source, outcome=outcome,
                    from_engine=EngineFields.of_parts(ask.completions) if ask.completions else None,
                    from_worker=ask.fields, input_stamp=document.stamp, finished_at=utc_now(), kept=kept.columns,
                )
            )  # fmt: skip
        return rows

    def _asked(self, document: Document) -> Asked:
        """(name, text) of what is asked of a document, as far as that is known before it is read."""
        return document.questions or self._config.questions.asked

    def _unread(self, work: Work, name: str) -> Ask:
        """A question to a document that could not be read."""
        questions = self._config.questions
        task = next((task for task in questions.tasks if task.name == name), questions.own)
        assert task is not None, f"{name!r} is not a question of this job"
        return self._ask(work, task, self._builders[task.name])

    def _ask(self, work: Work, task: Task, builder: PromptBuilder) -> Ask:
        fresh = replace(work.fields, queue_seconds=0.0, load_seconds=0.0, tokenize_seconds=0.0)
        return Ask(task, builder, fresh)

    def _compile_answers(self) -> dict[str, Answers]:
        """What holds the answers to their schemas; the same for questions with the same one."""
        made: dict[str, Answers] = {}
        for name, text in self._config.schemas.items():
            self._builders[name].check_answers()
            if text not in made:
                schema = compile_schema(text)
                made[text] = Answers(schema, schema.grammar(self._tokens.tokenizer, self._tokens.eos_ids))
        return {name: made[text] for name, text in self._config.schemas.items()}

    def _answers_of(self, task: Task) -> Answers | None:
        return self._answers.get(OWN if task.own else task.name)

    def _builder(self, task: Task) -> PromptBuilder:
        config = self._config
        return PromptBuilder(self._tokens, task, config.template_args, config.today, config.thinking)

    def _take_questions(self, work: Work, kept: Kept) -> None:
        """Note the questions to a document that is read; those of its own end at once if they are none."""
        work.columns = {name: prompt_text(value) for name, value in kept.prompt.items()}
        names = tuple(name for name, _ in self._asked(work.document))
        questions = self._config.questions
        for task in questions.tasks:
            if task.name in names:
                work.asks.append(self._ask(work, task, self._builders[task.name]))
        if OWN in names:
            try:
                own = [(task, self._builder(task)) for task in questions.of_document(kept.prompt)]
                work.asks += [self._ask(work, task, builder) for task, builder in own]
            except DocumentError as error:
                unread = self._unread(work, OWN)
                unread.outcome = Outcome(status="error", error=one_line(error))
                work.asks.append(unread)

    def _failure(self, error: BaseException) -> Outcome:
        """What an exception makes of a question; a tokenizer or template that raises costs this document alone."""
        if isinstance(error, DocumentError):
            hint = self._stretch_hint(error.tokens)
            return Outcome(status=error.status, error=one_line(f"{error}; {hint}" if hint else error))
        return Outcome(status="error", error=one_line(f"{type(error).__name__}: {error}"))

    def _stretch_hint(self, prompt_tokens: int) -> str:
        """What helps a prompt that is too long for the model, and not for the memory or for --max-context."""
        from pipeline.engine.model.loading import context_limit
        from pipeline.engine.model.rope import stretch_hint

        engine = self._config.engine
        own = self._hf_config
        if not prompt_tokens or engine.max_context is not None or own is None:
            return ""
        if self._context < int(context_limit(own) * (engine.rope_scaling or 1)):
            return ""
        return stretch_hint(own, prompt_tokens + self._config.max_new_tokens)

    def _most(self, task: Task) -> int:
        """Most tokens that a question's answer may have."""
        return task.max_new_tokens or self._config.max_new_tokens

    def _limit(self, task: Task) -> int:
        """Most tokens that a question's prompt may have."""
        return self._context - self._most(task)

    async def _read(self, work: Work) -> tuple[str, Kept]:
        def read() -> tuple[str, Kept]:
            text, kept = self._documents.read(work.document)
            work.fields.input_hash = input_hash(text, kept)
            return text, kept

        (text, kept), seconds = await self._in_reader(work, read, converts=self._documents.converts(work.document))
        work.fields.load_seconds += seconds
        work.fields.kept_error = kept.problem or None
        work.fields.page_starts, work.fields.input_note = kept.page_starts, kept.note or None
        return text, kept

    async def _answer(self, text: str, asks: list[Ask], work: Work) -> None:
        """Find the outcomes of questions to a document, which is read once for those whose prompts begin alike."""
        asks = [ask for ask in asks if ask.outcome is None]
        for ask, outcome in zip(asks, await self._outcomes(text, asks, work, Place()), strict=True):
            ask.outcome = ask.outcome or await self._review(ask, outcome, work)

    async def _outcomes(self, text: str, asks: list[Ask], work: Work, place: Place) -> list[Outcome]:
        """What becomes of questions to a text, a document or a part of it, in their order. Raises EngineBrokenError."""
        policy = self._config.too_long
        built = await self._prompts(work, text, asks, place)
        groups: dict[Any, list[int]] = {}  # of those that go together
        for number, prompt in enumerate(built):
            if isinstance(prompt, Prompt):
                groups.setdefault(prompt.prefix.tobytes(), []).append(number)
        found: dict[int, Outcome] = {}
        in_parts = []
        for number, error in enumerate(built):
            if isinstance(error, BaseException):
                is_long = isinstance(error, DocumentError) and error.status == "too_long"
                if is_long and policy == "map-reduce" and place.may_split(len(text)):
                    in_parts.append(number)
                else:
                    found[number] = self._failure(error)
        runs = []
        for numbers in groups.values():
            prompts = [cast(Prompt, built[number]) for number in numbers]
            runs.append((numbers, self._run([asks[number] for number in numbers], prompts, work, place)))
        if in_parts:
            runs.append((in_parts, self._map_reduce(text, [asks[number] for number in in_parts], work, place)))
        for (numbers, _), outcomes in zip(runs, await _together(run for _, run in runs), strict=True):
            found |= zip(numbers, outcomes, strict=True)
        return [found[number] for number in range(len(asks))]

    async def _map_reduce(self, text: str, asks: list[Ask], work: Work, place: Place) -> list[Outcome]:
        """Answer questions about parts that fit, then merge each one's answers; where those do not fit either, in parts
        again."""
        splits = await self._splits(work, text, asks, place)
        groups: dict[tuple[str, ...], list[int]] = {}  # questions to the same parts
        found: dict[int, Outcome] = {}
        for number, split in enumerate(splits):
            if isinstance(split, BaseException):
                found[number] = self._failure(split)
            else:
                groups.setdefault(tuple(split), []).append(number)
        runs = [
            (numbers, self._of_parts(parts, [asks[n] for n in numbers], work, place))
            for parts, numbers in groups.items()
        ]
        for (numbers, _), outcomes in zip(runs, await _together(run for _, run in runs), strict=True):
            found |= zip(numbers, outcomes, strict=True)
        return [found[number] for number in range(len(asks))]

    async def _of_parts(self, parts: Sequence[str], asks: list[Ask], work: Work, place: Place) -> list[Outcome]:
        """Outcomes of questions to parts of a text, merged."""
        for ask in asks:
            before = ask.fields.parts
            ask.fields.parts = before - 1 + len(parts) if before > 1 else len(parts)
        each = await _together(
            self._outcomes(part, asks, work, replace(place, parts=asks[0].fields.parts, index=number))
            for number, part in enumerate(parts)
        )
        by_ask = list(zip(*each, strict=True))
        size = sum(map(len, parts))
        return await _together(
            self._merged(list(results), ask, work, place, size) for results, ask in zip(by_ask, asks, strict=True)
        )

    async def _merged(self, results: list[Outcome], ask: Ask, work: Work, place: Place, size: int) -> Outcome:
        """The answer made of those to the parts of a text of `size` characters."""
        for index, result in enumerate(results):
            if result.status != "ok":
                return replace(result, output=None, error=f"part {index + 1} of {len(results)}: {result.error}")
        joined = "\n\n".join(result.output or "" for result in results)
        if not joined.strip():
            return Outcome(status="error", error=f"none of its {len(results)} parts gave any output to merge")
        above = Place(made_from=size)
        (merged,) = await self._outcomes(joined, [ask], work, above)
        if merged.status == "too_long" and not above.may_split(len(joined)):
            what = f"the outputs of its {len(results)} parts do not fit the context either"
            return Outcome(status="too_long", error=what)
        cut = merged.status == "ok" and any(result.is_cut for result in results)
        return replace(merged, finish_reason="length") if cut else merged

    async def _prompts(self, work: Work, text: str, asks: list[Ask], place: Place) -> list[Prompt | Exception]:
        """The prompts of questions to one text, or why there is none."""
        encoded: dict[tuple[str, str], Any] = {}
        truncate = self._config.too_long == "truncate"

        def build(ask: Ask) -> Prompt:
            return ask.builder.build(
                text, self._limit(ask.task), truncate=truncate, merging=place.merges, columns=work.columns,
                step=self._step, encoded=encoded,
            )  # fmt: skip

        built = await self._each(work, asks, build)
        for ask, prompt in zip(asks, built, strict=True):
            if isinstance(prompt, Prompt):
                ask.fields.truncated_tokens += prompt.truncated_tokens
                ask.unread = ask.unread or prompt.unread
        return built

    async def _splits(self, work: Work, text: str, asks: list[Ask], place: Place) -> list[list[str] | Exception]:
        """The parts of a text for each question, or why there are none."""
        known: dict[Any, list[str]] = {}

        def split(ask: Ask) -> list[str]:
            room = ask.builder.room(self._limit(ask.task), merging=place.merges, columns=work.columns, step=self._step)
            if room not in known:
                known[room] = ask.builder.split(
                    text, self._limit(ask.task), merging=place.merges, columns=work.columns, step=self._step
                )
            return known[room]

        return await self._each(work, asks, split)

    async def _each(self, work: Work, asks: list[Ask], call: Callable[[Ask], T]) -> list[T | Exception]:
        """What `call` gives for each question, in the reader thread, or what it raises."""

        def calls() -> list[T | Exception]:
            found: list[T | Exception] = []
            for ask in asks:
                try:
                    found.append(call(ask))
                except Exception as error:  # a tokenizer or template that raises costs this question alone
                    found.append(error)
            return found

        found, seconds = await self._in_reader(work, calls)
        work.fields.tokenize_seconds += seconds
        return found

    async def _run(self, asks: list[Ask], prompts: list[Prompt], work: Work, place: Place) -> list[Outcome]:
        """Outcomes of prompts that begin alike."""
        config = self._config
        requests = []
        for ask, prompt in zip(asks, prompts, strict=True):
            sampling = replace(config.sampling, **ask.task.sampling)
            name = request_id(work.document.document_id, ask.task.name, place.name)
            answers = self._answers_of(ask.task)
            until = StopStrings(config.stop, self._tokens, ask.builder.opens_thinking) if config.stop else None
            requests.append(
                Request(
                    name, cast(Sequence[int], prompt.tail), self._most(ask.task), sampling, self._tokens.eos_ids,
                    work.chunk_tokens, None if answers is None else answers.grammar, until,
                )
            )  # fmt: skip
        work.requests += [request.request_id for request in requests]
        work.tokens += len(prompts[0].prefix) + sum(map(_tokens_of, requests))
        futures = self._loop.submit(SharedPrompt(prompts[0].prefix, tuple(requests)))
        waits = (
            self._ended(ask, request, asyncio.wrap_future(future), work, place)
            for ask, request, future in zip(asks, requests, futures, strict=True)
        )
        outcomes = await _together(waits)
        work.ended += len(prompts[0].prefix)
        return outcomes

    async def _ended(
        self, ask: Ask, request: Request, ending: Awaitable[Completion], work: Work, place: Place
    ) -> Outcome:
        """The outcome of a request."""
        completion = await ending
        work.requests.remove(request.request_id)
        work.ended += _tokens_of(request)
        ask.completions.append(completion)
        ask.fields.queue_seconds += completion.queue_seconds
        begin = time.perf_counter()
        outcome = self._outcome(ask, request, completion)
        ask.fields.tokenize_seconds += time.perf_counter() - begin
        ask.fields.total_seconds = time.perf_counter() - work.begun
        if place.is_document:
            ask.outcome = outcome = await self._review(ask, outcome, work)  # it stands, though others be late
        return outcome

    def _outcome(self, ask: Ask, request: Request, completion: Completion) -> Outcome:
        if completion.status != "ok":
            return Outcome(status=completion.status, error=one_line(completion.error))
        answer = self._tokens.answer(list(completion.token_ids), ask.builder.opens_thinking)
        if answer.text is None:
            why = _no_answer(completion, request.max_new_tokens, self._config.thinking)
            return Outcome(status="error", error=why, reasoning=answer.reasoning)
        output, reason = answer.text, completion.finish_reason
        stopped = before_stop(output, self._config.stop)
        if stopped is not None:
            output, reason = stopped, STOP_STRING
        outcome = Outcome(status="ok", output=output, finish_reason=reason, reasoning=answer.reasoning)
        answers = self._answers_of(ask.task)
        if answers is None:
            return outcome
        return _answered(outcome, answers.schema, self._config.typed_answers, request.max_new_tokens)

    async def _review(self, ask: Ask, outcome: Outcome, work: Work) -> Outcome:
        """An outcome that is ok with what its document's text tells of the output."""
        output = outcome.output
        if outcome.status != "ok" or output is None:
            return outcome

        def review() -> Outcome:
            flags: tuple[str, ...] | None = None
            passages: tuple[Passage, ...] | None = None
            with contextlib.suppress(Exception):  # the output stands, whatever comes of its review
                flags = tuple(find_flags(work.text, output, outcome.finish_reason))
            with contextlib.suppress(Exception):
                passages = tuple(find_evidence(work.text, output, ask.unread)) if self._config.evidence else None
            return replace(outcome, flags=flags, evidence=passages)

        reviewed, seconds = await self._in_reader(work, review)
        ask.fields.tokenize_seconds += seconds
        ask.fields.total_seconds = time.perf_counter() - work.begun
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


async def _together(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What coroutines return that run side by side; if one raises, the others end."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def request_id(document_id: str, question: str, part: str) -> str:
    """The engine's name of a prompt: one for each document, question and part, whatever ids look like.

    Names of questions have neither # nor /. What is drawn in sampling depends on it, so it does not on other questions.
    """
    return f"{document_id}#{question}" + (f"/{part}" if part else "")


def _tokens_of(request: Request) -> int:
    """Tokens that a request can come to, without its prefix."""
    return len(request.prompt_ids) + request.max_new_tokens


def document_of(name: str) -> str:
    """The document_id in an engine's name of a prompt."""
    return name.rpartition("#")[0]


def _answered(outcome: Outcome, schema: Schema, as_type: bool, max_new_tokens: int) -> Outcome:
    """An outcome with the answer that its output is by the schema; an error if it is none.

    An output that was cut is none, even if what there is of it happens to be valid: 12 of 1250, say. (What is complete
    ends with "stop", however many tokens it may have.)
    """
    answer = schema.parse(outcome.output or "", as_type)
    why = answer.reason if isinstance(answer, AnswerError) else ""
    if outcome.is_cut:
        more = "give a larger one, or the schema limits (maxLength, maxItems)"
        why = f"is cut off by --max-new-tokens {max_new_tokens}; {more}"
    if not why:
        return replace(outcome, answer=answer)
    return replace(outcome, status="error", error=f"the answer {why}", finish_reason=None, answer_error=why)


def _no_answer(completion: Completion, most: int, thinking: str) -> str:
    """Why a document has thinking and no answer, and what to do about it. most: tokens that the answer could have."""
    off = "--thinking off did not keep it from thinking"
    if thinking != "off":
        off = "--thinking off helps if the model's chat template can switch it"
    if completion.finish_reason == "length":
        cut = f"--max-new-tokens {most} cut the model off inside its thinking, before its answer"
        return f"{cut}; give a larger one ({off})"
    return f"the model stopped by itself inside its thinking, before its answer; {off}"


def _load_tokens(config: EngineConfig) -> tuple[Any, Tokens]:
    """The transformers config, its context as the model has it, and the tokenizer. Raises JobError."""
    from pipeline.engine.model.loading import load_config  # here: the driver needs this file without torch

    own = load_config(replace(config, rope_scaling=None))
    return own, load_tokens(config.model, config.revision, config.trust_remote_code)


def _import_engine() -> None:
    """Import what a worker needs and its driver does not: torch, transformers, the engine."""
    from pipeline.engine import engine  # noqa: F401
    from pipeline.engine.model import loading  # noqa: F401


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
