"""A job's questions in a worker: how their prompts are built, and what their answers are held to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pipeline.answers.grammar import Grammar
from pipeline.answers.schema import AnswerError, Schema, compile_schema
from pipeline.engine.config import Completion, EngineConfig, Request
from pipeline.errors import DocumentError, JobError, one_line
from pipeline.prompts.prompt import PromptBuilder
from pipeline.prompts.questions import OWN
from pipeline.prompts.stops import STOP_STRING, before_stop
from pipeline.prompts.task import Task
from pipeline.prompts.tokens import Tokens, load_tokens
from pipeline.results.kept_columns import Kept, prompt_text
from pipeline.results.rows import Outcome
from pipeline.settings.questions import own_tasks
from pipeline.source import Asked, Document
from pipeline.workers.work import Ask, Work, WorkerConfig

# Documents that are cut, or processed in parts, are cut at whole numbers of so many tokens, or of this share of a small
# context: questions of like length then read the same, each question by itself as well as beside others.
CUT_STEP, CUT_SHARE = 256, 16


@dataclass(frozen=True)
class Answers:
    """What the answers to a question are held to."""

    schema: Schema
    grammar: Grammar


class JobQuestions:
    """The questions that a worker's job asks, with the tokenizer; made in a thread that may take its time.

    Raises JobError for a tokenizer, a template or a schema that cannot be used.
    """

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._hf_config, self.tokens = load_prompting(config.engine)  # the former with the context as it was made for
        self._context = 0
        self.step = 1
        self._builders = {task.name: self._builder(task) for task in config.questions.every}
        self._answers = self._compile_answers()

    def fit(self, context: int) -> None:
        """Take the engine's context, in tokens. Raises JobError if it leaves no room for a prompt."""
        self._context = context
        self.step = max(1, min(CUT_STEP, context // CUT_SHARE))
        for task in self._config.questions.every:
            if self.limit(task) < 1:
                raise JobError(
                    f"--max-new-tokens {self.most(task)} leaves no room for a prompt: the context is {context} tokens"
                )

    def asked(self, document: Document) -> Asked:
        """(name, text) of what is asked of a document, as far as that is known before it is read."""
        return document.questions or self._config.questions.asked

    def take(self, work: Work, kept: Kept) -> None:
        """Note the questions to a document that is read; those of its own end at once if they are none."""
        work.columns = {name: prompt_text(value) for name, value in kept.prompt.items()}
        names = tuple(name for name, _ in self.asked(work.document))
        questions = self._config.questions
        for task in questions.tasks:
            if task.name in names:
                work.asks.append(self._ask(work, task, self._builders[task.name]))
        if OWN in names:
            try:
                own = [(task, self._builder(task)) for task in own_tasks(questions, kept.prompt)]
                work.asks += [self._ask(work, task, builder) for task, builder in own]
            except DocumentError as error:
                unread = self.unread(work, OWN)
                unread.outcome = Outcome(status="error", error=one_line(error))
                work.asks.append(unread)

    def unread(self, work: Work, name: str) -> Ask:
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
                made[text] = Answers(schema, schema.grammar(self.tokens.tokenizer, self.tokens.eos_ids))
        return {name: made[text] for name, text in self._config.schemas.items()}

    def answers_of(self, task: Task) -> Answers | None:
        """What the answers to a question are held to; None where they are free."""
        return self._answers.get(OWN if task.own else task.name)

    def _builder(self, task: Task) -> PromptBuilder:
        config = self._config
        return PromptBuilder(self.tokens, task, config.template_args, config.today, config.thinking)

    def most(self, task: Task) -> int:
        """Most tokens that a question's answer may have."""
        return task.max_new_tokens or self._config.max_new_tokens

    def limit(self, task: Task) -> int:
        """Most tokens that a question's prompt may have."""
        return self._context - self.most(task)

    def failure(self, error: BaseException) -> Outcome:
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

    def outcome(self, ask: Ask, request: Request, completion: Completion) -> Outcome:
        """What a completion makes of a question."""
        if completion.status != "ok":
            return Outcome(status=completion.status, error=one_line(completion.error))
        answer = self.tokens.answer(list(completion.token_ids), ask.builder.opens_thinking)
        if answer.text is None:
            why = _no_answer(completion, request.max_new_tokens, self._config.thinking)
            return Outcome(status="error", error=why, reasoning=answer.reasoning)
        output, reason = answer.text, completion.finish_reason
        stopped = before_stop(output, self._config.stop)
        if stopped is not None:
            output, reason = stopped, STOP_STRING
        outcome = Outcome(status="ok", output=output, finish_reason=reason, reasoning=answer.reasoning)
        answers = self.answers_of(ask.task)
        if answers is None:
            return outcome
        return _answered(outcome, answers.schema, self._config.typed_answers, request.max_new_tokens)


def load_prompting(config: EngineConfig) -> tuple[Any, Tokens]:
    """The transformers config, its context as the model has it, and the tokenizer. Raises JobError."""
    from pipeline.engine.model.loading import load_config  # here: the driver needs this file without torch

    own = load_config(replace(config, rope_scaling=None))
    return own, load_tokens(config.model, config.revision, config.trust_remote_code)


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
