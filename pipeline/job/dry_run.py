"""The plan of a job in words, with an estimate of its time: --dry-run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.errors import DocumentError, JobError, one_line
from pipeline.job.configs import make_engine_config, model_label
from pipeline.job.estimate import Workload, dense_line, estimate_lines, machine_of
from pipeline.job.plan import JobPlan, make_plan, survey_input
from pipeline.prompts.prompt import PromptBuilder
from pipeline.prompts.questions import OWN, Questions
from pipeline.prompts.task import asks_first
from pipeline.results.kept_columns import prompt_text
from pipeline.results.parts import part_names
from pipeline.results.store import Store
from pipeline.settings.config import JobConfig
from pipeline.source import Catalogue, DocumentReader

# Documents from which tokens are estimated, and characters of each that are tokenised.
SAMPLE, SAMPLE_CHARACTERS = 8, 200_000


def describe_plan(config: JobConfig) -> Iterator[str]:
    """The lines of a dry run: documents, tokens, time, memory. Nothing is written."""
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
    yield from _question_lines(survey.questions)
    yield f"to do: {len(pending):,} documents; {plan.already:,} rows are there already"
    yield from _token_lines(config, plan)
    stem = config.stem()
    yield f"attention: {'dense' if stem is None else f'stem, preset {config.preset}: {stem}'}"
    yield f"output: {store.name}, fingerprints {survey.prints}"


def _question_lines(questions: Questions) -> Iterator[str]:
    """What is asked, and how often a document is read for it."""
    if len(questions.names) < 2 and not questions.own:
        return
    for name, text in questions.asked:
        what = f"those in a document's column {questions.own_column}" if name == OWN else one_line(text or "", 100)
        yield f"question {name}: {what}"
    if asks_first(questions.every[0].template):
        yield "questions: the prompt file places {{ question }} before {{ document }}, so each reads the document anew"
    else:
        yield "questions: all that are asked of a document share one reading of it"


def id_rule(config: JobConfig, catalogue: Catalogue) -> str:
    """Where ids come from, with an example."""
    example = catalogue.document(0).document_id if len(catalogue) else "-"
    unset = "column id or document_id if there is one, else file name and row"
    rules = {None: unset, "": "file name and row"}
    rule = rules.get(config.id_column, f"column {config.id_column}")
    return f"{rule}; e.g. {example!r}"


def _token_lines(config: JobConfig, plan: JobPlan) -> Iterator[str]:
    """Tokens estimated from a sample, time, and the engine's memory plan."""
    from pipeline.engine import EngineError, estimate_plan

    try:
        memory = estimate_plan(make_engine_config(config, config.device))
    except EngineError as error:
        raise JobError(str(error)) from None
    if len(plan.pending):
        yield from _work_lines(config, plan, memory)
    yield from memory.lines()


def _work_lines(config: JobConfig, plan: JobPlan, memory: Any) -> Iterator[str]:
    """What is read and written, and how long that takes. memory: the engine's MemoryPlan."""
    from pipeline.prompts.tokens import load_tokens

    pending, questions, answers = plan.pending, plan.survey.questions, plan.survey.answers
    tokens = load_tokens(config.model, config.revision, config.trust_remote_code)
    builder = PromptBuilder(tokens, questions.every[0], config.chat_template_args, plan.survey.today, config.thinking)
    if answers:
        builder.check_answers()
        for answer in answers.values():
            answer.grammar(tokens.tokenizer, tokens.eos_ids)
        yield f"answers: {plan.survey.answer_type}"
    readable = [position for position in pending.order().tolist() if position not in pending.errors]
    ratio, refused = _tokens_per_byte(config, plan, builder, readable)
    if refused:
        name, why = refused[0]
        yield f"unreadable: {len(refused)} of a sample of {min(SAMPLE, len(readable))} documents, e.g. {name}: {why}"
    prompts = (pending.columns[readable, 3] * ratio).astype(np.int64)
    limit = memory.max_context - config.max_new_tokens
    if ratio:
        longest = int(pending.columns[:, 3].max() * ratio)
        total = int(pending.total_bytes * ratio)
        yield f"tokens: about {total:,} in prompts (from a sample); the longest document about {longest:,}"
        if longest > limit:
            yield from _too_long_lines(config, limit, longest)
        dense = dense_line(prompts, config.stem())
        if dense:
            yield f"dense: {dense}"
    most = {task.name: task.max_new_tokens or config.max_new_tokens for task in questions.tasks}
    asked = Counter(name for which in pending.asked.tolist() for name, _ in pending.questions[which])
    generated = sum(count * most.get(name, 0) for name, count in asked.items())
    more = f", and {config.max_new_tokens:,} for each question of a document's own" if questions.own else ""
    yield f"generated: at most {generated:,} tokens{more}"
    if ratio:
        # Of a document's own questions one is counted: how many there are is known when it is read.
        outputs = sum(count * most.get(name, config.max_new_tokens) for name, count in asked.items())
        read = _as_read(prompts, max(1, limit), config, questions)
        yield from _time_lines(config, Workload(read, asked.total(), outputs), memory, len(pending))


