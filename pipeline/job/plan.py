"""What a job has to do: the input listed, compared with what the output holds, and in words for a dry run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import DocumentError, JobError, one_line
from pipeline.job import manifest
from pipeline.location import safe_name
from pipeline.model_files import is_local
from pipeline.prompts.prompt import Task, make_task
from pipeline.results.kept_columns import PROMOTE
from pipeline.results.rows import ANSWER, NAMES, result_schema
from pipeline.results.sink import PART, done_rows, part_names
from pipeline.results.store import Store
from pipeline.settings.config import JobConfig
from pipeline.settings.shared import EngineSettings, ReadSettings, Sampling
from pipeline.source import Catalogue, Document, DocumentReader, find_files, input_hash, list_documents
from pipeline.source.files import directly_in
from stem_core.settings import values_of


@dataclass(frozen=True)
class Survey:
    """A job's input and task, before the output is looked at.

    today: the date for chat templates that print one; of a job that goes on, the one that it began with (make_plan).
    """

    config: JobConfig
    task: Task
    catalogue: Catalogue
    prints: dict[str, str]
    messages: tuple[str, ...]
    today: date

    @property
    def columns(self) -> pa.Schema:
        """Of the results. Raises JobError if a kept column has the name of a result column."""
        answers = self.config.answers()
        return result_schema(self.catalogue.kept, None if answers is None else answers.arrow_type)


@dataclass(frozen=True)
class JobPlan:
    """What is left to do.

    pending: documents without a row, or whose row is to be replaced. already: rows that an earlier run left and that
    stay. replaced: ids whose rows give way to new ones, since the document has changed or its failure is tried again.
    stale_errors: ids of rows that stand for what could not be read when it was listed, and is not in the input any
        more.
    """

    survey: Survey
    pending: Catalogue
    already: int
    messages: tuple[str, ...]
    replaced: tuple[str, ...] = ()
    stale_errors: tuple[str, ...] = ()


def survey_input(config: JobConfig) -> Survey:
    """List the input and take its fingerprints. Raises JobError for whatever the user can mend there."""
    task = make_task(config.task, config.question, config.prompt_file)
    found, ignored = find_files(config.input)
    messages = (f"passed over {len(ignored)} files of other kinds, e.g. {ignored[0]}",) if ignored else ()
    # The results of an earlier run, where they lie in the input's folder.
    files = [file for file in found if not (PART.search(file.path) and directly_in(file, config.output))]
    prints = manifest.fingerprints(config, files, task)
    catalogue = list_documents(
        files,
        text_column=config.text_column,
        id_column=config.id_column,
        keep_columns=config.keep_columns,
        shard=config.shard_pair(),
        settings=config,
    )
    survey = Survey(config, task, catalogue, prints, messages, config.today())
    _ = survey.columns  # raises now what it raises
    return survey


def make_plan(survey: Survey, store: Store) -> JobPlan:
    """Compare the input with what the output holds; changes nothing.

    Raises JobError if the output was made with something else, or holds rows of other documents, and --force is not
    given; or if its columns are of other types.
    """
    if not part_names(store):
        return JobPlan(survey, survey.catalogue, 0, ())
    earlier, messages = _compare_with_earlier(survey.config, store, survey.prints)
    if earlier is not None and survey.config.prompt_date is None:
        survey = replace(survey, today=manifest.prompt_date(earlier))
    check_columns(store, survey.columns)
    rows = done_rows(store)
    stay, outdated, failed, gone, stale_errors = _sort_rows(survey, rows)
    if gone:
        what = f"{len(gone):,} rows are of documents that the input does not hold, e.g. {gone[0]!r}"
        if not survey.config.force:
            raise JobError(f"--output {store.name}: {what}; choose another output, or --force to keep them")
        messages.append(f"{what}; kept with --force")
    if outdated:
        messages.append(f"{len(outdated):,} documents have changed since, e.g. {outdated[0]!r}; they are done again")
    if stale_errors:
        what = f"e.g. {stale_errors[0]!r}; their rows are removed"
        messages.append(f"{len(stale_errors):,} lines or files that could not be read are not there any more, {what}")
    if survey.config.retry_failed:
        messages.append(f"--retry-failed: {len(failed):,} documents are done again")
    ids = rows["document_id"].take(pa.array(stay, pa.int64()))
    replaced = (*outdated, *failed)
    return JobPlan(survey, survey.catalogue.without(ids), len(ids), tuple(messages), replaced, tuple(stale_errors))


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


def _sort_rows(survey: Survey, rows: pa.Table) -> tuple[list[int], list[str], list[str], list[str], list[str]]:
    """The rows' numbers that stay; ids of documents that changed, that failed and are tried again, that are gone; and
    of rows of what could not be read when it was listed, and is not there any more.

    The stamp decides where it is the same; where it is not, the document is read and its hash does.
    """
    catalogue = survey.catalogue
    ids = rows["document_id"].cast(pa.large_string())
    positions = pc.index_in(ids, value_set=catalogue.ids).to_pylist()
    stay, doubtful, outdated = [], [], []
    gone: list[int] = []
    stale_errors: list[int] = []
    unread = pc.and_(pc.equal(rows["attempts"], 0), pc.equal(rows["status"], "error")).to_pylist()
    for number, (position, stamp) in enumerate(zip(positions, rows["input_stamp"].to_pylist(), strict=True)):
        if position is None:
            (stale_errors if unread[number] else gone).append(number)
        elif stamp == catalogue.stamp(position):
            stay.append(number)
        else:
            doubtful.append((position, number))
    reader = DocumentReader(survey.config.text_column, catalogue.kept, survey.config)
    for position, number in sorted(doubtful):  # in the order of the files
        was = rows["input_hash"][number].as_py()
        if was is not None and was == _hash_now(reader, catalogue.document(position)):
            stay.append(number)
        else:
            outdated.append(ids[number].as_py())
    failed = []
    if survey.config.retry_failed:
        ok = pc.equal(rows["status"], "ok").to_pylist()
        failed = [ids[number].as_py() for number in stay if not ok[number]]
        stay = [number for number in stay if ok[number]]
    if gone and survey.config.force:
        stay += gone
    names = rows["document_id"].to_pylist()
    return stay, outdated, failed, [names[number] for number in gone], [names[number] for number in stale_errors]


def _hash_now(reader: DocumentReader, document: Document) -> str | None:
    with contextlib.suppress(DocumentError):
        if not document.error:
            return input_hash(*reader.read(document))
    return None


def _compare_with_earlier(
    config: JobConfig, store: Store, prints: dict[str, str]
) -> tuple[dict[str, Any] | None, list[str]]:
    """The earlier run's manifest (None only with --force), and what differs, in words."""
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
    return old, manifest.check(old, prints, config, store)


