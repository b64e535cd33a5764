"""Stop strings: an output ends before them, at the same token whatever else runs, and its row says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_thinking import TAGGED, TURN, tokens

from pipeline import summarize
from pipeline.errors import JobError
from pipeline.prompts.stops import StopStrings, before_stop
from pipeline.settings.config import JobConfig
from pipeline.settings.questions import answers_of, questions_of

TEXT = (
    "The committee met again. Key finding: The harbour lost 14 boats. It rained. Key finding: Nobody reviewed the "
    "storm. The train was late."
)
SCHEMA = {"type": "integer"}


def test_the_text_before_the_first_of_several() -> None:
    assert before_stop("one\ntwo###three", ("###", "\n")) == "one"
    assert before_stop("###", ("###",)) == ""
    assert before_stop("one", ("###", "\n")) is None
    assert before_stop("one", ()) is None


@pytest.mark.parametrize("stop", ["###", "\n", " storm and", "日本", "é", "a" * 60])
def test_it_ends_at_the_token_that_completes_a_stop_string(stop: str) -> None:
    reader = tokens(TURN)
    ids = reader.encode_data(f"the 語 quiet committee met {stop} again").tolist()
    watch = StopStrings(("never", stop), reader, False)
    reached = [watch(ids[: end + 1]) for end in range(len(ids))]
    assert reached == [stop in reader.decode(ids[: end + 1]) for end in range(len(ids))]
    assert any(reached)
    assert not reached[0]


@pytest.mark.parametrize("opened", [False, True])
def test_thinking_may_hold_stop_strings(opened: bool) -> None:
    reader = tokens(TURN, plain=TAGGED)
    thought = f"{'' if opened else TAGGED[0]}a plan\n\nand more{TAGGED[1]}\n\n"
    ids = reader.encode_template(f"{thought}the answer\n\nand more", starts=False).tolist()
    watch = StopStrings(("\n\n",), reader, opened)
    first = next(end for end in range(1, len(ids) + 1) if watch(ids[:end]))
    assert reader.decode(ids[:first]).endswith("the answer\n\nand")


@pytest.mark.parametrize("lookup", ["off", "auto"])
def test_rows_say_what_ended_the_output(model: Path, lookup: str) -> None:
    options: dict[str, Any] = {
        "model": model, "question": "List the key findings in order.", "max_new_tokens": 40, "device": "cpu",
        "prompt_lookup": lookup,
    }  # fmt: skip
    (whole,) = summarize([TEXT], **options).to_pylist()
    assert whole["finish_reason"] == "stop"
    assert whole["output"].count("\n") == 1
    stopped, other = summarize([TEXT, "It rained."], stop=["2.", "\n"], **options).to_pylist()
    assert (stopped["status"], stopped["finish_reason"]) == ("ok", "stop_string")
    assert stopped["output"] == whole["output"].partition("\n")[0]
    assert stopped["output_tokens"] < whole["output_tokens"]
    assert "\n" not in other["output"]


def test_white_space_stands_and_nothing_does_not() -> None:
    needed = {"input": "in", "output": "out", "model": "model"}
    assert JobConfig(**needed, stop=["\n\n", " ", "\n\n"]).stop == ("\n\n", " ")  # type: ignore[arg-type]
    with pytest.raises(JobError, match="--stop must be a text or a list of texts that are not empty, got"):
        JobConfig(**needed, stop=["", "a"])  # type: ignore[arg-type]


def test_answers_by_a_schema_have_no_stop_strings() -> None:
    needed: dict[str, Any] = {"input": "in", "output": "out", "model": "model", "stop": ("}",)}
    own = [{"question": "How many?", "name": "many", "schema": SCHEMA}, "Why?"]
    for settings, name in (({"schema": SCHEMA}, "summary"), ({"questions": own}, "many")):
        config = JobConfig(**needed, **settings)
        with pytest.raises(JobError, match=f"question {name}: a schema with --stop '}}': its answers end by themselves"):
            answers_of(config, questions_of(config))
