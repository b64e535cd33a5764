"""The pages in docs/ are what the code says."""

from __future__ import annotations

import argparse
import difflib
import json
from dataclasses import fields, make_dataclass
from pathlib import Path

import pytest

from jobs.cli import add_job_flags
from pipeline.engine.config import Completion
from pipeline.job import manifest
from pipeline.results.columns import column, columns_of
from pipeline.results.rows import COLUMNS, NAMES, NOT_STARTED, STATUSES, EngineFields, Outcome, Row
from pipeline.results.store import Store
from pipeline.settings.config import GROUPS, JobConfig
from stem_core.config import StemConfig
from tools.docs.__main__ import FOLDER, main, pages


def lines_with(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


@pytest.mark.parametrize("name", ["configuration.md", "results.md"])
def test_the_committed_page_is_what_the_generator_writes(name: str) -> None:
    committed, written = (FOLDER / name).read_text(encoding="utf-8"), pages()[name]
    difference = "\n".join(
        list(difflib.unified_diff(committed.splitlines(), written.splitlines(), lineterm="", n=0))[:20]
    )
    assert committed == written, f"docs/{name} is out of date; write it again: python -m tools.docs\n{difference}"


def test_the_command_writes_what_is_missing_or_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tools.docs.__main__.FOLDER", tmp_path / "docs")
    assert main([]) == 0
    assert {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "docs").iterdir()} == pages()
    (tmp_path / "docs" / "results.md").write_text("edited by hand")
    capsys.readouterr()
    assert main([]) == 0
    told = "docs/configuration.md: unchanged\ndocs/models.md: unchanged\ndocs/results.md: written\n"
    assert capsys.readouterr().out == told


def test_every_flag_of_the_command_line_has_one_line_in_its_group() -> None:
    parser = argparse.ArgumentParser()
    add_job_flags(parser)
    page = pages()["configuration.md"]
    groups = [group.title for group in parser._action_groups if group.title in GROUPS and group._group_actions]
    assert [part.split("\n")[0].lower() for part in page.split("\n## ")[3:-2]] == groups
    for group in parser._action_groups:
        for action in group._group_actions if group.title in GROUPS else ():
            section = page.split(f"\n## {str(group.title).capitalize()}\n")[1].split("\n## ")[0]
            (line,) = lines_with(section, f"| `{action.option_strings[0]}`")
            assert f"| `{action.dest}` |" in line
            assert all(option in line for option in action.option_strings)


def test_stars_mark_what_must_stay_as_it_was() -> None:
    rows = [line.split(" | ") for line in lines_with(pages()["configuration.md"], "| `--")]
    starred = {cells[1].strip("`") for cells in rows if cells[0].endswith(" *")}
    fingerprinted = {item.name for item in fields(JobConfig) if item.metadata["changes_output"]}
    assert starred == fingerprinted | set(manifest.READING) | {"prompt_file", "system"}


def test_presets_stand_with_their_values() -> None:
    page = pages()["configuration.md"]
    section = page.split("\n## Stem's fields and presets\n")[1].split("\nEstimators")[0]
    rows = [line.split("`")[1] for line in lines_with(section, "| `")]
    assert sorted(rows) == sorted(item.name for item in fields(StemConfig))
    (line,) = lines_with(page, "| `dense_tail` |")
    assert [cell.strip() for cell in line.split("|")[3:7]] == ["1", "0", "0", "at least 0"]
    assert all(
        item.metadata["meaning"] + "; " + item.metadata["more"] in page
        for item in fields(StemConfig)
        if item.metadata["more"]
    )


def test_every_column_and_status_has_one_line() -> None:
    page = pages()["results.md"]
    statuses, columns = (page.split(f"\n## {title}\n")[1].split("\n## ")[0] for title in ("Statuses", "Columns"))
    assert [line.split("`")[1] for line in lines_with(statuses, "| `")] == list(STATUSES)
    assert [line.split("`")[1] for line in lines_with(columns, "| `")] == list(NAMES)
    for line, declared in zip(lines_with(columns, "| `"), COLUMNS, strict=True):
        cells = [cell.strip() for cell in line.split(" | ")]
        assert (cells[4] == "never") == (not declared.nullable)
        assert cells[5].removesuffix(" |"), "somebody measures it"


def test_a_column_that_does_not_say_when_it_is_null_is_refused() -> None:
    for kind, null in ((int | None, ""), (int, "now and then")):
        row_type = make_dataclass("Made", [("found", kind, column("a number", null=null))])
        with pytest.raises(TypeError, match=r"Made\.found"):
            list(columns_of(row_type))


@pytest.mark.parametrize(
    ("completion", "absent"),
    [
        (None, {"the engine gave nothing back", NOT_STARTED, "no token was generated"}),
        (Completion("a", "too_long", prompt_tokens=9), {NOT_STARTED, "no token was generated"}),
        (
            Completion(
                "a", "oom", prompt_tokens=9, attention="stem", attention_reason="", density=0.5,
                density_by_layer=(0.5,), kernel="k",
            ),
            {"no token was generated"},
        ),
        (
            Completion(
                "a", "ok", prompt_tokens=9, attention="stem", attention_reason="", density=0.5,
                density_by_layer=(0.5,), kernel="k", output_tokens=2, time_to_first_token=0.1,
            ),
            set(),
        ),
    ],
)  # fmt: skip
def test_columns_are_null_when_the_page_says_so(completion: Completion | None, absent: set[str]) -> None:
    """A worker's row, as far as a document came."""
    measured = EngineFields.of_parts([completion]) if completion else None
    row = Row(document_id="a", source="x", outcome=Outcome(status="error"), from_engine=measured)
    told = {"the engine gave nothing back", NOT_STARTED, "no token was generated"}
    for each in COLUMNS:
        if each.null in told:
            assert (each.of(row) is None) == (each.null in absent), each.name


def test_the_density_of_layers_is_the_mean_over_parts_by_tokens_and_null_without_stem() -> None:
    sparse = Completion(
        "a", "ok", prompt_tokens=300, attention="stem", density=0.65, density_by_layer=(1.0, 0.3), kernel="k"
    )
    dense = Completion(
        "b", "ok", prompt_tokens=100, attention="dense", density=1.0, density_by_layer=(1.0, 1.0), kernel="k"
    )
    refused = Completion("c", "too_long", prompt_tokens=500)
    found = EngineFields.of_parts([sparse, dense, refused])
    assert found.density_by_layer == pytest.approx([1.0, (0.3 * 300 + 100) / 400])
    assert found.density == pytest.approx((1.0 + (0.3 * 300 + 100) / 400) / 2)
    assert (found.prompt_tokens, found.attention) == (900, "stem")
    assert EngineFields.of_parts([dense]).density_by_layer is None


def test_the_manifest_has_the_keys_of_the_page(tmp_path: Path) -> None:
    config = JobConfig(input=("a",), output=str(tmp_path), model="m")
    more = {"state": "finished", "documents": 1, "seconds": 1.0, "prompt_date": config.today()}
    manifest.save(Store(str(tmp_path)), config, {"config": ""}, **more)
    written = json.loads((tmp_path / manifest.NAME).read_text())
    section = pages()["results.md"].split("`manifest.json`:")[1].split("\n## ")[0]
    assert {line.split("`")[1] for line in lines_with(section, "| `")} == written.keys()
