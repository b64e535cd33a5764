"""One engine in a process of its own: takes documents, gives back rows."""

from __future__ import annotations

import asyncio
import importlib
import os
import socket
import time
from collections.abc import Mapping
from threading import Thread
from typing import Any

from pipeline.engine.config import SoFar
from pipeline.engine.laps import Laps
from pipeline.imports import check_kernels, collecting_later
from pipeline.results.columns import utc_now
from pipeline.results.kept_columns import Kept
from pipeline.results.rows import EngineFields, Outcome, Row, WorkerFields
from pipeline.source import Document, DocumentReader, input_hash
from pipeline.workers.asking import Asking
from pipeline.workers.gpu import warm_up
from pipeline.workers.job_questions import JobQuestions
from pipeline.workers.loop import EngineBrokenError, EngineLike, EngineLoop
from pipeline.workers.metrics import report_arena
from pipeline.workers.threads import ReadingThreads
from pipeline.workers.work import Work, WorkerConfig, document_of

# A document that ran out of memory is tried once more, alone and in prefill chunks smaller by this factor.
CAREFUL = 4


class Worker:
    """Reads, tokenises and completes documents, several at a time. Runs as a Ray actor by its coroutines.

    The engine has a thread, reading and tokenising have another, so that the next prompts are ready when it asks.
    """

    def __init__(self, config: WorkerConfig) -> None:
        check_kernels()
        self._config = config
        self._name = f"{socket.gethostname()}/{os.getpid()}"
        self._gpu = ""
        self._precision = ""
        self._threads = ReadingThreads()
        self._documents = DocumentReader(
            config.text_column, list(config.kept), config.reading, tuple(config.questions.columns)
        )
        self._first = self._last = 0.0  # when the first document came and the last row went
        self._works: dict[str, Work] = {}  # by document id

    async def load(self) -> dict[str, Any]:
        """Load tokenizer and engine. Returns the engine's description, and the seconds of the parts of the start.

        Raises what loading raises.
        """
        config = self._config
        laps = Laps()
        if config.engine.device.startswith("cuda"):
            Thread(target=warm_up, name="warm-up", daemon=True).start()
        with collecting_later():
            await self._threads.run(_import_engine)
            laps.end("imports")
            # Before the engine: what is wrong there shows in a second. Not beside it: transformers' lazy imports
            # are not safe in two threads at once.
            self._questions = await self._threads.run(JobQuestions, config)
            laps.end("tokenizer")
        self._loop = EngineLoop(lambda: _build_engine(config))
        engine = await asyncio.wrap_future(self._loop.ready)
        laps.end("engine")
        self._questions.fit(engine.max_context)
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
        return {
            "engine_seconds": self._loop.busy_seconds,
            "reader_seconds": self._threads.busy_seconds,
            "span_seconds": span,
        }

    def read_with(self, reader: DocumentReader) -> None:
        """Read documents with another reader from now on."""
        self._documents = reader

    def close(self, wait: float) -> None:
        """Let the engine end after its current step; waits up to `wait` seconds until its memory is free.

        An actor needs none of this: it ends with its process.
        """
        self._threads.close()
        if hasattr(self, "_loop"):
            self._loop.close(wait)

    async def reading(self) -> dict[str, SoFar]:
        """How far it is with the documents that it holds, by document_id."""
        requests = await asyncio.wrap_future(self._loop.so_far())
        done = {name: work.so_far._replace(size_bytes=work.document.size_bytes) for name, work in self._works.items()}
        for request, so_far in requests.items():
            name = document_of(request)
            if name in done:
                done[name] = done[name].and_(so_far)
        return done

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
                work.text, kept = await self._read(work)
                await self._threads.run_for(work, self._questions.take, work, kept)
                await Asking(work, config, self._questions, self._threads, self._loop).answer()
        except EngineBrokenError:
            raise
        except Exception as error:
            if limit.expired():
                failure = Outcome(status="timeout", error=f"not done after {config.deadline:g} s in the worker")
            else:
                failure = self._questions.failure(error)
        if limit.expired():
            await self._let_go(work.requests)
        elif work.requests:  # other parts of a document of which one failed
            self._loop.abort(work.requests)
        self._last = time.perf_counter()
        del self._works[document.document_id]
        return self._rows(work, kept, failure)

    def _rows(self, work: Work, kept: Kept, failure: Outcome | None) -> list[Row]:
        """A row for each question. failure: of those that have no outcome."""
        texts = dict(self._questions.asked(work.document))
        work.asks = work.asks or [self._questions.unread(work, name) for name in texts]
        once = work.asks[0].fields  # what was spent once for all questions
        for name in ("queue_seconds", "load_seconds", "tokenize_seconds"):
            setattr(once, name, getattr(once, name) + getattr(work.fields, name))
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

    async def _read(self, work: Work) -> tuple[str, Kept]:
        def read() -> tuple[str, Kept]:
            text, kept = self._documents.read(work.document)
            work.fields.input_hash = input_hash(text, kept)
            return text, kept

        converts = self._documents.converts(work.document)
        (text, kept), seconds = await self._threads.run_for(work, read, converts=converts)
        work.fields.load_seconds += seconds
        work.fields.kept_error = kept.problem or None
        work.fields.page_starts, work.fields.input_note = kept.page_starts, kept.note or None
        return text, kept

    async def _let_go(self, requests: list[str]) -> None:
        """Take a document's requests out of the engine. Raises EngineBrokenError if reader or engine do not answer."""
        waits = [asyncio.wrap_future(self._loop.abort(requests)), asyncio.wrap_future(self._threads.idle())]
        _, pending = await asyncio.wait(waits, timeout=self._config.grace)
        if pending:
            raise EngineBrokenError(
                f"the worker hangs: no answer for {self._config.grace:g} s after a document was given up", hung=True
            )


def _import_engine() -> None:
    """Import what a worker needs and its driver does not: torch, the engine, and what transformers' models are made of,
    which else the first of them would import.
    """
    from transformers import PreTrainedModel  # noqa: F401

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