def make_worker_config(
    survey: Survey, device: str, threads: int, engine_factory: str = "", grace: float | None = None
) -> Any:
    """The job's settings in the form a worker takes them (pipeline.workers.worker.WorkerConfig)."""
    from pipeline.workers.worker import GRACE_SECONDS, WorkerConfig

    config = survey.config
    return WorkerConfig(
        engine=make_engine_config(config, device),
        task=survey.task,
        too_long=config.too_long,
        max_new_tokens=config.max_new_tokens,
        sampling=Sampling(**values_of(config, Sampling)),
        text_column=config.text_column,
        reading=ReadSettings(**values_of(config, ReadSettings)),
        model_name=model_label(config),
        config_hash=config.fingerprint(),
        today=survey.today,
        template_args=config.chat_template_args,
        thinking=config.thinking,
        evidence=config.evidence == "on",
        schema=config.schema,
        kept=tuple(pa.field(field.name, field.type) for field in survey.catalogue.kept),
        deadline=config.deadline,
        grace=GRACE_SECONDS if grace is None else grace,
        threads=threads,
        engine_factory=engine_factory or "pipeline.engine:Engine",
    )


def make_engine_config(config: JobConfig, device: str) -> Any:
    """The job's settings in the form the engine takes them (pipeline.engine.EngineConfig)."""
    from pipeline.engine.config import EngineConfig

    values = values_of(config, EngineSettings)
    if is_local(config.model):
        values["model"] = _absolute(config.model)
    if config.adapter is not None:
        values["adapter"] = _absolute(config.adapter)
    return EngineConfig(
        **values,
        device=device,
        gpus=config.gpus_per_worker,
        attention=config.stem(),
        seed=config.seed,
        grammars=config.schema is not None,
    )


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def model_label(config: JobConfig) -> str:
    """What rows call the model: its name, the adapter merged into it, and by how much its context was stretched."""
    label = safe_name(config.model)
    if config.adapter is not None:
        label += f" + {safe_name(config.adapter)}"
    return label if config.rope_scaling is None else f"{label} (YaRN {config.rope_scaling:g})"


