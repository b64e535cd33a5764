"""The pieces of an output that are looked up one by one: its sentences, or the fields of a JSON answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """Characters [start, end) of an output. text: what they say. context: names of the fields that hold them."""

    start: int
    end: int
    text: str
    context: str = ""


_CLOSING = "\"'\u201d\u2019\u00bb)\\]"
# A sentence ends at a line's end; at a full stop of a script without spaces; and at another one behind which white
# space and something else than a lower-case letter come, unless it belongs to an abbreviation, initial or list number.
_END = re.compile(
    rf"[\r\n\u2028\u2029]+|(?<=[\u3002\uff01\uff1f])[{_CLOSING}\u300d\u300f]*"
    rf"|(?:[.!?\u2026\u0964\u06d4\u061f]+)[{_CLOSING}]*(?=\s)"
)
_ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:[^\W\d]|Mrs?|Ms|Drs?|Prof|St|Jr|Sr|vs|etc|cf|ca|approx|Nos?|Nr|Figs?|Eqs?|Secs?|Vols?|pp|eds?|al"
    r"|Inc|Ltd|Corp|Co|bzw|usw|(?:\w\.)+\w)\.$",
    re.IGNORECASE,
)
_LIST_NUMBER = re.compile(r"\s*[-*\u2022\u2013]?\s*\(?\d{1,3}\.")
_LIST_MARK = re.compile(r"(?:[-*\u2022\u2013]|\(?\d{1,3}[.)]|#+)\s+")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},:]|[^\s\[\]{},:"]+')
_NAME_PARTS = re.compile(r"[_\-.]+|(?<=[a-z])(?=[A-Z])")


def units_of(output: str) -> list[Unit]:
    """Sentences of an output in order; of one that is a JSON object or array the leaves, long texts by sentences."""
    begin, text = 0, output
    if output.lstrip().startswith("```") and output.rstrip().endswith("```") and "\n" in output.strip():
        begin = output.index("\n", output.index("```"))
        text = output[begin : output.rindex("```")]
    if text.lstrip()[:1] in ("{", "["):
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            pass
        else:
            return list(_leaves(text, begin))
    return list(_sentences(output))


def _sentences(text: str) -> Iterator[Unit]:
    begin = 0
    for match in _END.finditer(text):
        if match.start() < begin or not _ends_sentence(text, begin, match):
            continue
        yield from _unit(text, begin, match.end())
        begin = match.end()
    yield from _unit(text, begin, len(text))


def _ends_sentence(text: str, begin: int, match: re.Match[str]) -> bool:
    if match.group()[:1] not in (".", "!", "?", "\u2026"):
        return True
    if text[match.end() : match.end() + 8].lstrip()[:1].islower():
        return False
    before = text[max(begin, match.end() - 20) : match.end()]
    return not (match.group() == "." and (_ABBREVIATION.search(before) or _LIST_NUMBER.fullmatch(before)))


def _unit(text: str, begin: int, end: int) -> Iterator[Unit]:
    """The sentence without white space around it and a list's mark before it, if there is a word in it."""
    piece = text[begin:end]
    begin += len(piece) - len(piece.lstrip())
    mark = _LIST_MARK.match(text, begin, end)
    begin = mark.end() if mark else begin
    piece = text[begin:end].rstrip()
    if re.search(r"[^\W_]", piece):
        yield Unit(begin, begin + len(piece), piece)


def _leaves(text: str, shift: int) -> Iterator[Unit]:
    """Texts and numbers of valid JSON; `shift` characters further on than `text` has them."""
    names: list[str] = [""]
    tokens = list(_TOKEN.finditer(text))
    for place, match in enumerate(tokens):
        token = match.group()
        is_key = token[0] == '"' and place + 1 < len(tokens) and tokens[place + 1].group() == ":"
        if token in "{[":
            names.append("")
        elif token in "}]":
            names.pop()
        elif is_key:
            names[-1] = _NAME_PARTS.sub(" ", json.loads(token))
        elif token not in (",", ":", "true", "false", "null"):
            yield from _leaf(match, token, " ".join(filter(None, names)), shift)


def _leaf(match: re.Match[str], token: str, context: str, shift: int) -> Iterator[Unit]:
    if token[0] != '"':
        yield Unit(match.start() + shift, match.end() + shift, token, context)
        return
    begin, end, said = match.start() + 1 + shift, match.end() - 1 + shift, json.loads(token)
    if said == token[1:-1]:  # without escapes its places are known
        yield from (Unit(each.start + begin, each.end + begin, each.text, context) for each in _sentences(said))
    elif said.strip():
        yield Unit(begin, end, said, context)
