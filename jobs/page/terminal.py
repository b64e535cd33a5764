"""The blocks of a page on a terminal; charts, pictures and what is folded are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from jobs.page.blocks import Block, KeyFigures, Prose, Section, SideBySide, Table
from pipeline.errors import visible

if TYPE_CHECKING:
    from rich.console import Console

FILE_WIDTH = 120


def print_sections(title: str, subtitle: str, sections: Sequence[Section], stream: TextIO) -> None:
    """Print a page to a terminal, or to a file at 120 columns. Control characters of strangers are spelled out."""
    from rich.console import Console

    console = Console(
        file=stream, width=None if stream.isatty() else FILE_WIDTH, highlight=False, markup=False, emoji=False
    )
    console.print(visible(title), style="bold")
    console.print(visible(subtitle), style="dim")
    for section in sections:
        console.print()
        console.print(visible(section.title), style="bold")
        for block in section.blocks:
            _print(console, block)


def _print(console: Console, block: Block) -> None:
    if isinstance(block, Prose):
        for paragraph in block.paragraphs:
            console.print(visible(paragraph))
    elif isinstance(block, KeyFigures):
        rows = [[item.label, item.value, item.note] for item in block.figures]
        _print_table(console, Table(("", "", ""), rows), show_header=False)
    elif isinstance(block, Table):
        if block.title:
            console.print(visible(block.title), style="underline")
        _print_table(console, block, show_header=True)
        if block.note:
            console.print(visible(block.note), style="dim")
    elif isinstance(block, SideBySide):
        for label, text in block.texts:
            console.print(visible(label), style="underline")
            console.print(visible(text))


def _print_table(console: Console, block: Table, *, show_header: bool) -> None:
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(show_header=show_header)
    for text, name in block.head:
        table.add_column(Text(visible(text)), justify="right" if name == "number" else "left", overflow="fold")
    for row in block.cells:
        table.add_row(*(Text(visible(text)) for text, _ in row))
    console.print(table)