def _tokens_per_byte(
    config: JobConfig, plan: JobPlan, builder: PromptBuilder, readable: list[int]
) -> tuple[float, list[tuple[str, str]]]:
    """Tokens of a prompt for each byte that the listing gives its document, of a sample; 0 if none of it is read.

    Also the documents of the sample that cannot be read, each with the reason.
    """
    reader = DocumentReader(config.text_column, [], config, tuple(plan.survey.questions.columns))
    tokens, sampled = 0, 0.0
    refused: list[tuple[str, str]] = []
    for position in readable[:: max(1, len(readable) // SAMPLE)][:SAMPLE]:
        document = plan.pending.document(position)
        try:
            text, kept = reader.read(document)
            columns = {name: prompt_text(value) for name, value in kept.prompt.items()}
            tokens += len(builder.build(text[:SAMPLE_CHARACTERS], 1 << 40, columns=columns).ids)
        except DocumentError as error:
            refused.append((document.document_id, str(error)))
            continue
        # In bytes as the listing has them: of a PDF they are its file's, not its text's.
        sampled += document.size_bytes * min(1.0, SAMPLE_CHARACTERS / len(text))
    return tokens / sampled if sampled else 0.0, refused


def _too_long_lines(config: JobConfig, limit: int, longest: int) -> Iterator[str]:
    """limit, longest: tokens of a prompt that fits, and of the longest one."""
    from pipeline.engine.model.loading import load_config
    from pipeline.engine.model.rope import stretch_hint

    yield f"too long: documents beyond {limit:,} tokens; policy: {config.too_long}"
    if config.max_context is None:
        own = load_config(make_engine_config(replace(config, rope_scaling=None), config.device))
        hint = stretch_hint(own, longest + config.max_new_tokens)
        if hint:
            yield f"longest document: {hint}"


def _as_read(prompts: np.ndarray, room: int, config: JobConfig, questions: Questions) -> np.ndarray:
    """Tokens of the prompts that are read, int64. room: of one that fits."""
    prompts = prompts[prompts <= room] if config.too_long == "error" else prompts
    prompts = np.minimum(prompts, room) if config.too_long == "truncate" else prompts
    return np.repeat(prompts, len(questions.names)) if asks_first(questions.every[0].template) else prompts


def _time_lines(config: JobConfig, work: Workload, memory: Any, documents: int) -> Iterator[str]:
    from pipeline.engine.model.loading import load_config

    own = load_config(make_engine_config(config, config.device))
    machine = machine_of(config, model_label(config), memory, own, documents)
    store = Store(config.estimate_from or config.output)
    if config.estimate_from and not part_names(store):
        raise JobError(f"--estimate-from {store.name}: it holds no results")
    yield from estimate_lines(work, machine, store, config.gpu_hour_price, only=bool(config.estimate_from))
