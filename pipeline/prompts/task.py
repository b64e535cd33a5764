"""What is asked of documents: a task, and the Jinja source of its user message, which runs in a sandbox."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, nodes
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.errors import JobError, one_line

# What stands for data while templates are rendered: ordinary letters, so that no template strips or escapes them.
MARK = "STEMLINEDOCUMENTSTANDSHERE"
QUESTION_MARK = "STEMLINEQUESTIONSTANDSHERE"
COLUMN_MARK = "StemlineColumn{}StandsHere"  # in both cases, so that a filter that changes a value does not go unseen

DEFAULT_TEMPLATE = "{{ document }}\n\n{{ question }}"
DEFAULT_QUESTIONS = {
    "summarize": "Summarize the document above. Cover its main points, and name the important facts and figures."
}
# Merges what the default question gave for each part; a question of the user's own is asked again about the answers.
MERGE_QUESTION = "The texts above summarize consecutive parts of one document. Merge them; keep the important facts."


@dataclass(frozen=True)
class Task:
    """What to ask about each document. template: Jinja source of the user message; system: text of a system message.

    name: of the question, the rows' question_id. max_new_tokens, sampling: in place of the job's, by the names of the
    settings. schema: JSON Schema of the answer. own: the question is data, a document brought it along.
    """

    question: str
    template: str
    merge_question: str
    system: str = ""
    name: str = "summary"
    max_new_tokens: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    schema: Mapping[str, Any] | None = None
    own: bool = False

    def fingerprint(self) -> str:
        """12 hex digits over all that is asked and how; the name apart."""
        what: list[Any] = [self.question, self.template, self.merge_question]
        if self.system:
            what.append({"system": self.system})
        asked = self.asked_as()
        return hashlib.sha256(json.dumps([*what, asked] if asked else what).encode()).hexdigest()[:12]

    def asked_as(self) -> dict[str, Any]:
        """What is this question's alone besides its text."""
        values = {"max_new_tokens": self.max_new_tokens, "sampling": dict(self.sampling), "schema": self.schema}
        return {name: value for name, value in values.items() if value or (name == "schema" and value is not None)}

    def shown(self) -> str:
        """The question for people; where the template has no question, the user message with the document's place."""
        if asks(self.template):
            return self.question
        text = user_message(self.template, self.question).replace(MARK, "{{ document }}")
        for number, name in enumerate(template_columns(self.template)):
            text = text.replace(COLUMN_MARK.format(number), f"{{{{ {name} }}}}")
        return text


def make_task(name: str, question: str | None, prompt_file: str | None, system: str | None = None) -> Task:
    """The task of one question. Raises JobError if the prompt file cannot be read or does not place the document."""
    asked = question if question is not None else DEFAULT_QUESTIONS.get(name, "")
    merge = asked if question is not None or asked == "" else MERGE_QUESTION
    task = Task(asked, read_template(prompt_file), merge, system or "")
    user_message(task.template, asked)
    return task


def read_template(prompt_file: str | None) -> str:
    """The Jinja source of the user message. Raises JobError if the file cannot be read."""
    if not prompt_file:
        return DEFAULT_TEMPLATE
    try:
        return Path(prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise JobError(f"--prompt-file {prompt_file}: cannot be read: {one_line(error)}") from None


def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False)


def _names(template: str) -> set[str]:
    """What a template uses. Raises JobError if it is not valid."""
    try:
        return find_undeclared_variables(_environment().parse(template))
    except TemplateError as error:
        raise JobError(f"the prompt template is not valid: {one_line(error)}") from None


def asks(template: str) -> bool:
    """Whether a template uses the question."""
    return "question" in _names(template)


def asks_first(template: str) -> bool:
    """Whether a template places the question before the document: then no two questions can share a reading."""
    text = user_message(template, QUESTION_MARK)
    return QUESTION_MARK in text.partition(MARK)[0]


def template_columns(template: str) -> tuple[str, ...]:
    """Names of the input's columns that a template places. Raises JobError if it does more with one than that."""
    columns = sorted(_names(template) - {"document", "question"})
    tree = _environment().parse(template)
    placed = [item for output in tree.find_all(nodes.Output) for item in output.nodes if isinstance(item, nodes.Name)]
    for name in columns:
        uses = sum(item.name == name for item in tree.find_all(nodes.Name))
        if uses != sum(item.name == name for item in placed):
            raise JobError(
                f"the prompt template uses the column {name} other than as {{{{ {name} }}}}; it can only be placed, "
                "without filters and conditions"
            )
    return tuple(columns)


def user_message(template: str, question: str) -> str:
    """The rendered user message with marks where the document and columns go. The template runs in a sandbox.

    Raises JobError.
    """
    try:
        columns = {name: COLUMN_MARK.format(number) for number, name in enumerate(template_columns(template))}
        text = _environment().from_string(template).render(columns, document=MARK, question=question)
    except TemplateError as error:
        raise JobError(
            f"the prompt template is not valid: {one_line(error)}; it may use document, question and columns"
        ) from None
    except JobError:
        raise
    except Exception as error:  # a template can raise anything that Python's operators raise
        raise JobError(f"the prompt template failed: {type(error).__name__}: {one_line(error)}") from None
    if text.count(MARK) != 1:
        raise JobError(
            "the prompt template must hold {{ document }} once, unchanged by filters; "
            f"it came out {text.count(MARK)} times"
        )
    return text
