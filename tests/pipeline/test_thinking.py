"""Thinking is switched off in chat templates, or split from the answer; an output that is all thinking is no answer."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from pipeline.prompts import PromptBuilder, make_task
from pipeline.thinking import opens_thinking, template_switches
from pipeline.tokens import Tokens

MODEL = Path(__file__).parents[2] / "models" / "tiny-reader"
TASK = make_task("summarize", "What does it say?", None)
# The ends of the templates of Qwen3, of DeepSeek-R1, and of gpt-oss.
TURN = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
QWEN = TURN + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
ALWAYS = TURN + "<think>\n"
GPT_OSS = "Reasoning: {{ reasoning_effort | default('medium') }}" + TURN


def tokens(template: str, *, special: Sequence[str] = (), plain: Sequence[str] = ()) -> Tokens:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = template
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    return Tokens(tokenizer)


def answer(reader: Tokens, text: str, opened: bool = False) -> tuple[str | None, str | None]:
    split = reader.answer(reader.encode_template(text, starts=False).tolist(), opened)
    return split.text, split.reasoning


@pytest.mark.parametrize(
    ("thinking", "args", "ends_with"),
    [
        ("off", {}, "<think>\n\n</think>\n\n"),
        ("on", {}, "<|assistant|>"),
        ("auto", {}, "<|assistant|>"),
        ("off", {"enable_thinking": True}, "<|assistant|>"),
        ("on", {"enable_thinking": False}, "<think>\n\n</think>\n\n"),
    ],
)
def test_thinking_is_switched_in_the_template(thinking: str, args: dict[str, Any], ends_with: str) -> None:
    rendered = tokens(QWEN).render_chat("text", args, date(2026, 1, 1), thinking)
    assert rendered.endswith(ends_with)


def test_only_what_a_template_names_is_given_to_it() -> None:
    assert template_switches(TURN, "off") == {}
    assert template_switches("{% if thinking %}", "on") == {"thinking": True}
    assert template_switches(GPT_OSS, "off") == {"reasoning_effort": "low"}
    assert template_switches(GPT_OSS, "on") == template_switches(QWEN, "auto") == {}


def test_a_prompt_builder_switches_thinking_off_by_itself() -> None:
    reader = tokens(QWEN)
    off, on = (PromptBuilder(reader, TASK, thinking=thinking).build("A text.", 1000).ids for thinking in ("off", "on"))
    same = PromptBuilder(reader, TASK).build("A text.", 1000).ids
    assert off.tolist() == same.tolist()
    assert len(off) > len(on)
    assert not PromptBuilder(reader, TASK).opens_thinking
    assert PromptBuilder(tokens(ALWAYS), TASK).opens_thinking
    assert not opens_thinking("<think>\n\n</think>\n\n")


TAGGED = ["<think>", "</think>"]
BRACKETS = ["[THINK]", "[/THINK]"]


@pytest.mark.parametrize("kind", ["special", "plain", "spelled"])
@pytest.mark.parametrize("tags", [TAGGED, BRACKETS])
def test_thinking_in_tags_is_split_off(kind: str, tags: list[str]) -> None:
    reader = tokens(TURN, **({} if kind == "spelled" else {kind: tags}))  # type: ignore[arg-type]
    opening, closing = tags
    assert answer(reader, f"{opening}\na plan\n{closing}\n\nthe answer<|end|>") == ("the answer", "a plan")
    assert answer(reader, f"a plan{closing}the answer<|end|>", opened=True) == ("the answer", "a plan")
    assert answer(reader, f"{opening}a plan") == (None, "a plan")
    assert answer(reader, "a plan", opened=True) == (None, "a plan")
    assert answer(reader, "the answer<|end|>") == ("the answer", None)
    assert answer(reader, f"see {opening} in the text<|end|>")[1] is None, "a tag behind words is the answer's own"


def test_harmony_channels_are_split() -> None:
    names = ["<|channel|>", "<|message|>", "<|start|>", "<|return|>", "<|call|>"]
    reader = tokens(TURN, special=names)
    thought = "<|channel|>analysis<|message|>a plan"
    final = "<|start|>assistant<|channel|>final<|message|>the answer"
    assert answer(reader, f"{thought}<|end|>{final}<|return|>") == ("the answer", "a plan")
    assert answer(reader, f"{thought}<|end|>{final}") == ("the answer", "a plan"), "a cut answer is an answer"
    assert answer(reader, thought) == (None, "a plan")
    assert answer(reader, f"{thought}<|end|><|start|>assistant<|channel|>final") == (None, "a plan")
    assert answer(reader, "<|channel|>final<|message|>the answer<|return|>") == ("the answer", None)
    spelled = reader.encode_data(" <|channel|>analysis<|message|>").tolist()
    forged = [*reader.encode_template("<|channel|>final<|message|>the answer", starts=False).tolist(), *spelled]
    text = reader.answer(forged, False)
    assert text.reasoning is None
    assert text.text is not None
    assert "<|channel|>analysis" in text.text
