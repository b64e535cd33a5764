"""The engine as a stage of a Ray Data pipeline.

The job (pipeline.run_job) reads documents where they lie, replaces workers that die and resumes; take this stage where
documents come out of a dataset and rows go on into one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.api import Summarizer
from pipeline.errors import JobError
from pipeline.inputs import Inputs, TextDocument, text_document
from pipeline.results.kept_columns import Kept
from pipeline.results.rows import NAMES, result_schema
from pipeline.settings.options import short
from pipeline.source import input_hash

ID_COLUMNS = ("id", "document_id")


class StemlineStage:
    """A class for map_batches: rows with a text in, one result row for each row and question out.

    dataset.map_batches(
        StemlineStage,
        fn_constructor_kwargs={"model": "Qwen/Qwen3-8B", "question": "What went wrong?"},
        batch_size=32,   # all of a batch is in the engine together: some times max_live
        num_gpus=1,      # for each actor
        compute=ray.data.ActorPoolStrategy(size=4),  # actors, a model in each
    )

    text_column: holds the documents. id_column: their ids; unset: `id` or `document_id` if there is one, else a hash of
    the text. keep_columns: columns of the input to carry along. columns: result columns to give out; unset: all of
    pipeline.results.rows. settings: those of the job (pipeline.settings.config.JobConfig), as for pipeline.summarize.

    A row that cannot be processed comes out with its status and error; nothing raises on account of a document. Raises
    JobError, which ends the dataset's execution, for settings, models and column names that cannot be.
    """

    def __init__(
        self,
        *,
        model: str | Path,
        text_column: str = "text",
        id_column: str | None = None,
        keep_columns: Sequence[str] = (),
        columns: Sequence[str] | None = None,
        engine_factory: str = "",
        **settings: Any,
    ) -> None:
        self._text_column, self._id_column = text_column, id_column
        self._kept = list(keep_columns)
        self._columns = list(NAMES if columns is None else columns)
        for name in self._columns:
            if name not in NAMES:
                raise JobError(f"columns: {short(name)} is not a result column; they are {', '.join(NAMES)}")
        result_schema([pa.field(name, pa.null()) for name in self._kept])  # no two of one name
        self._summarizer = Summarizer(model=model, engine_factory=engine_factory, **settings)
        self._summarizer.load()

    def __call__(self, batch: Any) -> pa.Table:
        """The result rows of a batch, in its order. batch: in any of map_batches' formats."""
        names = list(batch.column_names if isinstance(batch, pa.Table) else batch)
        asked = self._summarizer.prompt_columns
        for name in [self._text_column, *([self._id_column] if self._id_column else []), *self._kept, *asked]:
            if name not in names:
                raise JobError(f"the dataset has no column {name!r}; it has {', '.join(map(str, names))}")
        table, places = self._results(self._documents(batch, names))
        results = table.select(self._columns)
        for name in self._kept:
            values = _column(batch, name)
            results = results.append_column(name, values.take(pa.array(places, pa.int64())))
        return results

    def close(self) -> None:
        """Give the model's memory back; in an actor its end does."""
        self._summarizer.close()

    def _documents(self, batch: Any, names: list[str]) -> list[TextDocument]:
        texts = _values(batch, self._text_column)
        id_column = self._id_column or next((name for name in ID_COLUMNS if name in names), None)
        ids = _values(batch, id_column) if id_column else map(_text_id, texts)
        asked = list(self._summarizer.prompt_columns)
        columns = zip(*(_values(batch, name) for name in asked), strict=True) if asked else [()] * len(texts)
        return [
            text_document(str(name), text, "ray.data", dict(zip(asked, values, strict=True)))
            for name, text, values in zip(ids, texts, columns, strict=True)
        ]

    def _results(self, documents: Sequence[TextDocument]) -> tuple[pa.Table, list[int]]:
        """Rows in the documents' order, and of which document each is.

        The engine knows documents by their ids: those of one id go one by one.
        """
        rounds: list[dict[str, int]] = []
        for place, document in enumerate(documents):
            here = next((r for r in rounds if document.document_id not in r), None)
            if here is None:
                rounds.append(here := {})
            here[document.document_id] = place
        tables = [self._summarizer.run(Inputs([documents[place] for place in r.values()])) for r in rounds]
        table = pa.concat_tables(tables) if tables else self._summarizer.columns().empty_table()
        names = (name for part in tables for name in part["document_id"].to_pylist())
        owner = (at for r, part in zip(rounds, tables, strict=True) for at in [r] * len(part))
        places = [r[name] for r, name in zip(owner, names, strict=True)]
        order = sorted(range(len(places)), key=places.__getitem__)
        return table.take(pa.array(order, pa.int64())), [places[number] for number in order]


def _text_id(text: Any) -> str:
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    return input_hash(text.encode(errors="replace").decode() if isinstance(text, str) else repr(text), Kept())


def _values(batch: Any, name: str) -> list[Any]:
    """A column as Python values; those of a dict of arrays and of pandas as they are."""
    return batch[name].to_pylist() if isinstance(batch, pa.Table) else [_plain(value) for value in batch[name]]


def _plain(value: Any) -> Any:
    """A value of numpy as Python has it."""
    return value.tolist() if hasattr(value, "tolist") else value


def _column(batch: Any, name: str) -> Any:
    if isinstance(batch, pa.Table):
        return batch[name]
    values = batch[name]
    return pa.array(values.tolist() if hasattr(values, "tolist") else list(values))
