"""The questions of a job: those asked of every document, and those that documents bring along."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.prompts.task import Task, template_columns

# Stands for all questions that a document brings along, which nobody knows before it is read: own-1, own-2 and so on.
OWN = "own"


def is_own(name: str) -> bool:
    """Whether a question_id is that of a question which the document brought along."""
    return re.fullmatch(rf"{OWN}(-\d+)?", name) is not None


@dataclass(frozen=True)
class Questions:
    """What is asked. tasks: of every document. own: what those in `own_column` of a document are like; None without.

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

    def most_tokens(self, max_new_tokens: int) -> int:
        """That the outputs of a document can have together, of its own questions one; max_new_tokens: the job's."""
        return sum(task.max_new_tokens or max_new_tokens for task in self.every)

    def frame(self) -> dict[str, str]:
        """What stands around questions and documents: the template, the system message."""
        task = self.every[0]
        return {"template": task.template, "system": task.system}

    def prints(self) -> dict[str, str]:
        """By name, a fingerprint of what is asked and how."""
        return {task.name: task.fingerprint() for task in self.every}
