"""The formats of input files. A new one is a module that lists and reads it, and a line here."""

from __future__ import annotations

from pipeline.source.converted import converted_format
from pipeline.source.csv_files import CsvReader, list_csv
from pipeline.source.jsonl import JsonlReader, list_jsonl
from pipeline.source.parquet import ParquetReader, list_parquet
from pipeline.source.protocol import Format
from pipeline.source.streams import COMPRESSIONS
from pipeline.source.text_files import TextFileReader, list_text_file

FORMATS = {
    format.name: format
    for format in (
        Format("parquet", (".parquet",), list_parquet, ParquetReader),
        Format("jsonl", (".jsonl", ".ndjson"), list_jsonl, JsonlReader, compressed=True, number="line"),
        Format("csv", (".csv", ".tsv"), list_csv, CsvReader, compressed=True, number="line"),
        Format("text", (".txt", ".md"), list_text_file, TextFileReader, has_columns=False),
        converted_format("pdf", ".pdf", needs=("pypdfium2",)),
        converted_format("docx", ".docx", needs=("mammoth", "inscriptis")),
        converted_format("html", ".html", ".htm", ".xhtml", needs=("inscriptis",)),
        converted_format("epub", ".epub", needs=("inscriptis",)),
    )
}
# By the end of a file's name.
SUFFIXES = {
    suffix + packed: format
    for format in FORMATS.values()
    for packed in ("", *(COMPRESSIONS if format.compressed else ()))
    for suffix in format.suffixes
}


def format_of(path: str) -> Format | None:
    """The format of a file, by its name, or None."""
    name = path.rpartition("/")[2].lower()
    return next((format for suffix, format in SUFFIXES.items() if name.endswith(suffix)), None)
