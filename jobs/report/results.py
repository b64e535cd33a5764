"""The results of a job as they lie in its output folder, whatever state it is in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.fs import FileType

from pipeline.errors import JobError, one_line
from pipeline.job import manifest
from pipeline.results.parts import part_names, read_columns
from pipeline.results.rows import COLUMNS
from pipeline.results.store import Store

# The figures need none of these: texts are read when the list of outputs is made.
_UNUSED = (
    "output", "answer", "reasoning", "evidence", "flags", "page_starts", "config_hash", "input_stamp", "input_hash",
)  # fmt: skip
NAMES = tuple(column.name for column in COLUMNS if column.name not in _UNUSED)
# What the list of outputs needs. The last line is of newer runs: where another run lacks these columns, they are null.
TEXTS = (
    "document_id", "source", "status", "error", "output", "finish_reason", "reasoning", "prompt_tokens",
    "output_tokens", "total_seconds", "time_to_first_token", "attention", "density", "truncated_tokens", "parts",
    "attempts", "input_stamp", "input_hash",
    "flags", "evidence", "question_id", "question", "answer", "page_starts",
    "input_note",
)  # fmt: skip
_TYPES = {column.name: column.type for column in COLUMNS}


@dataclass(frozen=True)
class Run:
    """A job's results: one row for each document and question.

    A column that they lack, since an earlier version wrote them, is all null.

    name: short, for charts and columns. location: where they are, without credentials. manifest: what the job wrote
    about itself, None if it wrote nothing that can be read; `problem` says why.
    """

    name: str
    location: str
    manifest: dict[str, Any] | None
    problem: str
    rows: pa.Table
    store: Store

    @cached_property
    def with_texts(self) -> pa.Table:
        """The columns TEXTS of all rows, outputs among them: read from the files when somebody asks."""
        return read_columns(self.store, TEXTS)

    @property
    def documents(self) -> int | None:
        """Documents of the input, None if nobody knows."""
        return self.manifest.get("documents") if self.manifest else None

    @property
    def state(self) -> str:
        """finished, stopped, running (or killed: its rows do not tell), unknown (no manifest) or empty."""
        if self.manifest:
            return str(self.manifest.get("state", "unknown"))
        return "unknown" if len(self.rows) or self.problem else "empty"

    @property
    def asked(self) -> list[str] | None:
        """Names of the questions that each document is to have an answer to; None if nobody knows."""
        return self.manifest.get("asked") if self.manifest else None

    @cached_property
    def questions(self) -> int:
        """How many questions the rows answer; 1 without any."""
        return max(1, len(set(self.texts("question_id"))))

    @cached_property
    def read_tokens(self) -> np.ndarray:
        """float64 [rows], NaN where it is not known: tokens of prompts without those read for another question."""
        return self.numbers("prompt_tokens") - np.nan_to_num(self.numbers("prefix_tokens"))

    def documents_of(self, rows: np.ndarray) -> int:
        """How many documents some rows (bool [rows]) are about."""
        return len(pc.unique(self.rows["document_id"].filter(pa.array(rows))))

    @cached_property
    def ok(self) -> np.ndarray:
        """bool [rows]: those with an output."""
        return pc.equal(self.rows["status"], "ok").to_numpy()

    def numbers(self, name: str) -> np.ndarray:
        """float64 [rows], NaN where there is none; of a time, seconds since 1970."""
        column = self.rows[name]
        if pa.types.is_timestamp(column.type):
            return self._numbers(column.cast(pa.int64())) / 1e6
        return self._numbers(column)

    @staticmethod
    def _numbers(column: pa.ChunkedArray) -> np.ndarray:
        return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)

    @cached_property
    def layers(self) -> np.ndarray:
        """float32 [rows, layers]: density of each layer, NaN where it is not known.

        Of rows of several models, those of the models with another number of layers than most count as not known.
        """
        column = self.rows["density_by_layer"].combine_chunks()
        sizes = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
        layers = int(np.bincount(sizes[sizes > 0]).argmax()) if (sizes > 0).any() else 0
        found = np.full((len(sizes), layers), np.nan, np.float32)
        known = np.flatnonzero(sizes == layers) if layers else np.empty(0, int)
        found[known] = column.take(known).flatten().to_numpy(zero_copy_only=False).reshape(len(known), layers)
        return found

    def texts(self, name: str) -> list[str]:
        """A column's texts, empty where there is none."""
        return [text or "" for text in self.rows[name].to_pylist()]


def load_runs(locations: Sequence[str]) -> list[Run]:
    """The results in each folder. Raises JobError for one that is no output of a job."""
    stores = [Store(location) for location in locations]
    paths = [store.path("") for store in stores]
    for store, path in zip(stores, paths, strict=True):
        if paths.count(path) > 1:
            raise JobError(f"{store.name} is given twice; to compare runs, give a folder for each")
    return [_load(store, name) for store, name in zip(stores, short_names([s.name for s in stores]), strict=True)]


def _load(store: Store, name: str) -> Run:
    _check_folder(store)
    problem, found = "", None
    try:
        found = manifest.load(store)
    except JobError as error:
        problem = str(error).removeprefix(f"--output {store.name}: ").split("; --force")[0]
    table = read_columns(store, NAMES)
    columns = [_as_type(store, table, column) for column in NAMES]
    return Run(name, store.name, found, problem, pa.table(dict(zip(NAMES, columns, strict=True))), store)


def _as_type(store: Store, table: pa.Table, name: str) -> pa.ChunkedArray:
    try:
        return table[name].cast(_TYPES[name])
    except pa.ArrowException as error:
        raise JobError(
            f"{store.name}: its column {name} is {table[name].type}, expected {_TYPES[name]}: {one_line(error, 100)}; "
            "give a folder that jobs.summarize wrote"
        ) from None


def _check_folder(store: Store) -> None:
    expected = "expected the --output folder of a job, with manifest.json and part-*.parquet"
    try:
        kind = store.filesystem.get_file_info(store.path("").rstrip("/") or "/").type
    except (OSError, pa.ArrowException) as error:
        raise JobError(f"{store.name}: cannot be read: {one_line(error)}") from None
    if kind == FileType.NotFound:
        raise JobError(f"{store.name}: there is nothing there; {expected}; check the path")
    if kind != FileType.Directory:
        raise JobError(f"{store.name}: that is a file; {expected}; give the folder that it is in")
    if part_names(store) or store.read(manifest.NAME) is not None:
        return
    others = [name for name in store.list() if not name.startswith(".")]
    if others:
        raise JobError(f"{store.name}: no job wrote there (found {', '.join(others[:4])}); {expected}; check the path")


def short_names(locations: Sequence[str]) -> list[str]:
    """Of each location as much of its end as tells it from the others."""
    parts = [location.rstrip("/").split("/") for location in locations]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(locations)
