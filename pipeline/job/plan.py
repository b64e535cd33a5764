"""What a job has to do: the input listed, and compared with what the output holds."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.answers.schema import Schema, answer_type
from pipeline.errors import DocumentError, JobError, one_line
from pipeline.job import manifest
from pipeline.prompts.questions import OWN, Questions, is_own
from pipeline.results.kept_columns import PROMOTE
from pipeline.results.parts import PART, done_rows, part_names
from pipeline.results.rows import ANSWER, NAMES, result_schema
from pipeline.results.sink import Key, keys
from pipeline.results.store import Store
from pipeline.settings.config import JobConfig
from pipeline.settings.questions import answers_of, questions_of
from pipeline.source import Catalogue, Document, DocumentReader, find_files, input_hash, list_documents
from pipeline.source.files import directly_in


@dataclass(frozen=True)
class Survey:
    """A job's input and questions, before the output is looked at.

    today: the date for chat templates that print one; of a job that goes on, the one that it began with (make_plan).
    """

    config: JobConfig
    questions: Questions
    catalogue: Catalogue
    prints: dict[str, str]
    messages: tuple[str, ...]
    today: date

    @property
    def columns(self) -> pa.Schema:
        """Of the results. Raises JobError if a kept column has the name of a result column."""
        return result_schema(self.catalogue.kept, self.answer_type)

    @property
    def answers(self) -> dict[str, Schema]:
        """By question, the schema of its answers, of those that have one."""
        return answers_of(self.config, self.questions)

    @property
    def answer_type(self) -> pa.DataType | None:
        """Of the column `answer`; None if no question has a schema."""
        return answer_type(self.answers.values())


@dataclass(frozen=True)
class JobPlan:
    """What is left to do.

    pending: documents that lack the row of a question, or of which one is to be replaced, with these questions.
    already: rows that an earlier run left and that stay. replaced: (document_id, question_id) of rows that give way to
    new ones, since the document has changed or its failure is tried again. stale_errors: ids of documents whose rows
    stand for what could not be read when it was listed, and is not in the input any more.
    asked: what the output will have answers to, as the manifest keeps it.
    """

    survey: Survey
    pending: Catalogue
    already: int
    messages: tuple[str, ...]
    replaced: tuple[Key, ...] = ()
    stale_errors: tuple[str, ...] = ()
    asked: Mapping[str, Any] = field(default_factory=dict)


def survey_input(config: JobConfig) -> Survey:
    """List the input and take its fingerprints. Raises JobError for whatever the user can mend there."""
    questions = questions_of(config)
    found, ignored = find_files(config.input)
    kinds = "1 file of another kind" if len(ignored) == 1 else f"{len(ignored):,} files of other kinds"
    messages = (f"passed over {kinds}, e.g. {ignored[0]}",) if ignored else ()
    # The results of an earlier run, where they lie in the input's folder.
    files = [file for file in found if not (PART.search(file.path) and directly_in(file, config.output))]
    prints = manifest.fingerprints(config, files)
    catalogue = list_documents(
        files,
        text_column=config.text_column,
        id_column=config.id_column,
        keep_columns=config.keep_columns,
        shard=config.shard_pair(),
        settings=config,
        prompt_columns=questions.columns,
    )
    catalogue.questions = [questions.asked]
    survey = Survey(config, questions, catalogue, prints, messages, config.today())
    _ = survey.columns  # raises now what it raises
    return survey


def make_plan(survey: Survey, store: Store) -> JobPlan:
    """Compare the input with what the output holds; changes nothing.

    Raises JobError if the output was made with something else, or holds rows of other documents, and --force is not
    given; or if its columns are of other types.
    """
    if not part_names(store):
        return JobPlan(survey, survey.catalogue, 0, (), asked=manifest.questions_asked(survey.questions, None))
    earlier, messages = _compare_with_earlier(survey, store)
    if earlier is not None and survey.config.prompt_date is None:
        survey = replace(survey, today=manifest.prompt_date(earlier))
    check_columns(store, survey.columns)
    rows = _sort_rows(survey, done_rows(store))
    gone, stale_errors = rows.gone, rows.stale_errors
    if gone:
        what = f"{len(gone):,} rows are of documents that the input does not hold, e.g. {gone[0]!r}"
        if not survey.config.force:
            raise JobError(f"--output {store.name}: {what}; choose another output, or --force to keep them")
        messages.append(f"{what}; kept with --force")
    if rows.outdated:
        changed = list(dict.fromkeys(name for name, _ in rows.outdated))
        messages.append(f"{len(changed):,} documents have changed since, e.g. {changed[0]!r}; they are done again")
    if rows.not_asked:
        names = ", ".join(map(repr, sorted(rows.not_asked)[:3]))
        messages.append(f"{rows.not_asked.total():,} rows are of questions that are not asked now ({names}); they stay")
    if stale_errors:
        what = f"e.g. {stale_errors[0]!r}; their rows are removed"
        messages.append(f"{len(stale_errors):,} lines or files that could not be read are not there any more, {what}")
    if survey.config.retry_failed:
        messages.append(f"--retry-failed: {len({name for name, _ in rows.failed}):,} documents are done again")
    pending = survey.catalogue.asking(survey.questions.asked, ~rows.answered)
    replaced = (*rows.outdated, *rows.failed)
    asked = manifest.questions_asked(survey.questions, earlier)
    return JobPlan(survey, pending, rows.staying, tuple(messages), replaced, tuple(stale_errors), asked)


def check_columns(store: Store, schema: pa.Schema) -> None:
    """Raise JobError if rows of `schema` and those that are there do not go into one table.

    Kept columns and answers always do (kept_columns.concat).
    """
    fixed = {*NAMES} - {ANSWER}
    schema = pa.schema([field for field in schema if field.name in fixed])
    for name in part_names(store):
        with store.named_failures(f"{name} cannot be read"), store.open(name) as file:
            found = pq.read_schema(file)
        try:
            pa.unify_schemas([pa.schema([f for f in found if f.name in fixed]), schema], promote_options=PROMOTE)
        except pa.ArrowException as error:
            what = f"{name} has columns of other types than new rows would: {one_line(error)}"
            raise JobError(f"--output {store.name}: {what}; choose another output") from None


@dataclass(frozen=True)
class _Rows:
    """What becomes of the rows that are there.

    answered: bool [documents, questions asked], which have a row that stays. staying: rows that stay. outdated, failed:
    keys of rows of documents that changed, and of those that failed and are tried again. gone: ids of documents that
    the input does not hold. stale_errors: ids of what could not be read when it was listed, and is not there any more.
    not_asked: rows of other questions than those asked now, by question.
    """

    answered: np.ndarray
    staying: int
    outdated: list[Key]
    failed: list[Key]
    gone: list[str]
    stale_errors: list[str]
    not_asked: Counter[str]


def _sort_rows(survey: Survey, rows: pa.Table) -> _Rows:
    """What becomes of each row.

    The stamp decides where it is the same; where it is not, the document is read and its hash does. A document's own
    questions are done again together: which they are is known only when it is read.
    """
    catalogue, names = survey.catalogue, survey.questions.names
    places = pc.index_in(rows["document_id"].cast(pa.large_string()), value_set=catalogue.ids)
    positions = np.array([-1 if place is None else place for place in places.to_pylist()], np.int64)
    columns = _columns_of(rows["question_id"], names)
    ok = np.array(pc.equal(rows["status"], "ok").to_pylist(), bool)
    here = (positions >= 0) & (columns >= 0)
    outdated = here & _changed(survey, rows, positions, here)
    failed = here & ~outdated & ~ok if survey.config.retry_failed else np.zeros(len(rows), bool)
    if OWN in names:
        own = here & (columns == names.index(OWN))
        outdated |= own & np.isin(positions, positions[own & outdated])
        failed |= own & ~outdated & np.isin(positions, positions[own & failed])
    stay = here & ~outdated & ~failed
    answered = np.zeros((len(catalogue), len(names)), bool)
    answered[positions[stay], columns[stay]] = True
    gone, stale_errors = _without_document(rows, positions)
    others = rows["question_id"].filter(pa.array((positions >= 0) & (columns < 0)))
    not_asked = Counter(others.to_pylist())
    staying = int(stay.sum()) + not_asked.total() + (len(gone) if survey.config.force else 0)
    outdated_keys, failed_keys = (keys(rows.filter(pa.array(some))) for some in (outdated, failed))
    return _Rows(answered, staying, outdated_keys, failed_keys, gone, stale_errors, not_asked)


def _columns_of(question_ids: pa.ChunkedArray, names: tuple[str, ...]) -> np.ndarray:
    """Which of `names` each row's question is, int64 [rows]; -1 for none of them."""
    known = pc.unique(question_ids).to_pylist()
    number = {name: names.index(asked) for name in known if (asked := OWN if is_own(name) else name) in names}
    return np.array([number.get(name, -1) for name in question_ids.to_pylist()], np.int64)


