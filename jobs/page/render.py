"""Blocks to one HTML file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from jobs.page.blocks import Block, Chart, Details, Section
from jobs.page.charts import chart_data, graph_objects
from pipeline.results.columns import valid_text

FOLDER = Path(__file__).parent


def render_page(title: str, subtitle: str, sections: Sequence[Section], footer: str = "") -> str:
    """The page as HTML that holds all it needs: 20 KB, and 4.8 MB more (plotly.js) if there are charts.

    The page itself forbids its reader's browser to load anything or to run any script but the page's own.
    Raises JobError if there are charts and plotly is not installed.
    """
    scripts = [_plotly(), _text("page.js")] if any(_charts(section.blocks) for section in sections) else []
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
        style=Markup(_text("style.css")),
        scripts=[Markup(script) for script in scripts],
        policy=_policy(scripts),
    )
    return valid_text(html)


def _refuse(block: object) -> None:
    raise TypeError(f"a page is made of the blocks of jobs.page, got {type(block).__name__}")


def _charts(blocks: Iterable[Block]) -> bool:
    return any(isinstance(block, Chart) or (isinstance(block, Details) and _charts(block.blocks)) for block in blocks)


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
