"""Documents in, a table out, in this process: for notebooks and scripts. The job on Ray is pipeline.run_job."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.answers.schema import answer_type
from pipeline.errors import JobError
from pipeline.imports import check_kernels
from pipeline.inputs import Inputs, TextReader, Texts, list_inputs
from pipeline.job.configs import make_worker_config
from pipeline.job.progress import Progress
from pipeline.results.rows import Row, failed_rows, result_schema, to_table
from pipeline.settings.config import JobConfig, from_mapping
from pipeline.settings.questions import answers_of, questions_of
from pipeline.source import Document
from pipeline.workers.inprocess import LocalPool
from pipeline.workers.scheduler import Limits, Scheduler, hang_after

# Settings of a run on Ray that mean something in one process too.
RUN_SETTINGS = ("deadline", "max_attempts", "gpus_per_worker")


def summarize(
    documents: Texts | None = None,
    *,
    model: str | Path,
    input: str | Path | Sequence[str | Path] = (),
    progress: bool = False,
    **settings: Any,
) -> pa.Table:
    """Summarise, or question, documents in this process; a table of a row for each document and question, in order.

    summarize(["a text", "another"], model="Qwen/Qwen3-8B", question="What went wrong?").to_pandas()
    summarize(["a text", "another"], model="Qwen/Qwen3-8B", questions={"risk": "What can go wrong?", "who": "Who?"})

    documents: texts, {id: text}, or pathlib.Paths of files and folders. A string is a text, never a path.
    model: folder or hub id of a transformers model. input: files, folders, globs or URIs, as for the job.
    progress: tell on standard error how far it is. settings: those of the job (pipeline.settings.config.JobConfig).

    The table is like that of read_results: the columns of pipeline.results.rows, for to_pandas(), DuckDB, or
    pyarrow.parquet.write_table. A document that fails does not raise, its row says why. Raises JobError for settings,
    models and inputs that cannot be used. Loads the model each time; Summarizer keeps it.
    """
    with Summarizer(model=model, **settings) as summarizer:
        return summarizer(documents, input=input, progress=progress)


class Summarizer:
    """A model that summarises documents in this process, loaded once for many calls.

    with Summarizer(model="Qwen/Qwen3-8B") as summarizer:
        table = summarizer(["a text", "another"])

    It schedules as the job does: longest documents first, what breaks the engine alone in a new one, a row for each.
    Only a document that ends the whole process (a fault in native code) takes the caller along; the job survives that.
    settings: as for summarize(). engine_factory, grace: for tests. Raises JobError for settings that cannot be.
    """

    def __init__(
        self, *, model: str | Path, engine_factory: str = "", grace: float | None = None, **settings: Any
    ) -> None:
        check_kernels()
        self._config = _config(model, settings)
        self._questions = questions_of(self._config)
        # Every document can be in the engine at once, and Ray is not there to divide the cores.
        self._worker_config = make_worker_config(
            self._config, self._questions, self._config.today(), self._config.device, threads=0,
            engine_factory=engine_factory, grace=grace,
        )  # fmt: skip
        self._answer_type = answer_type(answers_of(self._config, self._questions).values())
        self._lock = threading.Lock()
        self._pool = LocalPool(self._worker_config)

    def columns(self, kept: Sequence[pa.Field] = ()) -> pa.Schema:
        """Of the tables that it gives back. kept: columns of the input that go along."""
        return result_schema(kept, self._answer_type)

    def load(self) -> dict[str, Any]:
        """Load the model now and not at the first call; what its engine says of itself. Raises JobError if it fails."""
        return dict(self._pool.load()["engine"])

    def __call__(
        self,
        documents: Texts | None = None,
        *,
        input: str | Path | Sequence[str | Path] = (),
        progress: bool = False,
    ) -> pa.Table:
        """The documents' rows, as summarize() says."""
        inputs = (input,) if isinstance(input, str | Path) else tuple(input)
        return self.run(
            list_inputs(documents, tuple(map(str, inputs)), self._config, self._questions.columns), progress
        )

    def run(self, inputs: Inputs, progress: bool = False) -> pa.Table:
        """The rows of documents with different ids, in their order, and in that of the questions."""
        schema = self.columns(inputs.kept)
        rows: dict[str, list[Row]] = {}
        todo = []
        documents = [replace(document, questions=self._questions.asked) for document in inputs.documents]
        for document in documents:
            if document.error:
                rows[document.document_id] = failed_rows(document, "error", document.error)
            else:
                todo.append(document)
        size, most = sum(each.size_bytes for each in todo), self._questions.most_tokens(self._config.max_new_tokens)
        told = Progress(len(todo), size, most=most) if progress else None

        def done(found: list[Row], document: Document) -> None:
            rows[document.document_id] = found
            if told:
                told.add(found, document.size_bytes)

        with self._lock:
            if todo:
                self._pool.load()
                columns = tuple(self._questions.columns)
                self._pool.read_with(TextReader(self._config.text_column, inputs.kept, self._config, columns))
                problem = self._schedule(todo, done, told)
        for document in todo:
            if document.document_id not in rows:
                rows[document.document_id] = failed_rows(document, "error", problem)
        if told:
            told.finish()
        return to_table([row for document in documents for row in rows[document.document_id]], schema)

    @property
    def prompt_columns(self) -> dict[str, str]:
        """Columns of the input that prompts are made from, each with the flag that asks for it."""
        return self._questions.columns

    def _schedule(self, todo: list[Document], done: Any, told: Progress | None) -> str:
        """Run documents; why there are some without a row, if there are."""
        todo = sorted(todo, key=lambda document: -document.size_bytes)
        bound = hang_after(self._config.deadline, self._worker_config.grace)
        limits = Limits(1, max_attempts=self._config.max_attempts, start_tries=1, hang_after=bound)
        if told:
            told.start_clock()

        def tick() -> None:
            if told:
                told.workers(scheduler.live, scheduler.starting, scheduler.in_flight)
                told.tick()

        log = told.message if told else lambda message: None
        try:
            scheduler = Scheduler(self._pool, iter(todo), len(todo), limits, done, tick=tick, log=log)
            scheduler.run()
        except JobError as error:  # the engine broke, and could not be built again
            return str(error)
        except BaseException:  # an interrupted cell: nothing may go on behind it
            self._pool.drop()
            raise
        return ""

    def close(self) -> None:
        """Give the model's memory back."""
        self._pool.close()

    def __enter__(self) -> Summarizer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _config(model: str | Path, settings: dict[str, Any]) -> JobConfig:
    """The job's settings with those that have no meaning here refused."""
    settings = from_mapping(settings, "summarize()")
    for item in fields(JobConfig):
        elsewhere = item.metadata["group"] == "run" and item.name not in RUN_SETTINGS
        if item.name in settings and (elsewhere or item.name in ("output", "shard")):
            raise JobError(
                f"summarize(): {item.name} is a setting of the job; here rows are given back, nothing is written: "
                "use pipeline.run_job(input=..., output=..., model=...) for a job with Parquet files"
            )
    return JobConfig(**settings, model=str(model), input=("memory",), output="memory")
