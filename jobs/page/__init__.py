"""Self-contained HTML pages: one file that needs no network, light and dark, for a screen, a phone and paper.

    page = render_page("Title", "what it is about", [Section("Latency", [Prose("..."), Table(("what", "time"), rows)])])

Whatever is given as text comes out as text: documents, their ids and their errors are written by strangers.
"""

from jobs.page.blocks import (
    Block,
    Chart,
    Details,
    KeyFigure,
    KeyFigures,
    Picture,
    Pictures,
    Prose,
    Section,
    SideBySide,
    Table,
)  # fmt: skip
from jobs.page.outputs import Outputs
from jobs.page.render import render_page

__all__ = [
    "Block",
    "Chart",
    "Details",
    "KeyFigure",
    "KeyFigures",
    "Outputs",
    "Picture",
    "Pictures",
    "Prose",
    "Section",
    "SideBySide",
    "Table",
    "render_page",
]
