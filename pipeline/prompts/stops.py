"""Stop strings: texts that end an output before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.prompts.tokens import Tokens

# The finish_reason of an output that one has ended.
STOP_STRING = "stop_string"
# A character takes at most so many tokens, one for each of its bytes.
TOKENS_PER_CHARACTER = 4
# Of the tokens at the end that are looked at first, those that give no text.
CONTROL_TOKENS = 8


def before_stop(text: str, stops: Sequence[str]) -> str | None:
    """The text before the first of the stop strings; None if it has none of them."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else None


@dataclass(frozen=True)
class StopStrings:
    """Watches an output grow. Only the answer counts: what a model thinks before it may hold a stop string.

    opened: the prompt has opened the thinking.
    """

    stops: tuple[str, ...]
    tokens: Tokens
    opened: bool

    def __call__(self, ids: list[int]) -> bool:
        """Whether generated tokens, of which the last is new, hold a stop string in their answer.

        It depends on them alone. One that many control tokens run through may be missed here; the output ends before
        it all the same (before_stop).
        """
        window = TOKENS_PER_CHARACTER * max(map(len, self.stops)) + CONTROL_TOKENS
        if before_stop(self.tokens.decode(ids[-window:]), self.stops) is None:
            return False
        answer = self.tokens.answer(ids, self.opened).text
        return answer is not None and before_stop(answer, self.stops) is not None
