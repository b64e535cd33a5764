"""What a page is made of. All text is plain text."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jobs.page.outputs import Outputs

if TYPE_CHECKING:
    import plotly.graph_objects as go

Cell = str | int | float | bool | None
# A number, maybe signed; a second one (a range, plus or minus); a unit of up to three words; a share in brackets.
_NUMBER = r"[\d.,]+(?:e[-+]?\d+)?%?"
_FIGURE = re.compile(
    rf"[-+]?{_NUMBER}(?:\s?[-\u2013/\xb1]\s?{_NUMBER})?(?:\s[\w/%]{{1,10}}){{0,3}}(?:\s\({_NUMBER}\))?"
)
_LONG = 32


@dataclass(frozen=True)
class Prose:
    """Paragraphs, with an empty line between two."""

    text: str

    @property
    def paragraphs(self) -> list[str]:
        """The paragraphs, without line breaks."""
        return [" ".join(part.split()) for part in re.split(r"\n\s*\n", self.text.strip()) if part.strip()]


@dataclass(frozen=True)
class KeyFigure:
    """One number that matters, with its unit; `note` says what it is of. tone: how to take it."""

    label: str
    value: str
    note: str = ""
    tone: Literal["", "good", "bad"] = ""


@dataclass(frozen=True)
class KeyFigures:
    """A row of key figures."""

    figures: Sequence[KeyFigure]


@dataclass(frozen=True)
class Table:
    """Rows of cells. A column whose cells are all numbers (with or without a unit) is set to the right.

    None is shown as a dash, an int with separators, a float with four digits; for anything else give a string.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"a table of {len(self.header)} columns has a row of {len(row)} cells: {row!r:.200}")

    @property
    def is_wide(self) -> bool:
        """Whether a phone shows each row as a list of its cells instead."""
        return len(self.header) > 3

    @property
    def cells(self) -> list[list[tuple[str, str]]]:
        """(text, CSS class) of each cell."""
        texts = [[cell_text(cell) for cell in row] for row in self.rows]
        classes = [*map(_column_class, zip(*texts, strict=True))] if texts else []
        return [list(zip(row, classes, strict=True)) for row in texts]

    @property
    def head(self) -> list[tuple[str, str]]:
        """(text, CSS class) of each column's header."""
        classes = [name for _, name in self.cells[0]] if self.rows else [""] * len(self.header)
        return list(zip(self.header, classes, strict=True))


@dataclass(frozen=True)
class Chart:
    """A plotly figure. Its texts come out as text, but for hovertemplate and texttemplate, which may hold markup.

    Leave colours to the page, or take them by name, e.g. line_color="var(--series-1)" (jobs.page.charts), so that they
    follow light and dark. Give no title: `title` and `note` are set around the chart. height: CSS pixels.
    """

    title: str
    figure: go.Figure
    note: str = ""
    height: int = 320


@dataclass(frozen=True)
class SideBySide:
    """Texts beside each other, (label, text) each, with their line breaks; below each other on a phone."""

    texts: Sequence[tuple[str, str]]
    title: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG inside the page. meaning: what it shows, for those who do not see it. dark: the same in dark colours."""

    png: bytes
    meaning: str
    title: str = ""
    note: str = ""
    dark: bytes | None = None

    @property
    def uris(self) -> list[tuple[str, str]]:
        """(when it is shown, as a CSS class; the picture as a data: URI)."""
        pictures = [("", self.png)] if self.dark is None else [("by-day", self.png), ("by-night", self.dark)]
        return [(when, "data:image/png;base64," + base64.b64encode(png).decode()) for when, png in pictures]


@dataclass(frozen=True)
class Pictures:
    """Small pictures that belong together, each below its title, as many in a row as fit.

    On a phone two stand in a row, or three if they are `small`. key: says what the colours mean.
    """

    pictures: Sequence[Picture]
    title: str = ""
    note: str = ""
    key: Picture | None = None
    small: bool = False


@dataclass(frozen=True)
class Details:
    """Blocks that are shown when the summary line is clicked."""

    summary: str
    blocks: Sequence[Block]


Block = Prose | KeyFigures | Table | Chart | SideBySide | Picture | Pictures | Details | Outputs


@dataclass(frozen=True)
class Section:
    """A heading and its blocks."""

    title: str
    blocks: Sequence[Block]


def cell_text(cell: Cell) -> str:
    """A cell as it is shown."""
    if cell is None or cell != cell:  # NaN
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.4g}" if isinstance(cell, float) else cell


def _column_class(texts: Sequence[str]) -> str:
    filled = [text for text in texts if text not in ("", "-")]
    if filled and all(_FIGURE.fullmatch(text) for text in filled):
        return "number"
    return "long" if any(len(text) > _LONG for text in filled) else ""
