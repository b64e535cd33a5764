"""Maps of kept blocks as pictures: query blocks down, key blocks to the right."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jobs.inspect.cells import Grid

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Palette:
    """Colours of a picture. scale: kept by no head, by half of them, by all. rule: kept whatever the scores."""

    page: Colour
    ink: Colour
    muted: Colour
    faint: Colour
    scale: tuple[Colour, Colour, Colour]
    rule: Colour


LIGHT = Palette(
    page=(255, 255, 255), ink=(27, 31, 36), muted=(89, 99, 110), faint=(190, 196, 203),
    scale=((240, 244, 248), (104, 163, 216), (14, 50, 92)), rule=(232, 143, 66),
)  # fmt: skip
# On the dark page of jobs.page, of its colours: the more heads, the lighter.
DARK = Palette(
    page=(20, 23, 26), ink=(228, 231, 234), muted=(154, 164, 175), faint=(74, 82, 91),
    scale=((29, 33, 37), (51, 105, 155), (185, 220, 251)), rule=(214, 125, 48),
)  # fmt: skip
RULES = "kept by rule: sink (left), local (diagonal), rows that keep all"
# A page of jobs.page is 1,016 pixels wide; four maps of 240 fit.
SMALL_PIXELS, COLUMNS, MARGIN = 240, 4, 10
# Where there are more maps than these, eight of 120 pixels.
MANY, MANY_PIXELS, MANY_COLUMNS = 16, 120, 8
BY_HEADS, OF_A_CELL = ("by no head", "by all"), ("no block", "all of a cell")
FONT = ImageFont.load_default(15)  # comes with Pillow


def map_colours(grid: Grid, shares: np.ndarray, palette: Palette = LIGHT) -> np.ndarray:
    """uint8 [cells, cells, 3] of LayerCells.shares: blue by score, orange by rule, the page where nothing is causal."""
    colours = _blues(np.nan_to_num(shares), palette)
    colours[mostly_rule(grid)] = palette.rule
    colours[grid.causal == 0] = palette.page
    return colours


def _blues(shares: np.ndarray, palette: Palette) -> np.ndarray:
    """Shares from 0 to 1 -> their colours, uint8 [..., 3]."""
    channels = [np.interp(shares, (0.0, 0.5, 1.0), channel) for channel in zip(*palette.scale, strict=True)]
    return np.stack(channels, -1).round().astype(np.uint8)


def mostly_rule(grid: Grid) -> np.ndarray:
    """bool [cells, cells]: cells of which every head keeps at least half whatever the scores."""
    return (grid.by_rule * 2 >= grid.causal) & (grid.causal > 0)


def maps_picture(
    title: str, maps: Sequence[tuple[str, np.ndarray]], ends: tuple[str, str] = BY_HEADS, palette: Palette = LIGHT
) -> bytes:
    """PNG: small maps beside each other, (label, colours of map_colours in `palette`) each. ends: of the scale."""
    columns, pixels = (COLUMNS, SMALL_PIXELS) if len(maps) <= MANY else (MANY_COLUMNS, MANY_PIXELS)
    by = -(-len(maps[0][1]) // pixels)
    cells = -(-len(maps[0][1]) // by)
    scale = max(1, pixels // cells)
    side = cells * scale
    top, label, gap = 40, 22, 14
    wide = max(side, *(round(FONT.getlength(name)) for name, _ in maps)) + MARGIN
    width = max(min(len(maps), columns) * wide + MARGIN, _key_width(ends) + 2 * MARGIN)
    height = top + -(-len(maps) // columns) * (side + label + gap) + 60
    picture, draw = _canvas(width, height, palette)
    _write(draw, (MARGIN, 12), title, palette.ink)
    for place, (name, colours) in enumerate(maps):
        x, y = MARGIN + place % columns * wide, top + place // columns * (side + label + gap)
        _write(draw, (x, y), name, palette.muted)
        _map(picture, draw, (x, y + label), colours, scale, palette, by)
    _key(picture, draw, MARGIN, height - 52, ends, palette)
    return _png(picture)


def _canvas(width: int, height: int, palette: Palette) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (width, height), palette.page)
    return picture, ImageDraw.Draw(picture)


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour: Colour) -> None:
    draw.text(at, text, colour, FONT)


def _map(
    picture: Image.Image, draw: ImageDraw.ImageDraw, at: tuple[int, int], colours: np.ndarray, scale: int,
    palette: Palette, by: int = 1,
) -> None:  # fmt: skip
    """colours, uint8 [h, w, 3], in a frame: means of `by` by `by`, each a square of `scale` pixels."""
    image = Image.fromarray(colours).reduce(by)
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    picture.paste(image, at)
    draw.rectangle((at[0] - 1, at[1] - 1, at[0] + image.width, at[1] + image.height), outline=palette.faint)


def _key(
    picture: Image.Image, draw: ImageDraw.ImageDraw, left: int, top: int, ends: tuple[str, str], palette: Palette
) -> None:
    """What the colours mean, in two lines."""
    draw.rectangle((left, top, left + 13, top + 13), palette.rule)
    _write(draw, (left + 20, top - 1), RULES, palette.muted)
    chosen = f"chosen by score: {ends[0]}"
    _write(draw, (left, top + 23), chosen, palette.muted)
    bar = left + round(FONT.getlength(chosen)) + 10
    _map(picture, draw, (bar, top + 24), _blues(np.linspace(0, 1, 120)[None].repeat(14, 0), palette), 1, palette)
    _write(draw, (bar + 130, top + 23), ends[1], palette.muted)


def _key_width(ends: tuple[str, str]) -> int:
    """Pixels that `_key` takes."""
    scale = sum(FONT.getlength(text) for text in (f"chosen by score: {ends[0]}", ends[1])) + 140
    return round(max(scale, FONT.getlength(RULES) + 20))
