"""The page of models: what it says is what the tool finds, and what the tool finds is what transformers does."""

from __future__ import annotations

import os
from typing import Any

import pytest
import transformers

from stem_core import attention
from tools.docs.__main__ import pages
from tools.models.__main__ import RESULTS, all_types, checked, main, read_results
from tools.models.check import SPARSE, check_type

# One of each kind: plain, windows, shared keys and values, text parts of others, what is refused.
FEW = (
    "llama", "gemma4_text", "gemma3n_text", "gemma3", "mistral3", "mistral3/ministral3", "qwen3_vl", "glm4v",
    "deepseek_v3", "nemotron",
)  # fmt: skip
EVERY = os.environ.get("STEMLINE_ALL_MODELS") == "1"
same_version = pytest.mark.skipif(
    read_results()[0] != transformers.__version__, reason="the table was written with another transformers"
)


@same_version
@pytest.mark.parametrize("model_type", all_types() if EVERY else FEW)
def test_a_type_does_what_the_table_says(model_type: str) -> None:
    written = {each.model_type: each for each in read_results()[1]}
    assert (checked if EVERY else check_type)(model_type) == written[model_type]


@same_version
def test_every_type_of_transformers_is_in_the_table() -> None:
    assert [each.model_type for each in read_results()[1]] == all_types()


def test_none_is_wrong_and_many_run() -> None:
    found = read_results()[1]
    assert not [each for each in found if each.status == "wrong"]
    assert sum(each.status in ("stem", "dense") for each in found) >= 85
    assert all(each.reason for each in found if each.status in ("refused", "untested"))


def test_other_tokens_than_those_of_transformers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = attention.decode_attention

    def forgetful(*args: Any, window: int | None, **others: Any) -> Any:
        return decode(*args, window=100, **others)

    monkeypatch.setattr(attention, "decode_attention", forgetful)
    found = check_type("llama")
    assert (found.status, found.reason) == ("wrong", "dense: other tokens than transformers'")


def test_a_type_whose_layers_leave_nothing_out_does_not_count_as_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.models.check.SPARSE", SPARSE.replace(density=0.3, local_blocks=4096))
    found = check_type("llama")
    assert (found.status, found.sparse) == ("dense", "0 of 4 layers")


def test_the_page_names_every_type_once_among_those_that_run_and_those_refused() -> None:
    page = pages()["models.md"]
    running = page.split("\n## All types that run\n")[1].split("\n## ")[0]
    refused = page.split("\n## Refused\n")[1].split("\n## ")[0]
    for each in read_results()[1]:
        name = f"`{each.model_type}`"
        assert running.count(f"| {name} |") == (each.status in ("stem", "dense"))
        assert (name in refused) == (each.status == "refused")


def test_types_that_are_named_are_checked_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.json"
    results.write_bytes(RESULTS.read_bytes())
    monkeypatch.setattr("tools.models.__main__.RESULTS", results)
    assert main(["blt"]) == 0
    assert capsys.readouterr().out.startswith("blt: untested")
    assert results.read_bytes() == RESULTS.read_bytes()
