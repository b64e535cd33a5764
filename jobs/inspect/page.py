"""What was captured, as a page that says what is to be seen."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from jobs.inspect.capture import Capture
from jobs.inspect.cells import LayerCells
from jobs.inspect.charts import budget_charts, density_chart, map_chart
from jobs.inspect.pictures import (
    BY_HEADS,
    DARK,
    LIGHT,
    MANY,
    MAP_PIXELS,
    OF_A_CELL,
    SMALL_PIXELS,
    key_picture,
    map_colours,
    map_picture,
)
from jobs.page import Block, Details, KeyFigure, KeyFigures, Picture, Pictures, Prose, Section, Table
from jobs.page.numbers import NOTHING, share

READ_MOST = 12
BOTH = (LIGHT, DARK)
PATTERNS = {
    "diagonals": "The stripes run along the diagonal: what counts in this layer is how far back a block lies.",
    "columns": "The stripes run straight down: the same blocks are read from everywhere below them, for what they say.",
    "mixed": "Some stripes run along the diagonal (blocks at a fixed distance), some straight down (blocks that are "
    "read from everywhere below them).",
    "none": "Nothing is chosen by score here: the budget covers no more than what is always kept. A larger --budget, "
    "or a longer document, shows more.",
    "scattered": "There are no clear stripes: each query block has blocks of its own.",
}


def sections(seen: Capture, shown: Sequence[int]) -> list[Section]:
    """The page about a capture; `shown` are the layers that get a map of their own."""
    return [
        Section("What this shows", _introduction(seen)),
        Section("All layers at a glance", _overview(seen)),
        *(Section(f"Layer {layer}", _layer(seen, layer)) for layer in shown),
        Section("How much each position may read", budget_charts(seen)),
        Section("Density by layer", [density_chart(seen)]),
        Section("Settings", _settings(seen)),
    ]


def _introduction(seen: Capture) -> list[Block]:
    grid, size = seen.grid, seen.grid.block_size
    cells = next(iter(seen.layers.values()))
    layers = f"{len(seen.layers)} of {len(seen.densities)}"
    figures = [
        KeyFigure("Density", share(seen.density), "of the blocks that dense attention reads"),
        KeyFigure("Prompt", f"{len(seen.prompt):,} tokens", f"{grid.blocks:,} blocks of {size}"),
        KeyFigure("Sparse layers", layers, f"{cells.heads} heads in each"),
        KeyFigure("Chosen by score", share(1 - cells.by_rule / cells.density), "of what a sparse layer reads"),
    ]
    text = f"""
    While a prompt is read, each block of {size} tokens (a query block) may look at every block before it (the key
    blocks). Dense attention looks at all of them. Sparse prefill gives each query block a budget, scores the key blocks
    and reads the best ones only. What follows are the choices that the engine made as it read this document.

    In every map a row is a query block, the prompt's start on top, and a column is a key block, the prompt's start at
    the left. The upper right half is empty, since no token sees a later one. Orange is read whatever the scores: the
    first {grid.sink_blocks} blocks (the sink, at the left edge), the nearest {grid.local_blocks} (along the diagonal),
    and rows whose budget covers everything. Blue was chosen by score: the stronger, the more of the layer's heads chose
    it. Where there is no colour everything was skipped, and that is the work that is saved.
    """
    return [KeyFigures(figures), Prose(text)]


def _overview(seen: Capture) -> list[Block]:
    maps: list[tuple[str, LayerCells, np.ndarray]] = []
    rows, many = [], len(seen.layers) > MANY
    for layer, cells in seen.layers.items():
        stripes = cells.pattern().name
        name = f"layer {layer}" if many else f"layer {layer}: {stripes}"
        maps.append((name, cells, cells.shares()))
        half, most = (NOTHING if stripes == "none" else f"{cells.reach_tokens(part):,}" for part in (0.5, 0.9))
        rows.append((layer, stripes, share(cells.density), half, most, share(cells.shared)))
    table = Table(
        ("layer", "stripes", "density", "half within (tokens)", "nine tenths within", "heads agree"),
        rows,
        note="Within: so many tokens back lie the blocks that were chosen by score. Heads agree: where one head "
        "chose a block, the share of the layer's other heads that chose it too.",
    )
    return [
        _maps(
            "Every sparse layer, its heads together",
            maps,
            "map of the blocks that {} keeps",
            note="One map for each layer. Stripes along the diagonal are blocks at a fixed distance; stripes straight "
            "down are blocks that are read from everywhere below them.",
        ),
        Details("The layers in figures", [table]) if many else table,
    ]


def _layer(seen: Capture, layer: int) -> list[Block]:
    cells = seen.layers[layer]
    heads = [(f"head {head}", cells, cells.shares(head)) for head in range(cells.heads)]
    picture = _maps(
        f"Layer {layer}: each head", heads, f"map of the blocks that {{}} of layer {layer} keeps",
        note="All heads of a layer have the same budget; each spends it in its own way.", ends=OF_A_CELL,
    )  # fmt: skip
    blocks: list[Block] = [Prose(PATTERNS[cells.pattern().name]), map_chart(layer, cells, len(seen.prompt)), picture]
    size = cells.grid.block_size
    most = [
        (f"{block * size:,}", share(part), " ".join(seen.text(block).split()))
        for block, part in cells.read_most(READ_MOST)
    ]
    if most:
        note = "Chosen by: of all query blocks and heads that could choose the block by score, the share that did."
        table = Table(("from token", "chosen by", "text"), most, note=note)
        blocks.append(Details("The blocks chosen most, and what they say", [table]))
    return blocks


def _maps(
    title: str, maps: Sequence[tuple[str, LayerCells, np.ndarray]], meaning: str, *,
    note: str, ends: tuple[str, str] = BY_HEADS,
) -> Pictures:  # fmt: skip
    """Small maps, (label, cells, shares) each, in light and in dark colours."""
    pixels = MAP_PIXELS if len(maps) <= MANY else SMALL_PIXELS
    pictures = []
    for name, cells, shares in maps:
        light, dark = (map_picture(map_colours(cells.grid, shares, palette), pixels, palette) for palette in BOTH)
        pictures.append(Picture(light, meaning.format(name), name, dark=dark))
    light, dark = (key_picture(ends, palette) for palette in BOTH)
    return Pictures(pictures, title, note, Picture(light, "what the colours mean", dark=dark), pixels == SMALL_PIXELS)


def _settings(seen: Capture) -> list[Block]:
    settings = [(name, json.dumps(value)) for name, value in seen.stem.to_dict().items()]
    runs = {**seen.about["kernels"], "precision": seen.about["precision"], "device": seen.about["device"]}
    return [
        Details("Attention", [Table(("setting", "value"), settings)]),
        Details("What ran", [Table(("what", "which"), list(runs.items()))]),
    ]
