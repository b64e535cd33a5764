"""A document's questions put to the engine: in parts where it is too long, read once for prompts that begin alike."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

from pipeline.engine.config import Completion, Request, SharedPrompt, SoFar
from pipeline.errors import DocumentError
from pipeline.prompts.prompt import Prompt
from pipeline.prompts.stops import StopStrings
from pipeline.results.rows import Outcome
from pipeline.review.evidence import Passage, find_evidence
from pipeline.review.flags import find_flags
from pipeline.workers.job_questions import JobQuestions
from pipeline.workers.loop import EngineLoop
from pipeline.workers.threads import ReadingThreads
from pipeline.workers.work import Ask, Place, Work, WorkerConfig, request_id

T = TypeVar("T")


class Asking:
    """The outcomes of one document's questions."""

    def __init__(
        self, work: Work, config: WorkerConfig, questions: JobQuestions, threads: ReadingThreads, loop: EngineLoop
    ) -> None:
        self._work, self._config, self._questions = work, config, questions
        self._threads, self._loop = threads, loop

    async def answer(self) -> None:
        """Find the outcomes of those that have none yet. Raises EngineBrokenError."""
        asks = [ask for ask in self._work.asks if ask.outcome is None]
        for ask, outcome in zip(asks, await self._outcomes(self._work.text, asks, Place()), strict=True):
            if ask.outcome is None:
                ask.outcome = outcome
                ask.outcome = await self._review(ask, outcome)

    async def _outcomes(self, text: str, asks: list[Ask], place: Place) -> list[Outcome]:
        """What becomes of questions to a text, a document or a part of it, in their order. Raises EngineBrokenError."""
        policy = self._config.too_long
        built = await self._prompts(text, asks, place)
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
                    found[number] = self._questions.failure(error)
        runs = []
        for numbers in groups.values():
            prompts = [cast(Prompt, built[number]) for number in numbers]
            runs.append((numbers, self._run([asks[number] for number in numbers], prompts, place)))
        if in_parts:
            runs.append((in_parts, self._map_reduce(text, [asks[number] for number in in_parts], place)))
        return await _in_order(runs, found)

    async def _map_reduce(self, text: str, asks: list[Ask], place: Place) -> list[Outcome]:
        """Answer questions about parts that fit, then merge each one's answers; where those do not fit either, in parts
        again."""
        splits = await self._splits(text, asks, place)
        groups: dict[tuple[str, ...], list[int]] = {}  # questions to the same parts
        found: dict[int, Outcome] = {}
        for number, split in enumerate(splits):
            if isinstance(split, BaseException):
                found[number] = self._questions.failure(split)
            else:
                groups.setdefault(tuple(split), []).append(number)
        runs = [
            (numbers, self._of_parts(parts, [asks[n] for n in numbers], place)) for parts, numbers in groups.items()
        ]
        return await _in_order(runs, found)

    async def _of_parts(self, parts: Sequence[str], asks: list[Ask], place: Place) -> list[Outcome]:
        """Outcomes of questions to parts of a text, merged."""
        for ask in asks:
            before = ask.fields.parts
            ask.fields.parts = before - 1 + len(parts) if before > 1 else len(parts)
        each = await _together(
            self._outcomes(part, asks, replace(place, parts=asks[0].fields.parts, index=number))
            for number, part in enumerate(parts)
        )
        by_ask = list(zip(*each, strict=True))
        size = sum(map(len, parts))
        return await _together(
            self._merged(list(results), ask, size) for results, ask in zip(by_ask, asks, strict=True)
        )

    async def _merged(self, results: list[Outcome], ask: Ask, size: int) -> Outcome:
        """The answer made of those to the parts of a text of `size` characters."""
        for index, result in enumerate(results):
            if result.status != "ok":
                return replace(result, output=None, error=f"part {index + 1} of {len(results)}: {result.error}")
        joined = "\n\n".join(result.output or "" for result in results)
        if not joined.strip():
            return Outcome(status="error", error=f"none of its {len(results)} parts gave any output to merge")
        above = Place(made_from=size)
        (merged,) = await self._outcomes(joined, [ask], above)
        if merged.status == "too_long" and not above.may_split(len(joined)):
            what = f"the outputs of its {len(results)} parts do not fit the context either"
            return Outcome(status="too_long", error=what)
        cut = merged.status == "ok" and any(result.is_cut for result in results)
        return replace(merged, finish_reason="length") if cut else merged

    async def _prompts(self, text: str, asks: list[Ask], place: Place) -> list[Prompt | Exception]:
        """The prompts of questions to one text, or why there is none."""
        encoded: dict[tuple[str, str], Any] = {}
        truncate = self._config.too_long == "truncate"

        def build(ask: Ask) -> Prompt:
            return ask.builder.build(
                text, self._questions.limit(ask.task), truncate=truncate, encoded=encoded, **self._how(place)
            )

        built = await self._each(asks, build)
        for ask, prompt in zip(asks, built, strict=True):
            if isinstance(prompt, Prompt):
                ask.fields.truncated_tokens += prompt.truncated_tokens
                ask.unread = ask.unread or prompt.unread
        return built

    async def _splits(self, text: str, asks: list[Ask], place: Place) -> list[list[str] | Exception]:
        """The parts of a text for each question, or why there are none."""
        known: dict[Any, list[str]] = {}

        def split(ask: Ask) -> list[str]:
            limit = self._questions.limit(ask.task)
            room = ask.builder.room(limit, **self._how(place))
            if room not in known:
                known[room] = ask.builder.split(text, limit, **self._how(place))
            return known[room]

        return await self._each(asks, split)

    def _how(self, place: Place) -> dict[str, Any]:
        """Arguments of a prompt builder that are the same for all questions to a text."""
        return {"merging": place.merges, "columns": self._work.columns, "step": self._questions.step}

    async def _each(self, asks: list[Ask], call: Callable[[Ask], T]) -> list[T | Exception]:
        """What `call` gives for each question, in the reader thread, or what it raises."""

        def calls() -> list[T | Exception]:
            found: list[T | Exception] = []
            for ask in asks:
                try:
                    found.append(call(ask))
                except Exception as error:  # a tokenizer or template that raises costs this question alone
                    found.append(error)
            return found

        found, seconds = await self._threads.run_for(self._work, calls)
        self._work.fields.tokenize_seconds += seconds
        return found

    async def _run(self, asks: list[Ask], prompts: list[Prompt], place: Place) -> list[Outcome]:
        """Outcomes of prompts that begin alike."""
        requests, questions = [], self._questions
        eos_ids = questions.tokens.eos_ids
        for ask, prompt in zip(asks, prompts, strict=True):
            sampling = replace(self._config.sampling, **ask.task.sampling)
            name = request_id(self._work.document.document_id, ask.task.name, place.name)
            answers = questions.answers_of(ask.task)
            stop = self._config.stop
            until = StopStrings(stop, questions.tokens, ask.builder.opens_thinking) if stop else None
            requests.append(
                Request(
                    name, cast(Sequence[int], prompt.tail), questions.most(ask.task), sampling, eos_ids,
                    self._work.chunk_tokens, None if answers is None else answers.grammar, until,
                )
            )  # fmt: skip
        self._work.requests += [request.request_id for request in requests]
        futures = self._loop.submit(SharedPrompt(prompts[0].prefix, tuple(requests)))
        waits = (
            self._ended(ask, request, asyncio.wrap_future(future), place)
            for ask, request, future in zip(asks, requests, futures, strict=True)
        )
        outcomes = await _together(waits)
        self._work.so_far = self._work.so_far.and_(SoFar(len(prompts[0].prefix), 0))
        return outcomes

    async def _ended(self, ask: Ask, request: Request, ending: Awaitable[Completion], place: Place) -> Outcome:
        """The outcome of a request."""
        completion = await ending
        self._work.requests.remove(request.request_id)
        ended = len(request.prompt_ids), len(completion.token_ids)
        self._work.so_far = self._work.so_far.and_(SoFar(*ended, completion.prefill_seconds, completion.decode_seconds))
        ask.completions.append(completion)
        ask.fields.queue_seconds += completion.queue_seconds
        begin = time.perf_counter()
        outcome = self._questions.outcome(ask, request, completion)
        ask.fields.tokenize_seconds += time.perf_counter() - begin
        ask.fields.total_seconds = time.perf_counter() - self._work.begun
        if place.is_document:
            ask.outcome = outcome  # it stands, though its review or others be late
            ask.outcome = outcome = await self._review(ask, outcome)
        return outcome

    async def _review(self, ask: Ask, outcome: Outcome) -> Outcome:
        """An outcome that is ok with what its document's text tells of the output."""
        output = outcome.output
        if outcome.status != "ok" or output is None:
            return outcome

        def review() -> Outcome:
            flags: tuple[str, ...] | None = None
            passages: tuple[Passage, ...] | None = None
            with contextlib.suppress(Exception):  # the output stands, whatever comes of its review
                flags = tuple(find_flags(self._work.text, output, outcome.finish_reason))
            with contextlib.suppress(Exception):
                passages = tuple(find_evidence(self._work.text, output, ask.unread)) if self._config.evidence else None
            return replace(outcome, flags=flags, evidence=passages)

        reviewed, seconds = await self._threads.run_for(self._work, review)
        ask.fields.tokenize_seconds += seconds
        ask.fields.total_seconds = time.perf_counter() - self._work.begun
        return reviewed


async def _in_order(
    runs: Sequence[tuple[list[int], Coroutine[Any, Any, list[Outcome]]]], found: dict[int, Outcome]
) -> list[Outcome]:
    """Outcomes by their numbers: those that are `found` already, and those of runs, each of the numbers beside it."""
    for (numbers, _), outcomes in zip(runs, await _together(run for _, run in runs), strict=True):
        found |= zip(numbers, outcomes, strict=True)
    return [found[number] for number in sorted(found)]


async def _together(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What coroutines return that run side by side; if one raises, the others end."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
