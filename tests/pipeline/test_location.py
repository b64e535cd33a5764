"""URIs and paths: parsed and printed in one place, so that what is printed can be typed again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.submit import absolute_paths
from jobs.summarize import refuse_unpacked_paths
from pipeline.errors import JobError
from pipeline.location import is_remote, printed, safe_name, split_location, split_name
from pipeline.results.store import Store
from pipeline.settings.config import JobConfig
from pipeline.source import DocumentReader, find_files, list_documents
from pipeline.source.files import glob_regex

AWS = "?region=us-east-1"  # else the client asks for it


@pytest.mark.parametrize(
    ("location", "path"),
    [
        (f"s3://b/run#1/docs{AWS}", "b/run#1/docs"),
        (f"s3://b/a b/c{AWS}", "b/a b/c"),
        (f"s3://b/a%20b/c%23d{AWS}", "b/a b/c#d"),
        (f"s3://b/100%/of it{AWS}", "b/100%/of it"),
        (f"s3://b/a%25b{AWS}", "b/a%b"),
        (f"s3://b/é/%C3%A9{AWS}", "b/é/é"),
        (f"s3://b/what%3F{AWS}", "b/what?"),
        (f"S3://b/x{AWS}", "b/x"),
        (f"s3:/b/out{AWS}", "b/out"),
        (f"s3://key:sec%2Fret@b/x y{AWS}", "b/x y"),
        (f"s3://b{AWS}", "b"),
        ("gs://b/run#1/a b", "b/run#1/a b"),
        ("gs:/b/out", "b/out"),
        ("mock:///late/o%20ut#1", "late/o ut#1"),
        ("file:///a%20b/c#1", "/a b/c#1"),
        ("file:/a%20b", "/a b"),
        ("file://localhost/a?b", "/a?b"),
        ("/a b/%20#1", "/a b/%20#1"),
    ],
)
def test_a_location_is_taken_as_it_stands(location: str, path: str) -> None:
    assert split_location(location).path == path


names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..")
)
segments = st.lists(names | st.sampled_from(["a b", "#1", "100%", "%20", "?", "*", "[x]", "\x1b[31m"]), min_size=1)


@settings(deadline=None, max_examples=200)
@given(segments, st.sampled_from(["s3://", "gs://", "mock:///"]))
def test_what_is_printed_can_be_typed_again(parts: list[str], start: str) -> None:
    path = "b/" + "/".join(parts)
    name = printed(start, path)
    query = AWS if name.startswith("s3") else ""
    assert split_location(name + query).path == path
    assert safe_name(name + query) == name
    assert name.isprintable()
    assert " " not in name


def test_outputs_that_differ_behind_a_hash_are_two() -> None:
    one, other = (Store(f"s3://b/out#{number}{AWS}") for number in (1, 2))
    assert one.path("x") != other.path("x")
    assert (one.name, other.name) == ("s3://b/out%231", "s3://b/out%232")
    assert Store(one.name + AWS).path("x") == one.path("x")


def test_a_path_made_of_a_uri_is_that_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    config = JobConfig(input=(Path("s3://b/docs"),), output=Path("s3://b/out"), model="m")  # type: ignore[arg-type]
    assert is_remote(config.output)
    assert safe_name(config.output) == "s3://b/out"
    assert safe_name(config.input[0]) == "s3://b/docs"
    values = absolute_paths({"input": ["s3:/b/docs", "file:///a", "x"], "output": "gs:/b", "model": "m"})
    assert values["input"] == ["s3:/b/docs", "file:///a", str(Path.cwd() / "x")]
    assert values["output"] == "gs:/b"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setattr(Path, "cwd", lambda: Path("/tmp/working_dir_files/x"))
    refuse_unpacked_paths(JobConfig(input=("x",), output="file:///a", model="m"))


@pytest.mark.parametrize("name", ["a b.txt", "run#1.txt", "100%25.txt", "é?.txt", "[x].txt", "*.txt"])
def test_files_by_file_uris_and_the_names_that_are_printed(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "a folder#1"
    folder.mkdir()
    (folder / name).write_text("fine")
    (folder / "other.md").write_text("no")
    uri = printed("file://", str(folder / name)).replace("file://", "file:///")
    for location in (uri, uri.replace("file:///", "file:/"), str(folder / name)):
        catalogue = list_documents(find_files((location,))[0])
        assert DocumentReader("text", []).read(catalogue.document(0))[0] == "fine"
        assert len(catalogue) == 1
    pattern = f"file://{tmp_path}/a%20folder%231/*.md"
    assert [file.label for file in find_files((pattern,))[0]] == ["other.md"]


def test_wildcards_that_are_encoded_stand_for_themselves() -> None:
    place = split_location(f"s3://b/a%5B1%5D/*.txt{AWS}")
    assert place.path == "b/a[1]/*.txt" or place.path == "b/a[[]1]/*.txt"
    place = split_location(f"s3://b/x/a%2A*.txt{AWS}")
    assert place.path == "b/x/a[*]*.txt"
    assert re.fullmatch(glob_regex(place.path), "b/x/a*1.txt")
    assert not re.fullmatch(glob_regex(place.path), "b/x/ab1.txt")


def test_keys_with_slashes_are_hidden() -> None:
    assert safe_name("s3://AKIA:wJal/rX@bucket/a b") == "s3://bucket/a%20b"
    assert safe_name("ray://me:pass@host:10001") == "ray://host:10001"


def test_the_file_of_a_report() -> None:
    assert split_name("s3://b/o%20ut/r%201.html?region=x") == ("s3://b/o%20ut?region=x", "r 1.html")
    assert split_name("out/r.html") == ("out", "r.html")


@pytest.mark.parametrize("location", ["nosuch://b/x", "file://host/x", "s3://b/x?nosuch=1"])
def test_what_cannot_be_opened_is_one_line(location: str) -> None:
    with pytest.raises(JobError, match="cannot be"):
        find_files((location,))


def test_googles_client_does_not_try_for_a_quarter_of_an_hour() -> None:
    assert "retry_limit_seconds=30" in split_location("gs://b/x").filesystem
    assert split_location("gs://b/x?retry_limit_seconds=5").filesystem == "gs://b/x?retry_limit_seconds=5"
