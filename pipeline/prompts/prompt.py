"""From a task and a document to token ids. Document text is data: nothing in it becomes a control token."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np

from pipeline.errors import DocumentError, JobError
from pipeline.prompts.task import COLUMN_MARK, MARK, QUESTION_MARK, Task, template_columns, user_message
from pipeline.prompts.thinking import opens_thinking
from pipeline.prompts.tokens import Tokens


@dataclass(frozen=True)
class Prompt:
    """A document's prompt: int32 [tokens] each. prefix: up to the document's end, the same for other questions of it.

    tail: the question; at least a token. truncated_tokens: how many of the document's were cut. unread: which
    characters [start, end) of its text those are, give or take those of a token; None if none were cut.
    """

    prefix: np.ndarray
    tail: np.ndarray
    truncated_tokens: int = 0
    unread: tuple[int, int] | None = None

    @property
    def ids(self) -> np.ndarray:
        """The whole prompt, int32 [tokens]."""
        return np.concatenate([self.prefix, self.tail])


@dataclass(frozen=True)
class _Run:
    """A stretch of the rendered prompt. data: it holds marks, and is encoded with control tokens switched off."""

    text: str
    data: bool


@dataclass(frozen=True)
class _Frame:
    """The rendered prompt around the document: runs before, `left` and `gap` in one run with it, runs behind."""

    before: tuple[_Run, ...]
    left: str
    gap: str
    after: tuple[_Run, ...]


class PromptBuilder:
    """Builds prompts of one task for one model.

    The chat template is rendered once, with marks in the place of data: of the document, of columns, of a question that
    the document brought along. The stretch of plain text around a mark, from control token to control token, is
    tokenised together with the data and with control tokens switched off; the rest is tokenised as the template means
    it. So special strings inside the data are text.

    What ends with the document and the line breaks behind it (the prefix) is tokenised apart from the rest (the tail):
    it is the same whatever is asked. Where the border is behind line breaks, or no token reaches across it, the ids are
    those of tokenising the rendered whole.

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
        self._tokens = tokens
        self._task = task
        self._args = dict(template_args or {})
        self._today = today or date.today()
        self._thinking = thinking
        self.opens_thinking = False
        self._columns = template_columns(task.template)
        marks = [MARK, QUESTION_MARK, *(COLUMN_MARK.format(number) for number in range(len(self._columns)))]
        self._marks = re.compile("|".join(marks))
        asked = (QUESTION_MARK, QUESTION_MARK) if task.own else (task.question, task.merge_question)
        self._frames = {merging: self._frame(asked[merging]) for merging in (False, True)}

    def check_answers(self) -> None:
        """Raise JobError if the model would think where an answer by --schema begins."""
        if self.opens_thinking or self._tokens.speaks_in_channels:
            raise JobError(
                "--schema: this model always thinks before it answers, and an answer follows the schema from its first "
                "token on; use a model whose chat template can switch thinking off, or leave --schema out"
            )

    def _frame(self, question: str) -> _Frame:
        message = user_message(self._task.template, question)
        rendered = self._tokens.render_chat(message, self._args, self._today, self._thinking, self._task.system)
        before, mark, after = rendered.partition(MARK)
        if not mark or MARK in after:
            raise JobError(
                "the model's chat template does not place the user message once and unchanged; give another model"
            )
        self.opens_thinking = self._tokens.has_chat_template and opens_thinking(after)
        runs = self._runs(rendered)
        place = next(number for number, run in enumerate(runs) if MARK in run.text)
        left, _, right = runs[place].text.partition(MARK)
        blank = right[: len(right) - len(right.lstrip())]
        gap = blank[: blank.rfind("\n") + 1]
        rest = _Run(right[len(gap) :], data=True)
        return _Frame(tuple(runs[:place]), left, gap, (rest, *runs[place + 1 :]))

    def _runs(self, text: str) -> list[_Run]:
        """The stretches of a rendered prompt, those of the template and those of data in turn."""
        runs = []
        while match := self._marks.search(text):
            cut = self._tokens.last_control(text[: match.start()])
            end = match.end() + self._tokens.first_control(text[match.end() :])
            runs += [_Run(text[:cut], data=False), _Run(text[cut:end], data=True)]
            text = text[end:]
        return [*runs, _Run(text, data=False)]

    def _filled(self, text: str, columns: Mapping[str, str]) -> str:
        """`text` with data in the place of its marks, but the document's."""
        values = {COLUMN_MARK.format(number): columns.get(name, "") for number, name in enumerate(self._columns)}
        values |= {QUESTION_MARK: self._task.question}
        return self._marks.sub(lambda match: values.get(match.group(), match.group()), text)

    def _tail(self, frame: _Frame, columns: Mapping[str, str]) -> np.ndarray:
        rest, *runs = frame.after
        parts = [self._tokens.encode_behind(self._filled(rest.text, columns))]
        return np.concatenate([*parts, *(self._encoded(run, columns) for run in runs)])

    def _encoded(self, run: _Run, columns: Mapping[str, str], starts: bool = False) -> np.ndarray:
        if run.data:
            return self._tokens.encode_data(self._filled(run.text, columns))
        return self._tokens.encode_template(run.text, starts=starts)

    def _head(self, frame: _Frame, columns: Mapping[str, str]) -> np.ndarray:
        """What stands before the run of the document; int32 [tokens]."""
        parts = (self._encoded(run, columns, starts=not number) for number, run in enumerate(frame.before))
        return np.concatenate([np.empty(0, np.int32), *parts])

    def build(
        self,
        text: str,
        limit: int,
        *,
        truncate: bool = False,
        merging: bool = False,
        columns: Mapping[str, str] | None = None,
        step: int = 1,
        encoded: dict[tuple[str, str], np.ndarray] | None = None,
    ) -> Prompt:
        """The prompt for a document.

        limit: most prompt tokens. A longer one is cut in the document's middle if `truncate`, else DocumentError with
        status too_long is raised. merging: ask to merge the outputs of parts (the text) instead. columns: texts of the
        columns that the template places. step: a cut leaves a whole number of so many tokens up to the document's end,
        so that questions of like length leave the same. encoded: what was encoded of this text for other questions.
        """
        frame, columns = self._frames[merging], columns or {}
        tail = self._tail(frame, columns)
        head = self._head(frame, columns)
        left = self._filled(frame.left, columns)
        encoded = {} if encoded is None else encoded
        if (left, frame.gap) not in encoded:
            encoded[left, frame.gap] = self._tokens.encode_data(left + text + frame.gap)
        body = encoded[left, frame.gap]
        total = len(head) + len(body) + len(tail)
        if total <= limit:
            return _prompt([head, body], tail)
        if not truncate:
            raise DocumentError(
                f"the prompt has {total} tokens, the limit is {limit} (context less max_new_tokens)", "too_long", total
            )
        first, last = self._tokens.span(left, frame.gap, body)
        excess = len(head) + len(body) - _whole(limit - len(tail), step)
        keep = (last - first) - excess
        if keep < 1:
            raise DocumentError(
                f"question and template alone have {total - last + first} tokens, the limit is {limit}", "too_long"
            )
        cut = first + (keep + 1) // 2
        kept = [self._tokens.decode(ids.tolist()) for ids in (body[first:cut], body[cut + excess : last])]
        unread = min(len(kept[0]), len(text)), max(len(text) - len(kept[1]), min(len(kept[0]), len(text)))
        return _prompt([head, body[:cut], body[cut + excess :]], tail, excess, unread)

    def room(self, limit: int, *, merging: bool, columns: Mapping[str, str], step: int) -> Hashable:
        """What split() depends on besides the text: the same for questions that leave a document in the same parts."""
        frame = self._frames[merging]
        tokens = _whole(limit - len(self._tail(frame, columns)), step)
        return tokens, self._head(frame, columns).tobytes(), self._filled(frame.left, columns), frame.gap

    def _overhead(self, merging: bool, columns: Mapping[str, str]) -> tuple[int, int]:
        """Prompt tokens besides the document's: of the prefix, of the tail."""
        frame = self._frames[merging]
        around = self._tokens.encode_data(self._filled(frame.left, columns) + frame.gap)
        return len(self._head(frame, columns)) + len(around), len(self._tail(frame, columns))

    def split(
        self, text: str, limit: int, *, merging: bool = False, columns: Mapping[str, str] | None = None, step: int = 1
    ) -> list[str]:
        """Consecutive parts of `text` whose prompts have at most `limit` tokens each.

        Parts end at a paragraph, line, sentence or word where there is one in their last fifth. step: as for build().
        Raises DocumentError (too_long) if not even a few tokens fit.
        """
        columns = columns or {}
        prefix, tail = self._overhead(merging, columns)
        most = _whole(limit - tail, step)  # tokens of a prefix
        room = most - prefix - 8  # a part's first and last word may tokenise differently than in the whole
        if room < 16:
            raise DocumentError(f"question and template leave {max(room, 0)} of {limit} tokens for a part", "too_long")
        parts: list[str] = []
        rest = text
        while rest:
            end = self._tokens.prefix_chars(rest, room)
            if end < len(rest):
                end = _break(rest, end)
            part = rest[:end]
            while len(part) > 1 and not self._fits(part, most + tail, merging, columns):
                part = part[: _break(part, len(part) * 9 // 10)]
            parts.append(part)
            rest = rest[len(part) :]
        return parts

    def _fits(self, part: str, limit: int, merging: bool, columns: Mapping[str, str]) -> bool:
        try:
            self.build(part, limit, merging=merging, columns=columns)
        except DocumentError:
            return False
        return True


def _prompt(
    prefix: list[np.ndarray], tail: np.ndarray, truncated: int = 0, unread: tuple[int, int] | None = None
) -> Prompt:
    ids = np.concatenate(prefix)
    if not len(tail) and len(ids) > 1:  # nothing is asked: the last token of the document is what is answered
        ids, tail = ids[:-1], ids[-1:]
    return Prompt(ids, tail, truncated, unread)


def _whole(tokens: int, step: int) -> int:
    """The largest multiple of `step` in `tokens`."""
    return tokens // step * step


def _break(text: str, end: int) -> int:
    """A good place to cut at or before `end`, in the last fifth of it; `end` itself if there is none."""
    for mark in ("\n\n", "\n", ". ", " "):
        at = text.rfind(mark, end * 4 // 5, end)
        if at >= 0:
            return at + len(mark)
    return max(end, 1)
