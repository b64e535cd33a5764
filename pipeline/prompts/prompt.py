"""From a task and a document to token ids. Document text is data: nothing in it becomes a control token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.errors import DocumentError, JobError, one_line
from pipeline.prompts.thinking import opens_thinking
from pipeline.prompts.tokens import Tokens

# What stands for the document while templates are rendered: ordinary letters, so that no template strips or escapes it.
MARK = "STEMLINEDOCUMENTSTANDSHERE"

DEFAULT_TEMPLATE = "{{ document }}\n\n{{ question }}"
DEFAULT_QUESTIONS = {
    "summarize": "Summarize the document above. Cover its main points, and name the important facts and figures."
}
# Merges what the default question gave for each part; a question of the user's own is asked again about the answers.
MERGE_QUESTION = "The texts above summarize consecutive parts of one document. Merge them; keep the important facts."


@dataclass(frozen=True)
class Task:
    """What to ask about each document. template: Jinja source of the user message."""

    question: str
    template: str
    merge_question: str

    def fingerprint(self) -> str:
        """12 hex digits over question and template."""
        return hashlib.sha256(json.dumps([self.question, self.template, self.merge_question]).encode()).hexdigest()[:12]


def make_task(name: str, question: str | None, prompt_file: str | None) -> Task:
    """The task of a job. Raises JobError if the prompt file cannot be read or does not place the document."""
    template = DEFAULT_TEMPLATE
    if prompt_file:
        try:
            template = Path(prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise JobError(f"--prompt-file {prompt_file}: cannot be read: {one_line(error)}") from None
    asked = question if question is not None else DEFAULT_QUESTIONS.get(name, "")
    task = Task(asked, template, asked if question is not None or asked == "" else MERGE_QUESTION)
    user_message(task.template, asked)
    return task


def user_message(template: str, question: str) -> str:
    """The rendered user message with MARK where the document goes. The template runs in a sandbox. Raises JobError."""
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False)
    try:
        text = environment.from_string(template).render(document=MARK, question=question)
    except TemplateError as error:
        raise JobError(
            f"the prompt template is not valid: {one_line(error)}; it may use document and question"
        ) from None
    except Exception as error:  # a template can raise anything that Python's operators raise
        raise JobError(f"the prompt template failed: {type(error).__name__}: {one_line(error)}") from None
    if text.count(MARK) != 1:
        raise JobError(
            "the prompt template must hold {{ document }} once, unchanged by filters; "
            f"it came out {text.count(MARK)} times"
        )
    return text


@dataclass(frozen=True)
class Prompt:
    """A document's prompt. ids: int32 [tokens]; truncated_tokens: how many of the document's were cut.

    unread: which characters [start, end) of its text those are, give or take those of a token; None if none were cut.
    """

    ids: np.ndarray
    truncated_tokens: int = 0
    unread: tuple[int, int] | None = None


class PromptBuilder:
    """Builds prompts of one task for one model.

    The chat template is rendered once, with a mark in the document's place. The stretch of plain text around the mark,
    from control token to control token, is tokenised together with the document and with control tokens switched off;
    the rest is tokenised as the template means it. That gives the same ids as tokenising the rendered whole, except
    that special strings inside the document are text.

    today: the date for templates that print one; None asks the clock, once. thinking: off, on or auto, where the
    template can switch it. opens_thinking: prompts end where the model has begun to think.
    """

    def __init__(
        self,
        tokens: Tokens,
        task: Task,
        template_args: Mapping[str, Any] | None = None,
        today: date | None = None,
        thinking: str = "off",
    ) -> None:
        self.tokens = self._tokens = tokens
        self._task = task
        self._args = dict(template_args or {})
        self._today = today or date.today()
        self._thinking = thinking
        self.opens_thinking = False
        self._frames = {False: self._frame(task.question), True: self._frame(task.merge_question)}

    def check_answers(self) -> None:
        """Raise JobError if the model would think where an answer by --schema begins."""
        if self.opens_thinking or self._tokens.speaks_in_channels:
            raise JobError(
                "--schema: this model always thinks before it answers, and an answer follows the schema from its first "
                "token on; use a model whose chat template can switch thinking off, or leave --schema out"
            )

    def _frame(self, question: str) -> tuple[np.ndarray, str, str, np.ndarray]:
        message = user_message(self._task.template, question)
        rendered = self._tokens.render_chat(message, self._args, self._today, self._thinking)
        before, mark, after = rendered.partition(MARK)
        if not mark or MARK in after:
            raise JobError(
                "the model's chat template does not place the user message once and unchanged; give another model"
            )
        self.opens_thinking = self._tokens.has_chat_template and opens_thinking(after)
        cut = self._tokens.last_control(before)
        end = self._tokens.first_control(after)
        head = self._tokens.encode_template(before[:cut], starts=True)
        tail = self._tokens.encode_template(after[end:], starts=False)
        return head, before[cut:], after[:end], tail

    def build(self, text: str, limit: int, *, truncate: bool = False, merging: bool = False) -> Prompt:
        """The prompt for a document.

        limit: most prompt tokens. A longer one is cut in the document's middle if `truncate`, else DocumentError with
        status too_long is raised. merging: ask to merge the outputs of parts (the text) instead.
        """
        head, left, right, tail = self._frames[merging]
        body = self._tokens.encode_data(left + text + right)
        total = len(head) + len(body) + len(tail)
        if total <= limit:
            return Prompt(np.concatenate([head, body, tail]))
        if not truncate:
            raise DocumentError(
                f"the prompt has {total} tokens, the limit is {limit} (context less max_new_tokens)", "too_long", total
            )
        first, last = self._tokens.span(left, right, body)
        excess = total - limit
        keep = (last - first) - excess
        if keep < 1:
            raise DocumentError(
                f"question and template alone have {total - last + first} tokens, the limit is {limit}", "too_long"
            )
        cut = first + (keep + 1) // 2
        kept = [self._tokens.decode(ids.tolist()) for ids in (body[first:cut], body[cut + excess : last])]
        unread = min(len(kept[0]), len(text)), max(len(text) - len(kept[1]), min(len(kept[0]), len(text)))
        return Prompt(np.concatenate([head, body[:cut], body[cut + excess :], tail]), excess, unread)

    def overhead(self, *, merging: bool = False) -> int:
        """Prompt tokens besides the document's."""
        head, left, right, tail = self._frames[merging]
        return len(head) + len(self._tokens.encode_data(left + right)) + len(tail)

    def split(self, text: str, limit: int) -> list[str]:
        """Consecutive parts of `text` whose prompts have at most `limit` tokens each.

        Parts end at a paragraph, line, sentence or word where there is one in their last fifth. Raises DocumentError
        (too_long) if not even a few tokens fit.
        """
        room = limit - self.overhead() - 8  # a part's first and last word may tokenise differently than in the whole
        if room < 16:
            raise DocumentError(f"question and template leave {max(room, 0)} of {limit} tokens for a part", "too_long")
        parts: list[str] = []
        rest = text
        while rest:
            end = self._tokens.prefix_chars(rest, room)
            if end < len(rest):
                end = _break(rest, end)
            part = rest[:end]
            while len(part) > 1 and not self._fits(part, limit):
                part = part[: _break(part, len(part) * 9 // 10)]
            parts.append(part)
            rest = rest[len(part) :]
        return parts

    def _fits(self, part: str, limit: int) -> bool:
        try:
            self.build(part, limit)
        except DocumentError:
            return False
        return True


def _break(text: str, end: int) -> int:
    """A good place to cut at or before `end`, in the last fifth of it; `end` itself if there is none."""
    for mark in ("\n\n", "\n", ". ", " "):
        at = text.rfind(mark, end * 4 // 5, end)
        if at >= 0:
            return at + len(mark)
    return max(end, 1)