def describe_plan(config: JobConfig) -> Iterator[str]:
    """The lines of a dry run: documents, tokens, memory. Nothing is written."""
    store = Store(config.output)
    survey = survey_input(config)
    plan = make_plan(survey, store)
    catalogue, pending = survey.catalogue, plan.pending
    yield from (*survey.messages, *plan.messages)
    files = sorted({file.kind for file in catalogue.files})
    size = f"{catalogue.total_bytes:,} bytes of text in {len(catalogue.files):,} files ({', '.join(files)})"
    yield f"input: {len(catalogue):,} documents, {size}"
    yield f"ids: {id_rule(config, catalogue)}"
    if catalogue.errors:
        yield f"unreadable: {len(catalogue.errors):,} documents get an error row at once"
    yield f"to do: {len(pending):,} documents; {plan.already:,} rows are there already"
    yield from _token_lines(config, plan)
    stem = config.stem()
    yield f"attention: {'dense' if stem is None else f'stem, preset {config.preset}: {stem}'}"
    yield f"output: {store.name}, fingerprints {survey.prints}"


def id_rule(config: JobConfig, catalogue: Catalogue) -> str:
    """Where ids come from, with an example."""
    example = catalogue.document(0).document_id if len(catalogue) else "-"
    unset = "column id or document_id if there is one, else file name and row"
    rules = {None: unset, "": "file name and row"}
    rule = rules.get(config.id_column, f"column {config.id_column}")
    return f"{rule}; e.g. {example!r}"


def _token_lines(config: JobConfig, plan: JobPlan) -> Iterator[str]:
    """Tokens estimated from a sample, and the engine's memory plan."""
    from pipeline.engine import EngineError, estimate_plan
    from pipeline.engine.model.loading import load_config
    from pipeline.engine.model.rope import stretch_hint
    from pipeline.prompts.prompt import PromptBuilder
    from pipeline.prompts.tokens import load_tokens

    pending = plan.pending
    memory = None
    try:
        memory = estimate_plan(make_engine_config(config, config.device))
    except EngineError as error:
        raise JobError(str(error)) from None
    if len(pending):
        builder = PromptBuilder(
            load_tokens(config.model, config.revision, config.trust_remote_code),
            plan.survey.task,
            config.chat_template_args,
            plan.survey.today,
            config.thinking,
        )
        answers = config.answers()
        if answers is not None:
            builder.check_answers()
            answers.grammar(builder.tokens.tokenizer, builder.tokens.eos_ids)
            yield f"answers: {answers.arrow_type}"
        reader = DocumentReader(config.text_column, [], config)
        readable = [position for position in pending.order().tolist() if position not in pending.errors]
        tokens, sampled = 0, 0.0
        for position in readable[:: max(1, len(readable) // 8)][:8]:
            document = pending.document(position)
            with contextlib.suppress(DocumentError):
                text = reader.read(document)[0]
                tokens += len(builder.build(text[:200_000], 1 << 40).ids)
                # In bytes as the listing has them: of a PDF they are its file's, not its text's.
                sampled += document.size_bytes * min(1.0, 200_000 / len(text))
        if sampled:
            ratio = tokens / sampled
            total, longest = int(pending.total_bytes * ratio), int(pending.columns[:, 3].max() * ratio)
            yield f"tokens: about {total:,} in prompts (from a sample); the longest document about {longest:,}"
            limit = memory.max_context - config.max_new_tokens
            if longest > limit:
                yield f"too long: documents beyond {limit:,} tokens; policy: {config.too_long}"
                if config.max_context is None:
                    own = load_config(make_engine_config(replace(config, rope_scaling=None), config.device))
                    hint = stretch_hint(own, longest + config.max_new_tokens)
                    if hint:
                        yield f"longest document: {hint}"
        yield f"generated: at most {len(pending) * config.max_new_tokens:,} tokens"
    yield from memory.lines()
