"""Maps of kept blocks as pictures: query blocks down, key blocks to the right."""

from __future__ import annotations

import io
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
RULES = ("kept by rule: sink (left), local (diagonal),", "rows that keep all")
# A page of jobs.page is 1,016 pixels wide: four maps of 240 stand in a row, and of more than MANY eight small ones.
MAP_PIXELS, MANY, SMALL_PIXELS = 240, 16, 120
BAR_PIXELS = 100
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


def map_picture(colours: np.ndarray, pixels: int, palette: Palette = LIGHT) -> bytes:
    """PNG: a map in a frame, at most `pixels` wide, its cells as squares.

    colours: uint8 [cells, cells, 3], in `palette`; of more cells than pixels the means of squares are drawn.
    """
    image = Image.fromarray(colours).reduce(-(-len(colours) // pixels))
    side = image.width * max(1, pixels // image.width)
    picture, draw = _canvas(side + 2, side + 2, palette)
    _map(picture, draw, (1, 1), np.asarray(image.resize((side, side), Image.Resampling.NEAREST)), palette)
    return _png(picture)


def key_picture(ends: tuple[str, str] = BY_HEADS, palette: Palette = LIGHT) -> bytes:
    """PNG: what the colours mean, as wide as a phone at most. ends: of the scale."""
    chosen = f"chosen by score: {ends[0]}"
    bar = round(FONT.getlength(chosen)) + 10
    width = bar + BAR_PIXELS + 10 + round(FONT.getlength(ends[1]))
    width = max(width, *(round(FONT.getlength(line)) + 20 for line in RULES))
    picture, draw = _canvas(width + 1, 20 * len(RULES) + 22, palette)
    draw.rectangle((0, 1, 13, 14), palette.rule)
    for place, line in enumerate(RULES):
        _write(draw, (20, 20 * place), line, palette.muted)
    top = 20 * len(RULES) + 2
    _write(draw, (0, top), chosen, palette.muted)
    _map(picture, draw, (bar, top + 1), _blues(np.linspace(0, 1, BAR_PIXELS)[None].repeat(14, 0), palette), palette)
    _write(draw, (bar + BAR_PIXELS + 10, top), ends[1], palette.muted)
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
    picture: Image.Image, draw: ImageDraw.ImageDraw, at: tuple[int, int], colours: np.ndarray, palette: Palette
) -> None:
    """colours, uint8 [h, w, 3], a pixel each, in a frame."""
    image = Image.fromarray(colours)
    picture.paste(image, at)
    draw.rectangle((at[0] - 1, at[1] - 1, at[0] + image.width, at[1] + image.height), outline=palette.faint)
