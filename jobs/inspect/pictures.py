"""Maps of kept blocks as pictures: query blocks down, key blocks to the right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jobs.inspect.canvas import ADVANCE, FAINT, INK, WHITE, Canvas, Colour, mixed
from jobs.inspect.cells import Grid, LayerCells

# Light to dark: kept by no head, by half of them, by all.
LOW, MIDDLE, HIGH = (240, 244, 248), (104, 163, 216), (14, 50, 92)
RULE: Colour = (232, 143, 66)
GREY = (89, 99, 110)
RULES = "kept by rule: sink (left), local (diagonal), rows that keep all"
MAP_PIXELS = 720
# A page of jobs.page is 1,016 pixels wide; four maps of 240 fit.
SMALL_PIXELS, COLUMNS, MARGIN = 240, 4, 10
# Where there are more maps than these, eight of 120 pixels.
MANY, MANY_PIXELS, MANY_COLUMNS = 16, 120, 8
KEY_PIXELS = 820
BY_HEADS, OF_A_CELL = ("by no head", "by all"), ("no block", "all of a cell")


def map_colours(grid: Grid, shares: np.ndarray) -> np.ndarray:
    """uint8 [cells, cells, 3] of LayerCells.shares: blue by score, orange by rule, white where nothing is causal."""
    filled = np.nan_to_num(shares)
    low = mixed(LOW, MIDDLE, (filled * 2).clip(0, 1))
    high = mixed(MIDDLE, HIGH, (filled * 2 - 1).clip(0, 1))
    colours = np.where((filled > 0.5)[..., None], high, low)
    colours[mostly_rule(grid)] = RULE
    colours[grid.causal == 0] = WHITE
    return colours.astype(np.uint8)


def mostly_rule(grid: Grid) -> np.ndarray:
    """bool [cells, cells]: cells of which every head keeps at least half whatever the scores."""
    return (grid.by_rule * 2 >= grid.causal) & (grid.causal > 0)


def layer_picture(layer: int, cells: LayerCells, tokens: int) -> bytes:
    """PNG: the map of a layer, all heads together; beside it how many blocks each row keeps."""
    grid = cells.grid
    scale = max(1, MAP_PIXELS // grid.cells)
    side = grid.cells * scale
    left, top, bars = 92, 76, 150
    canvas = Canvas(left + side + 24 + bars + MARGIN, top + side + 108)
    canvas.text(left, 14, f"Layer {layer}: share of its {cells.heads} heads that keep a block")
    canvas.text(left, 40, f"density {cells.density:.3f}: that share of the causal blocks is kept", colour=GREY)
    canvas.image(left, top, map_colours(grid, cells.shares()), scale)
    canvas.frame(left, top, side, side)
    canvas.text(left + side - 12, top + 14, "no token sees", colour=FAINT, align="right")
    canvas.text(left + side - 12, top + 34, "a later one", colour=FAINT, align="right")
    _axes(canvas, left, top, side, tokens)
    _profile(canvas, left + side + 24, top, scale, bars, cells)
    _key(canvas, left, top + side + 56)
    return canvas.png()


def maps_picture(title: str, maps: Sequence[tuple[str, np.ndarray]], ends: tuple[str, str] = BY_HEADS) -> bytes:
    """PNG: small maps beside each other, (label, colours as of map_colours) each. ends: of the scale, in words."""
    columns, pixels = (COLUMNS, SMALL_PIXELS) if len(maps) <= MANY else (MANY_COLUMNS, MANY_PIXELS)
    maps = [(name, _smaller(colours, -(-len(colours) // pixels))) for name, colours in maps]
    scale = max(1, pixels // len(maps[0][1]))
    side = len(maps[0][1]) * scale
    rows = -(-len(maps) // columns)
    top, label, gap = 44, 20, 14
    wide = max(side, *(2 * ADVANCE * len(name) for name, _ in maps)) + MARGIN
    width = max(min(len(maps), columns) * wide + MARGIN, KEY_PIXELS)
    canvas = Canvas(width, top + rows * (side + label + gap) + 60)
    canvas.text(MARGIN, 14, title)
    for place, (name, colours) in enumerate(maps):
        x, y = MARGIN + place % columns * wide, top + place // columns * (side + label + gap)
        canvas.text(x, y, name, colour=GREY)
        canvas.image(x, y + label, colours, scale)
        canvas.frame(x, y + label, side, side)
    _key(canvas, MARGIN, canvas.pixels.shape[0] - 52, ends)
    return canvas.png()


def _smaller(colours: np.ndarray, by: int) -> np.ndarray:
    """An image, uint8 [h, w, 3], `by` times smaller: means of squares, white beyond the edge."""
    if by == 1:
        return colours
    height, width, _ = colours.shape
    padded = np.pad(colours, ((0, -height % by), (0, -width % by), (0, 0)), constant_values=255)
    squares = padded.reshape(padded.shape[0] // by, by, padded.shape[1] // by, by, 3)
    return squares.mean((1, 3)).round().astype(np.uint8)


def _axes(canvas: Canvas, left: int, top: int, side: int, tokens: int) -> None:
    step = next(step for step in (1 << k for k in range(30)) if tokens / step <= 8.5)
    for at in range(0, tokens + 1, step):
        place = round(at / tokens * side)
        canvas.rectangle(left - 6, top + place, 5, 1, INK)
        canvas.rectangle(left + place, top + side + 1, 1, 5, INK)
        canvas.text(left - 10, top + place - 6, _short(at), colour=GREY, align="right")
        canvas.text(left + place, top + side + 10, _short(at), colour=GREY, align="centre")
    canvas.text_up(4, top + side // 2, "query token, downwards")
    canvas.text(left + side // 2, top + side + 32, "key token", align="centre")


def _profile(canvas: Canvas, left: int, top: int, scale: int, width: int, cells: LayerCells) -> None:
    """Kept blocks of each row as bars, on a faint ground of the causal ones."""
    grid = cells.grid
    starts = np.arange(0, grid.blocks, grid.per_cell)
    rows = np.minimum(grid.per_cell, grid.blocks - starts)
    kept = np.add.reduceat(cells.kept, starts) / rows / cells.heads
    causal = np.add.reduceat(np.arange(1, grid.blocks + 1), starts) / rows
    for row in range(grid.cells):
        canvas.rectangle(left, top + row * scale, round(width * causal[row] / grid.blocks), scale, FAINT)
        canvas.rectangle(left, top + row * scale, round(width * kept[row] / grid.blocks), scale, HIGH)
    canvas.text(left, top + grid.cells * scale + 10, "blocks kept")
    canvas.text(left, top + grid.cells * scale + 32, f"of up to {grid.blocks:,}", colour=GREY)


def _key(canvas: Canvas, left: int, top: int, ends: tuple[str, str] = BY_HEADS) -> None:
    """What the colours mean, in two lines."""
    canvas.rectangle(left, top, 14, 14, RULE)
    canvas.text(left + 20, top, RULES, colour=GREY)
    canvas.text(left, top + 24, f"chosen by score: {ends[0]}", colour=GREY)
    bar = mixed(LOW, MIDDLE, np.linspace(0, 1, 60)), mixed(MIDDLE, HIGH, np.linspace(0, 1, 60))
    canvas.image(left + 336, top + 24, np.concatenate(bar)[None].repeat(14, 0))
    canvas.frame(left + 336, top + 24, 120, 14)
    canvas.text(left + 468, top + 24, ends[1], colour=GREY)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