def _changed(survey: Survey, rows: pa.Table, positions: np.ndarray, some: np.ndarray) -> np.ndarray:
    """bool [rows]: of those in `some`, whose document is not what they were made from."""
    catalogue, stamps = survey.catalogue, rows["input_stamp"].to_pylist()
    changed = np.zeros(len(rows), bool)
    doubtful = [
        (int(positions[number]), number)
        for number in np.flatnonzero(some).tolist()
        if stamps[number] != catalogue.stamp(int(positions[number]))
    ]
    reader = DocumentReader(survey.config.text_column, catalogue.kept, survey.config, tuple(survey.questions.columns))
    last, now = -1, None
    for position, number in sorted(doubtful):  # in the order of the files
        if position != last:
            last, now = position, _hash_now(reader, catalogue.document(position))
        was = rows["input_hash"][number].as_py()
        changed[number] = was is None or was != now
    return changed


def _without_document(rows: pa.Table, positions: np.ndarray) -> tuple[list[str], list[str]]:
    """Ids of rows whose documents the input does not hold; and of documents that could not even be listed."""
    unread = pc.and_(pc.equal(rows["attempts"], 0), pc.equal(rows["status"], "error")).to_numpy()
    ids = rows["document_id"]
    gone = ids.filter(pa.array((positions < 0) & ~unread)).to_pylist()
    stale_errors = dict.fromkeys(ids.filter(pa.array((positions < 0) & unread)).to_pylist())
    return gone, [name for name in stale_errors if name not in set(gone)]


def _hash_now(reader: DocumentReader, document: Document) -> str | None:
    with contextlib.suppress(DocumentError):
        if not document.error:
            return input_hash(*reader.read(document))
    return None


def _compare_with_earlier(survey: Survey, store: Store) -> tuple[dict[str, Any] | None, list[str]]:
    """The earlier run's manifest (None only with --force), and what differs, in words."""
    config = survey.config
    if not config.resume:
        raise JobError(
            f"--output {store.name}: it holds results already; choose another folder, or leave out --no-resume to go on"
        )
    try:
        old = manifest.load(store)
    except JobError:
        if not config.force:
            raise
        return None, ["the earlier manifest is damaged; going on with --force"]
    if old is None:
        if not config.force:
            raise JobError(
                f"--output {store.name}: it holds part files but no {manifest.NAME}; choose another folder, or --force"
            )
        return None, [f"the output has no {manifest.NAME}; going on with --force"]
    return old, manifest.check(old, survey.prints, config, survey.questions, store)
