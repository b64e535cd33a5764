"""What a reasoning model thinks before it answers: switched off in the chat template, or split from the answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

THINKING = ("off", "on", "auto")
# What opens and closes thinking in the text of a model (Qwen3, DeepSeek-R1, SmolLM3; Magistral; Seed-OSS).
TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
# The harmony format of gpt-oss:
# <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>
CHANNEL, MESSAGE = "<|channel|>", "<|message|>"
HARMONY = (CHANNEL, MESSAGE, "<|start|>", "<|end|>", "<|return|>", "<|call|>")
MARKERS = frozenset([*(tag for pair in TAGS for tag in pair), *HARMONY])
# Variables of chat templates that switch thinking. gpt-oss has only more or less of it.
SWITCHES = ("enable_thinking", "thinking")
EFFORT = "reasoning_effort"


@dataclass(frozen=True)
class Answer:
    """A generated text in its two parts.

    text: what the model answers; None if it ended before it began to. reasoning: what it thought before; None if it did
    not think.
    """

    text: str | None
    reasoning: str | None = None


def template_switches(template: str, thinking: str) -> dict[str, Any]:
    """Arguments that switch thinking in a chat template, of those that its source names; none for "auto".

    thinking: one of THINKING.
    """
    if thinking == "auto":
        return {}
    wanted: Mapping[str, Any] = dict.fromkeys(SWITCHES, thinking == "on")
    if thinking == "off":
        wanted = {**wanted, EFFORT: "low"}
    return {name: value for name, value in wanted.items() if re.search(rf"\b{name}\b", template)}


def opens_thinking(prompt: str) -> bool:
    """Whether a prompt ends where the model has begun to think, as templates of models that always think do."""
    return prompt.rstrip().endswith(tuple(opening for opening, _ in TAGS))


def split_answer(pieces: Sequence[tuple[str, str]], opened: bool) -> Answer:
    """Thinking and answer of a generated text.

    pieces: (marker, the text behind it) in order; marker: a control token that is one of MARKERS, "" at the start.
    opened: the prompt has opened the thinking (opens_thinking).
    """
    if any(marker == CHANNEL for marker, _ in pieces):
        return _harmony(pieces)
    text = "".join(behind if marker in HARMONY else marker + behind for marker, behind in pieces)
    start = text.lstrip()
    for opening, closing in TAGS:
        begun = start.startswith(opening)
        if begun or (opened and closing in start):
            thought, closed, answer = start.removeprefix(opening).partition(closing)
            return Answer(answer.strip() if closed else None, thought.strip())
    return Answer(None, start.rstrip()) if opened else Answer(text)


def _harmony(pieces: Sequence[tuple[str, str]]) -> Answer:
    channel = ""
    finals: list[str] = []
    others: list[str] = []
    for marker, text in pieces:
        if marker == CHANNEL:
            words = text.split()
            channel = words[0] if words else ""
        elif marker == MESSAGE:
            (finals if channel == "final" else others).append(text.strip())
    return Answer("\n\n".join(finals) if finals else None, "\n\n".join(others) or None)
