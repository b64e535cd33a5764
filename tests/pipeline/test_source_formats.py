"""The table of input formats: nothing but it and a format's own module knows which there are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import DocumentError
from pipeline.imports import ROOT
from pipeline.settings.shared import ReadSettings
from pipeline.source import FORMATS, DocumentReader, Locator, find_files
from pipeline.source.catalogue import CatalogueBuilder
from pipeline.source.formats import SUFFIXES, format_of

# `text` is a column's name, too.
NAMES = {*FORMATS, *SUFFIXES} - {"text"}


def names_in(node: ast.AST) -> set[str]:
    return {item.value for item in ast.walk(node) if isinstance(item, ast.Constant)} & NAMES


def choices_by_name(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Where code decides by a format's name or suffix."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare | ast.MatchValue) and names_in(node):
            yield node.lineno if isinstance(node, ast.Compare) else node.value.lineno, "compares with a format"
        elif isinstance(node, ast.Dict) and sum(key is not None and bool(names_in(key)) for key in node.keys) > 1:
            yield node.lineno, "is a table of formats"


def test_nothing_but_the_table_decides_by_a_formats_name() -> None:
    files = list((ROOT / "pipeline").rglob("*.py"))
    assert len(files) > 50
    found = [
        f"{path.relative_to(ROOT)}:{line} {what}"
        for path in files
        for line, what in choices_by_name(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found


@pytest.mark.parametrize("code", ['if at.format == "parquet": pass', '{".parquet": 1, ".jsonl": 2}'])
def test_what_is_looked_for_is_found(code: str) -> None:
    assert list(choices_by_name(ast.parse(code)))


def test_a_name_has_one_format_whatever_its_case() -> None:
    for suffix, form in SUFFIXES.items():
        assert format_of(f"a/b{suffix}") is format_of(f"a.txt/B{suffix.upper()}") is form
    assert format_of("a.odt") is format_of("jsonl") is format_of("a.jsonl/b") is None
    assert format_of("a.parquet.gz") is None, "which pyarrow would not read"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_no_file_of_its_format_is_told_and_nothing_is_raised(tmp_path: Path, suffix: str) -> None:
    """By its lister or by its reader, in every format alike."""
    broken = [b"\xff\xfe\0\xd8" * 99, b"", b"\n", *((b'"', b"{") if SUFFIXES[suffix].has_columns else ())]
    for data in broken:
        (tmp_path / f"a{suffix}").write_bytes(data)
        (file,) = find_files((str(tmp_path),))[0]
        builder = CatalogueBuilder("text", None, ("kept",))
        builder.start_file(file, file.size)
        file.format.lister(file, builder)
        catalogue = builder.build()
        assert len(catalogue) or not data.strip(), "an empty file may hold nothing"
        for document in catalogue.documents():
            if not document.error:
                with pytest.raises(DocumentError):
                    DocumentReader("text", catalogue.kept).read(document)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_gone_costs_its_documents(name: str) -> None:
    at = Locator("", "/nothing/there" + FORMATS[name].suffixes[0], name, 0, 1)
    with pytest.raises(DocumentError, match="cannot be read: "):
        FORMATS[name].reader(("text",), ReadSettings()).read(at)


def test_the_pages_name_every_format() -> None:
    for page in ("README.md", "docs/troubleshooting.md"):
        words = (ROOT / page).read_text(encoding="utf-8").lower()
        assert [suffix for form in FORMATS.values() for suffix in form.suffixes if suffix not in words] == []
