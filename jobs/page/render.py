"""Blocks to one HTML file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from jobs.page.blocks import Block, Chart, Details, Section
from jobs.page.charts import chart_data, graph_objects
from jobs.page.outputs import Outputs
from pipeline.results.columns import valid_text

FOLDER = Path(__file__).parent
PLOTLY = "plotly"


def render_page(title: str, subtitle: str, sections: Sequence[Section], footer: str = "") -> str:
    """The page as HTML that holds all it needs: 20 KB, 4.8 MB more (plotly.js) if there are charts, and the outputs.

    The page itself forbids its reader's browser to load anything or to run any script but the page's own.
    Raises JobError if there are charts and plotly is not installed,
    ValueError for two lists of outputs.
    """
    blocks = [*_flat(block for section in sections for block in section.blocks)]
    tail = _tail(blocks)
    scripts = [_text("theme.js"), *(text for name, text in tail if name in ("", PLOTLY))]
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["chart_data"] = lambda chart: Markup(chart_data(chart.figure, chart.height))
    environment.globals["refuse"] = _refuse
    html = environment.get_template("page.html").render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        footer=footer,
        style=Markup("".join(map(_text, _styles(blocks)))),
        theme=Markup(scripts[0]),
        tail=[(name, Markup(text)) for name, text in tail],
        policy=_policy(scripts),
    )
    return valid_text(html)


def _refuse(block: object) -> None:
    raise TypeError(f"a page is made of the blocks of jobs.page, got {type(block).__name__}")


def _flat(blocks: Iterable[Block]) -> Iterator[Block]:
    """Blocks, and those inside them."""
    for block in blocks:
        yield block
        if isinstance(block, Details):
            yield from _flat(block.blocks)


def _styles(blocks: Sequence[Block]) -> list[str]:
    return ["style.css", *(["outputs.css"] if any(isinstance(block, Outputs) for block in blocks) else [])]


def _tail(blocks: Sequence[Block]) -> list[tuple[str, str]]:
    """What stands at the end of a page, in the order in which a reader waits for it: (name, "" for a script that runs
    at once, text). The list of outputs is shown before the browser reads the megabytes of its texts, and plotly
    is only text until page.js makes a script of it.
    """
    tail: list[tuple[str, str]] = []
    lists = [block for block in blocks if isinstance(block, Outputs)]
    if len(lists) > 1:
        raise ValueError(f"a page holds at most one list of outputs, got {len(lists)}")
    for block in lists:
        index, *texts = block.blocks
        tail += [index, ("", _text("outputs.js")), *texts]
    if any(isinstance(block, Chart) for block in blocks):
        tail += [(PLOTLY, _plotly()), ("", _text("page.js"))]
    return tail


def _policy(scripts: Sequence[str]) -> str:
    """A Content-Security-Policy: no network; these scripts, known by their hashes, and no other."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{value}'" for value in hashes) or "'none'"
    # Plotly sets styles; pictures and heat maps are data.
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


def _text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _plotly() -> str:
    graph_objects()
    from plotly.offline import get_plotlyjs

    # A browser reads CR LF as LF, and the policy's hash is of what the browser reads.
    return get_plotlyjs().replace("\r\n", "\n")
