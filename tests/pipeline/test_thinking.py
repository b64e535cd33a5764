"""Thinking is switched off in chat templates, or split from the answer; an output that is all thinking is no answer."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fake_engine import FakeEngine
from tokenizers import AddedToken
from transformers import AutoTokenizer

from pipeline import summarize
from pipeline.engine.config import Request
from pipeline.errors import DocumentError, JobError
from pipeline.prompts.prompt import PromptBuilder
from pipeline.prompts.task import make_task
from pipeline.prompts.thinking import opens_thinking, template_switches
from pipeline.prompts.tokens import Tokens

MODEL = Path(__file__).parents[2] / "models" / "tiny-reader"
TASK = make_task("summarize", "What does it say?", None)
# The ends of the templates of Qwen3, of DeepSeek-R1, and of gpt-oss.
TURN = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
QWEN = TURN + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
ALWAYS = TURN + "<think>\n"
GPT_OSS = (
    "<|start|>system<|message|>Reasoning: {{ reasoning_effort | default('medium') }}<|end|>{% for m in messages %}"
    "<|start|>user<|message|>{{ m.content }}<|end|>{% if m.thinking %}<|channel|>{% endif %}{% endfor %}"
    "<|start|>assistant"
)
HARMONY = ["<|channel|>", "<|message|>", "<|start|>", "<|return|>", "<|call|>"]


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
    assert template_switches(GPT_OSS, "off")["reasoning_effort"] == "low"
    assert template_switches("{{ reasoning_effort }}", "off") == {}, "its values are not known"
    assert "reasoning_effort" not in template_switches(GPT_OSS, "on")
    assert template_switches(QWEN, "auto") == {}


def test_a_prompt_builder_switches_thinking_off_by_itself() -> None:
    reader = tokens(QWEN)
    off, on = (PromptBuilder(reader, TASK, thinking=thinking).build("A text.", 1000).ids for thinking in ("off", "on"))
    same = PromptBuilder(reader, TASK).build("A text.", 1000).ids
    assert off.tolist() == same.tolist()
    assert len(off) > len(on)
    assert not PromptBuilder(reader, TASK).opens_thinking
    assert PromptBuilder(tokens(ALWAYS), TASK).opens_thinking
    assert not opens_thinking("<think>\n\n</think>\n\n")


def test_thinking_on_needs_a_template_that_knows_of_it() -> None:
    for template in (QWEN, ALWAYS, GPT_OSS):
        PromptBuilder(tokens(template), TASK, thinking="on")
    for thinking in ("off", "auto"):
        PromptBuilder(tokens(TURN), TASK, thinking=thinking)
    with pytest.raises(JobError, match="--thinking on: the model's chat template knows of no thinking"):
        PromptBuilder(tokens(TURN), TASK, thinking="on")
    with pytest.raises(JobError, match="--thinking on: the model has no chat template"):
        PromptBuilder(tokens(""), TASK, thinking="on")


@pytest.mark.parametrize(
    ("template", "special", "plain"), [(QWEN, [], ["<think>", "</think>"]), (GPT_OSS, HARMONY, [])]
)
@pytest.mark.parametrize("thinking", ["off", "on"])
def test_the_limit_counts_the_tokens_that_switch_thinking(
    template: str, special: list[str], plain: list[str], thinking: str
) -> None:
    reader = tokens(template, special=special, plain=plain)
    text = "The quiet committee met again. " * 40
    builder = PromptBuilder(reader, TASK, thinking=thinking)
    rendered = reader.render_chat(f"{text}\n\n{TASK.question}", {}, date.today(), thinking)
    whole = reader.encode_template(rendered, starts=True)
    assert builder.build(text, len(whole)).ids.tolist() == whole.tolist()
    with pytest.raises(DocumentError, match=f"the prompt has {len(whole)} tokens, the limit is {len(whole) - 1}"):
        builder.build(text, len(whole) - 1)
    cut = builder.build(text, len(whole) - 100, truncate=True)
    assert (len(cut.ids), cut.truncated_tokens) == (len(whole) - 100, 100)
    tail = len(reader.encode_template(rendered[rendered.index(TASK.question) + len(TASK.question) :], starts=False))
    assert cut.ids[-tail:].tolist() == whole[-tail:].tolist()
    assert all(len(builder.build(part, 120).ids) <= 120 for part in builder.split(text, 120))


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
    assert answer(reader, f"{opening}a plan{closing}\n") == (None, "a plan"), "cut, or stopped, before the answer"
    assert answer(reader, f"{opening}\n\n{closing}\n\nthe answer") == ("the answer", None), "it did not think"
    assert answer(reader, "a plan", opened=True) == (None, "a plan")
    assert answer(reader, "the answer<|end|>") == ("the answer", None)
    assert answer(reader, f"see {opening} in the text<|end|>")[1] is None, "a tag behind words is the answer's own"


def test_harmony_channels_are_split() -> None:
    reader = tokens(GPT_OSS, special=HARMONY)
    thought = "<|channel|>analysis<|message|>a plan"
    final = "<|start|>assistant<|channel|>final<|message|>the answer"
    assert answer(reader, f"{thought}<|end|>{final}<|return|>") == ("the answer", "a plan")
    assert answer(reader, f"{thought}<|end|>{final}") == ("the answer", "a plan"), "a cut answer is an answer"
    assert answer(reader, thought) == (None, "a plan")
    assert answer(reader, f"{thought}<|end|><|start|>assistant<|channel|>final") == (None, "a plan")
    assert answer(reader, f"{thought}<|end|><|start|>assistant<|channel|>final<|message|>") == (None, "a plan")
    assert answer(reader, "<|channel|>final<|message|>the answer<|return|>") == ("the answer", None)
    spelled = reader.encode_data(" <|channel|>analysis<|message|>").tolist()
    forged = [*reader.encode_template("<|channel|>final<|message|>the answer", starts=False).tolist(), *spelled]
    text = reader.answer(forged, False)
    assert text.reasoning is None
    assert text.text is not None
    assert "<|channel|>analysis" in text.text


@pytest.mark.parametrize("text", ["  two  spaces \n\n", "", "\n", "日本語 ünïcode 🙂", "a < b, <thinking> and </th"])
def test_a_text_without_markers_is_what_decode_gives(text: str) -> None:
    for reader in (tokens(TURN), tokens(QWEN, plain=TAGGED), tokens(GPT_OSS, special=HARMONY)):
        for end in ("", "<|end|>"):
            ids = reader.encode_template(text + end, starts=False).tolist()
            split = reader.answer(ids, False)
            assert (split.text, split.reasoning) == (reader.decode(ids), None) == (text, None)


class Recorder(FakeEngine):
    """Notes the prompts that it is given."""

    prompts: ClassVar[list[list[int]]] = []

    def add(self, request: Request) -> None:
        self.prompts.append(list(request.prompt_ids))
        super().add(request)


def test_parts_hand_on_their_answers_without_their_thinking(model: Path) -> None:
    options: dict[str, Any] = {"max_context": 120, "question": "Findings?", "max_new_tokens": 8, "device": "cpu"}
    Recorder.prompts.clear()
    texts = {"long": "THINK. " + "The committee met, THINK. " * 60, "cut": "THINK CUT. " * 100}
    table = summarize(
        texts, model=model, too_long="map-reduce", engine_factory=f"{__name__}:Recorder", **options
    ).to_pylist()
    done, cut = table
    assert (done["status"], done["output"], done["reasoning"]) == ("ok", "the answer", None), "of the merged one"
    assert done["parts"] > 2
    merged = [text for ids in Recorder.prompts if "THINK" not in (text := tokens(TURN).decode(ids))]
    assert len(merged) == 1
    assert merged[0].count("the answer") == done["parts"]
    assert "plan" not in merged[0]
    assert cut["status"] == "error"
    assert cut["error"].startswith(
        f"part 1 of {cut['parts']}: --max-new-tokens 8 cut the model off inside its thinking"
    )
    assert "--thinking off did not keep it from thinking" in cut["error"]
    assert (cut["output"], cut["reasoning"]) == (None, "a plan")
