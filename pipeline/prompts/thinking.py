"""What a reasoning model thinks before it answers: switched off in the chat template, or split from the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

THINKING = ("off", "on", "auto")
# What opens and closes thinking in the text of a model (Qwen3, DeepSeek-R1, SmolLM3; Magistral; Seed-OSS).
TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
# The harmony format of gpt-oss:
# <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>
CHANNEL, MESSAGE = "<|channel|>", "<|message|>"
HARMONY = frozenset([CHANNEL, MESSAGE, "<|start|>", "<|end|>", "<|return|>", "<|call|>"])
TAG_MARKERS = frozenset(tag for pair in TAGS for tag in pair)
# Variables of chat templates that switch thinking. gpt-oss has only more or less of it; other templates with its
# variable take other values.
SWITCHES = ("enable_thinking", "thinking")
EFFORT = "reasoning_effort"


@dataclass(frozen=True)
class Answer:
    """A generated text in its two parts.

    text: what the model answers; None if it thought, or began to, and gave no answer. reasoning: what it thought before
    its answer; None if nothing.
    """

    text: str | None
    reasoning: str | None = None


def template_switches(template: str, thinking: str) -> dict[str, Any]:
    """Arguments that switch thinking in a chat template, of those that its source names; none for "auto".

    thinking: one of THINKING.
    """
    if thinking == "auto":
        return {}
    wanted: dict[str, Any] = dict.fromkeys(SWITCHES, thinking == "on")
    if thinking == "off" and CHANNEL in template:
        wanted[EFFORT] = "low"
    return {name: value for name, value in wanted.items() if re.search(rf"\b{name}\b", template)}


def may_think(template: str) -> bool:
    """Whether a chat template knows of thinking: it switches it, or names what marks it."""
    return bool(template_switches(template, "on")) or any(mark in template for mark in (*TAG_MARKERS, CHANNEL))


def opens_thinking(prompt: str) -> bool:
    """Whether a prompt ends where the model has begun to think, as templates of models that always think do."""
    return prompt.rstrip().endswith(tuple(opening for opening, _ in TAGS))


def markers_of(control: Sequence[str]) -> frozenset[str]:
    """The control tokens at which a generated text is cut into pieces. control: those that it holds, in any order."""
    return HARMONY if CHANNEL in control else TAG_MARKERS


def split_answer(pieces: Sequence[tuple[str, str]], opened: bool) -> Answer | None:
    """Thinking and answer of a generated text; None if it has no thinking, so that all of it is the answer.

    pieces: (marker, the text behind it) in order; marker: a control token that is one of markers_of(), "" at the start.
    opened: the prompt has opened the thinking (opens_thinking).
    """
    if any(marker == CHANNEL for marker, _ in pieces):
        return _harmony(pieces)
    text = "".join(marker + behind for marker, behind in pieces).strip()
    for opening, closing in TAGS:
        if text.startswith(opening) or (opened and closing in text):
            thought, _, answer = text.removeprefix(opening).partition(closing)
            return Answer(answer.strip() or None, thought.strip() or None)
    return Answer(None, text or None) if opened else None


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
    return Answer(*("\n\n".join(filter(None, texts)) or None for texts in (finals, others)))
