"""The questions of a job: those asked of every document, and those that documents bring along."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import DocumentError
from pipeline.prompts.task import Task, template_columns

# Stands for all questions that a document brings along, which nobody knows before it is read: own-1, own-2 and so on.
OWN = "own"
MOST_OWN = 1000


def is_own(name: str) -> bool:
    """Whether a question_id is that of a question which the document brought along."""
    return re.fullmatch(rf"{OWN}(-\d+)?", name) is not None


@dataclass(frozen=True)
class Questions:
    """What is asked. tasks: of every document. own: makes tasks of what is in `own_column` of a document; None without.

    own_column: a column of the input.
    """

    tasks: tuple[Task, ...]
    own: Task | None = None
    own_column: str | None = None

    @property
    def every(self) -> tuple[Task, ...]:
        """The tasks, and behind them `own`."""
        return (*self.tasks, *([self.own] if self.own else []))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the questions to every document; OWN stands for a document's own."""
        return tuple(task.name for task in self.every)

    @property
    def asked(self) -> tuple[tuple[str, str | None], ...]:
        """(name, text) of what every document is asked, before it is read."""
        return (*((task.name, task.shown()) for task in self.tasks), *([(OWN, None)] if self.own else []))

    @property
    def columns(self) -> dict[str, str]:
        """Columns of the input that prompts are made from, besides the text, each with the flag that asks for it."""
        template = self.every[0].template
        own = {self.own_column: "--questions-column"} if self.own_column else {}
        return dict.fromkeys(template_columns(template), "--prompt-file: {{ column }}") | own

    def frame(self) -> dict[str, str]:
        """What stands around questions and documents: the template, the system message."""
        task = self.every[0]
        return {"template": task.template, "system": task.system}

    def prints(self) -> dict[str, str]:
        """By name, a fingerprint of what is asked and how."""
        return {task.name: task.fingerprint() for task in self.every}

    def of_document(self, values: Mapping[str, Any]) -> list[Task]:
        """The questions that a document brought along. values: its columns. Raises DocumentError if they are none."""
        if self.own is None or self.own_column is None:
            return []
        texts = own_texts(values.get(self.own_column), self.own_column)
        own = self.own
        return [
            replace(own, name=f"{OWN}-{number}", question=text, merge_question=text)
            for number, text in enumerate(texts, 1)
        ]


def own_texts(value: Any, column: str) -> list[str]:
    """The questions in a document's column: a list of texts, or JSON of one. Raises DocumentError for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DocumentError(
                f"its questions ({column}) are a text that is not JSON; expected a list of texts, or JSON of one"
            ) from None
    if value is None or value == []:
        raise DocumentError(f"it has no questions of its own ({column} is empty)")
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise DocumentError(f"its questions ({column}) are not a list of texts")
    if len(value) > MOST_OWN:
        raise DocumentError(f"it has {len(value):,} questions of its own ({column}); at most {MOST_OWN:,} are asked")
    try:
        for text in value:
            text.encode()
    except UnicodeEncodeError:
        raise DocumentError(f"a question in {column} has a lone surrogate; no UTF-8 can hold it") from None
    return [text.strip() for text in value]
