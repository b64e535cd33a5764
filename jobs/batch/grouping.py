"""Messages that begin alike as one document with several questions, so that the beginning is read once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeline.settings.questions import MOST_OWN

# Messages are put together for a common beginning of so many characters, which is at least half of each; while a group
# grows, its document keeps this share of what the first two had in common.
LEAST_SHARED = 1024
LEAST_SHARE = 0.8


@dataclass(frozen=True)
class Group:
    """Messages with one beginning: each is document + space + its question.

    document: ends with a word or with line breaks, to which tokens do not reach over. space: blanks behind it.
    members: which messages, as their positions. questions: the rest of each; it begins and ends with a character that
    is not white space.
    """

    document: str
    space: str
    members: tuple[int, ...]
    questions: tuple[str, ...]


def group(messages: Sequence[str]) -> list[Group]:
    """Messages in groups, each message once. messages: of two characters or more, without white space at their ends.

    A group of several shares LEAST_SHARED characters or more, and half of each message: what is long is a document
    here, and not a question. The same messages give the same groups.
    """
    order = sorted(range(len(messages)), key=lambda number: messages[number])
    common = [_common(messages[one], messages[next_]) for one, next_ in pairwise(order)]
    groups: list[Group] = []
    start = 0
    while start < len(order):
        stop, shared = _reach(messages, order, common, start)
        text, members = messages[order[start]], order[start:stop]
        end, begin = shared or _parted(text)
        questions = tuple(messages[number][begin:] for number in members)
        groups.append(Group(text[:end], text[end:begin], tuple(members), questions))
        start = stop
    return groups


def _reach(
    messages: Sequence[str], order: list[int], common: list[int], start: int
) -> tuple[int, tuple[int, int] | None]:
    """Where the group ends that begins at `start` of the order, and the seam of its messages; None if it is of one."""
    end, shared, most, reach = start + 1, None, 0, len(messages[order[start]])
    while end < len(order) and end - start < MOST_OWN:
        reach = min(reach, common[end - 1])
        seam = _common_seam([messages[number] for number in order[start : end + 1]], reach)
        next_ = common[end] if end < len(common) else 0
        # A message that has far more in common with the next one begins a group with that.
        if seam is None or seam[0] < LEAST_SHARE * max(most, next_):
            break
        end, shared, most = end + 1, seam, most or seam[0]
    return end, shared


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with in common: by halves, since Python compares slices fast."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _common_seam(messages: list[str], reach: int) -> tuple[int, int] | None:
    """The seam of messages that have `reach` characters in common; None if they share too little before one."""
    text = messages[0]
    reach = min(reach, *(len(message) - 1 for message in messages))
    if any(message[reach].isspace() for message in messages):  # the white space there is not the same in all
        reach = len(text[:reach].rstrip()) - 1
    seam = _seam(text, reach) if reach >= LEAST_SHARED else None
    return seam if seam and seam[0] >= max(LEAST_SHARED, *(len(message) / 2 for message in messages)) else None


def _seam(text: str, reach: int) -> tuple[int, int] | None:
    """Where a text parts at white space: (end of the document, begin of the question); None if it does not.

    The question begins at `reach`, which is not white space, or before: at the last paragraph, or else line, of the
    last fifth, else at the last word.
    """
    for mark in ("\n\n", "\n"):
        at = text.rfind(mark, int(LEAST_SHARE * reach), reach)
        if at >= 0 and not text[:at].isspace() and at:
            return _around(text, at)
    before = f"{text[:reach]}|".rsplit(None, 1)
    return _around(text, len(before[0])) if len(before) == 2 else None


def _around(text: str, at: int) -> tuple[int, int]:
    """The seam at the white space that `at` is in. Line breaks belong to the document: tokens may join them to it."""
    end = len(text[:at].rstrip())
    begin = next(number for number in range(at, len(text)) if not text[number].isspace())
    return max(end, text.rfind("\n", end, begin) + 1), begin


def _parted(text: str) -> tuple[int, int]:
    """The seam of a message by itself; of a single word, and where a language has no white space, between signs."""
    seam = _seam(text, len(text) - 1)
    if seam:
        return seam
    first = len(text) - len(text.lstrip())
    borders = [match.start() for match in re.finditer(r"\b", text) if first < match.start() < len(text)]
    at = borders[-1] if borders else len(text) - 1
    return at, at
