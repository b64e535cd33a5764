"""jobs.inspect: what it shows is what the attention kept, and the page can be read in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import stem_core.attention
import stem_core.selection
from jobs.inspect.__main__ import PAGE, chosen_layers, main
from jobs.inspect.capture import Capture, _why_dense, capture
from jobs.inspect.cells import Grid, LayerCells
from jobs.inspect.charts import map_chart
from jobs.inspect.page import PATTERNS
from jobs.inspect.pictures import (
    BY_HEADS,
    DARK,
    LIGHT,
    OF_A_CELL,
    key_picture,
    map_colours,
    map_picture,
    mostly_rule,
)
from jobs.page.numbers import stretches
from kernels.block_selection import BlockSelection, select_blocks
from pipeline.errors import JobError
from pipeline.prompts.prompt import PromptBuilder
from pipeline.prompts.task import make_task
from pipeline.prompts.tokens import load_tokens
from pipeline.settings.config import JobConfig
from stem_core import StemConfig, patch_model
from stem_core.budget import PromptBudget, prompt_budget
from stem_core.policy import LayerPolicy

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "examples" / "documents" / "report-01.txt"
QUESTION = "List the key findings in order."
SETTINGS: dict[str, Any] = {
    "preset": "sampled", "budget": 0.4, "block_size": 16, "dense_layers": 1, "dense_below": 0,
    "dense_tail": 2, "question": QUESTION, "max_new_tokens": 8, "device": "cpu",
}  # fmt: skip
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]


def job(model: Path, **changes: Any) -> JobConfig:
    return JobConfig(input="x", output="x", model=str(model), **(SETTINGS | changes))


@pytest.fixture(scope="module")
def text() -> str:
    return REPORT.read_text(encoding="utf-8")[:6000]


@pytest.fixture(scope="module")
def seen(model: Path, text: str) -> Capture:
    """A prompt of about 1,200 tokens, in chunks of 320."""
    return capture(job(model, chunk_tokens=320), text)


def masks_of_the_model(model: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[torch.Tensor], int]:
    """bool [H, n, n] of each sparse layer, from plain transformers with patch_model, in one piece; tokens read."""
    from transformers import AutoModelForCausalLM

    stem = job(model).stem()
    ids = PromptBuilder(load_tokens(str(model)), make_task("summarize", QUESTION, None)).build(text, 1 << 20).prefix
    ids = ids[: len(ids) // 64 * 64]  # whole units of the arena: the rest is read densely, with the question
    found: list[torch.Tensor] = []

    def spy(scores: torch.Tensor, *args: Any, **kwargs: Any) -> BlockSelection:
        selection = select_blocks(scores, *args, **kwargs)
        found.append(selection.to_mask(scores.shape[-1])[0])
        return selection

    monkeypatch.setattr(stem_core.selection, "select_blocks", spy)
    plain = patch_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), stem)
    with torch.inference_mode():
        plain(torch.from_numpy(ids.astype(np.int64))[None], logits_to_keep=1)
    return found, len(ids)


def test_it_shows_the_blocks_that_the_model_keeps(
    seen: Capture, model: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks, tokens = masks_of_the_model(model, text, monkeypatch)
    n = -(-tokens // 16)
    assert len(seen.prompt) == tokens
    assert sorted(seen.layers) == [1, 2, 3, 4, 5, 6, 7]
    assert seen.grid.per_cell == 1
    for layer, mask in zip(seen.layers, masks, strict=True):
        cells = seen.layers[layer]
        assert (cells.kept == mask.sum((0, 2)).numpy()).all(), f"layer {layer}"
        rule = torch.from_numpy(seen.grid.rule(np.arange(n)))
        assert mask[:, rule].all(), "what is drawn as kept by rule is kept by every head"
        assert (cells.by_score == (mask & ~rule).numpy()).all(), f"layer {layer}"
        assert cells.density == pytest.approx(seen.densities[layer])
    assert seen.densities[0] == 1.0
    assert seen.dense == {0: "leading layer, dense by --dense-layers"}
    assert seen.density == pytest.approx(sum(seen.densities) / 8)
    assert stem_core.attention.stem_selection.__module__ == "stem_core.selection", "the product is as it was"


def random_layer(n: int, most_cells: int, heads: int = 3) -> tuple[LayerCells, np.ndarray, np.ndarray]:
    """Cells of random selections handed over in uneven pieces; masks bool [H, n, n]; the rule [n, n]."""
    stem = StemConfig(
        schedule="density", density=0.5, block_size=16, sink_blocks=2, local_blocks=3, dense_tail=2, stride=16
    )
    budget = prompt_budget(n * 16, stem)
    assert isinstance(budget, PromptBudget)
    assert budget.budgets is not None
    grid = Grid.of(stem, budget, most_cells)
    scores = torch.from_numpy(np.random.default_rng(n).random((1, heads, n, n), dtype=np.float32))
    cells = LayerCells.of(grid, heads)
    masks = []
    for first, last in ((0, 5), (5, n - 1), (n - 1, n)):
        selection = select_blocks(
            scores[:, :, first:last], torch.from_numpy(budget.budgets[first:last].copy()), first_row=first,
            sink_blocks=2, local_blocks=3, max_blocks=int(budget.budgets[first:last].max()),
        )  # fmt: skip
        masks.append(selection.to_mask(n)[0].numpy())
        cells.add(selection, first)
    query, key = np.arange(n)[:, None], np.arange(n)
    rule = (key < 2) | (query - key < 3) | (budget.budgets[:, None] > query)
    return cells, np.concatenate(masks, 1), rule & (key <= query)


@pytest.mark.parametrize(("n", "most_cells"), [(29, 240), (41, 9), (300, 50)])
def test_cells_count_what_the_masks_hold(n: int, most_cells: int) -> None:
    cells, masks, rule = random_layer(n, most_cells)
    chosen = masks & ~rule
    size = cells.grid.per_cell
    assert cells.grid.cells == -(-n // size) <= most_cells
    for head, row, column in np.ndindex(cells.by_score.shape):
        square = chosen[head, row * size : (row + 1) * size, column * size : (column + 1) * size]
        assert cells.by_score[head, row, column] == square.sum()
    assert cells.grid.by_rule.sum() == rule.sum()
    assert cells.grid.causal.sum() == n * (n + 1) // 2
    assert cells.density == pytest.approx(masks.sum() / (3 * n * (n + 1) / 2))
    assert (cells.agreement == np.bincount(chosen.sum(0).ravel(), minlength=4)).all()
    heads, query, key = np.nonzero(chosen)
    assert (cells.reach == np.bincount(query - key, minlength=n)).all()
    assert cells.reach_tokens(0.5) == np.sort(query - key)[-(-len(key) // 2) - 1] * 16
    assert (cells.readers == np.bincount(key, minlength=n)).all()
    pairs = sum((chosen[a] & chosen[b]).sum() for a in range(3) for b in range(3) if a != b)
    assert cells.shared == pytest.approx(pairs / (2 * chosen.sum()))
    could = (np.tril(np.ones((n, n), bool)) & ~rule).sum(0)
    for block, part in cells.read_most(4):
        assert part == pytest.approx(chosen[:, :, block].sum() / (3 * could[block]))
    free = np.isfinite(cells.shares())
    assert (free == (cells.grid.causal > cells.grid.by_rule)).all()
    assert np.nanmax(cells.shares(0)) <= 1


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("columns", lambda query, key: key % 5 == 0),
        ("diagonals", lambda query, key: (query - key) % 7 < 2),
        ("mixed", lambda query, key: (key % 5 == 0) | ((query - key) % 7 == 0)),
        ("scattered", lambda query, key: np.random.default_rng(0).random((60, 60)) < 0.3),
    ],
)
def test_stripes_are_named(name: str, share: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    cells, _, _ = random_layer(60, 240)
    cells.by_score[:] = share(np.arange(60)[:, None], np.arange(60))
    assert cells.pattern().name == name
    assert set(PATTERNS) >= {name}
    cells.by_score[:] = 0
    assert cells.pattern().name == "none", "no stripes where nothing was chosen"
    told = map_chart(2, cells, 960).note
    assert "Half of the chosen blocks" not in told


def test_colours_tell_rule_from_score() -> None:
    cells, _, rule = random_layer(41, 240)
    colours = map_colours(cells.grid, cells.shares())
    assert (mostly_rule(cells.grid) == rule).all()
    assert (colours[rule] == LIGHT.rule).all()
    assert (colours[np.triu_indices(41, 1)] == LIGHT.page).all()
    free = np.isfinite(cells.shares())
    order = np.argsort(cells.shares()[free])
    assert (np.diff(colours[free][order].astype(int).sum(1)) <= 0).all(), "the more heads, the darker"
    dark = map_colours(cells.grid, cells.shares(), DARK)
    assert (np.diff(dark[free][order].astype(int).sum(1)) >= 0).all(), "on a dark page, the lighter"
    assert (dark[np.triu_indices(41, 1)] == DARK.page).all()


def test_what_the_colours_mean_fits_a_phone() -> None:
    for ends in (BY_HEADS, OF_A_CELL):
        assert opened(key_picture(ends)).width <= 358, "a phone's width without its margins"


@pytest.mark.parametrize(("cells", "by"), [(80, 1), (480, 2)])
def test_a_map_is_drawn_as_it_is_or_as_means_of_squares(cells: int, by: int) -> None:
    colours = np.random.default_rng(0).integers(0, 255, (cells, cells, 3)).astype(np.uint8)
    picture = np.asarray(opened(map_picture(colours, 240)), float)
    means = colours.reshape(cells // by, by, cells // by, by, 3).mean((1, 3))
    drawn = picture[1:-1, 1:-1]
    assert drawn.shape == (240, 240, 3)
    assert np.abs(drawn - means.repeat(240 * by // cells, 0).repeat(240 * by // cells, 1)).max() <= 0.5
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge == LIGHT.faint).all(), "a frame around it"


def opened(png: bytes) -> Image.Image:
    return Image.open(BytesIO(png))


def test_a_leading_layer_with_a_window_is_not_called_dense() -> None:
    stem = StemConfig(dense_layers=2)
    assert _why_dense(LayerPolicy(stem, 0), 512) == "sliding window of 512 tokens"
    assert _why_dense(LayerPolicy(stem, 1), None) == "leading layer, dense by --dense-layers"
    assert stretches([0, 1, 2, 3, 4, 6, 8, 9]) == ["0 to 4", "6", "8 to 9"]


@pytest.fixture
def run(run_command: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    return partial(run_command, main)


def test_the_page_in_a_browser(
    tmp_path: Path, model: Path, text: str, run: Any, open_page: Any, visit: Callable[..., Any]
) -> None:
    out, file = tmp_path / "out", tmp_path / "docs.jsonl"
    file.write_text(json.dumps({"id": "a<b>", "text": text}) + "\n" + json.dumps({"id": "other", "text": "x"}) + "\n")
    code, told, _ = run(
        "--document", file, "--id", "a<b>", "--model", model, "--output", out, "--layers", "2", "6", *FLAGS
    )
    assert code == 0
    assert str(out / PAGE) in told
    assert [path.name for path in out.iterdir()] == [PAGE]
    for width, dark in ((1280, False), (390, True)):
        page = open_page(out / PAGE, width=width, dark=dark)
        assert "What sparse prefill keeps of a<b>" in page.text
        assert len(page.charts) == 2 + 3, "two maps, two budget curves, density by layer"
        for words in ("Layer 2", "Layer 6", "The stripes run", "the sink, at the left edge", "Layer 0: leading layer"):
            assert words in page.text
    assert "query token" in page.chart_text[0]
    phone = visit(out / PAGE, width=390, shows="html[data-charts=drawn]")
    assert phone.locator(".pictures").count() == 3, "of all layers, and of the heads of two"
    assert not phone.evaluate(
        "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
    )


def test_layers_are_chosen_to_differ(seen: Capture) -> None:
    patterns = {layer: cells.pattern() for layer, cells in seen.layers.items()}
    chosen = chosen_layers(seen, None)
    assert chosen == sorted(chosen)
    assert {1, 7, max(patterns, key=lambda layer: patterns[layer].columns)} <= set(chosen)
    assert chosen_layers(seen, ["all"]) == [1, 2, 3, 4, 5, 6, 7]
    assert chosen_layers(seen, ["5", "2", "5"]) == [5, 2]
    with pytest.raises(JobError, match="--layers 0: leading layer"):
        chosen_layers(seen, ["0"])
    for wrong in ("8", "-1", "first"):
        with pytest.raises(JobError, match="all, or layers from 0 to 7"):
            chosen_layers(seen, [wrong])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attention", "dense"], "--attention dense keeps every block"),
        (["--preset", "release"], "runs dense, nothing is left out: .*--block-size 16"),
        ([*FLAGS, "--max-context", "200"], "the limit is 192.*--too-long truncate"),
        ([*FLAGS, "--id", "report-1.txt"], "--id report-1.txt: there is none.*did you mean 'report-01.txt'"),
        (["--no-such-flag"], "--no-such-flag is not a flag"),
        (["--output-columns"], "is not a flag"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, tmp_path: Path, model: Path, text: str, run: Any
) -> None:
    file = tmp_path / "report-01.txt"
    file.write_text(text)
    code, _, told = run("--document", file, "--model", model, "--output", tmp_path / "out", *flags)
    assert code == 1
    line = told.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_read_or_written_is_told_by_its_flag(tmp_path: Path, model: Path, run: Any) -> None:
    code, _, told = run("--document", tmp_path / "none.txt", "--model", model, "--output", tmp_path / "out")
    assert (code, told.count("--input")) == (1, 0)
    assert f"--document {tmp_path}/none.txt: does not exist" in told
    (tmp_path / "file").write_text("x")
    code, _, told = run("--document", tmp_path / "file.txt", "--model", model, "--output", tmp_path / "file")
    assert (code, told) == (1, f"error: --output {tmp_path}/file: {tmp_path}/file is a file; give a folder\n")


def test_several_documents_need_an_id(tmp_path: Path, model: Path, run: Any) -> None:
    file = tmp_path / "docs.jsonl"
    file.write_text('{"id": "first", "text": "x"}\n{"id": "second", "text": "y"}\n')
    code, _, told = run("--document", file, "--model", model, "--output", tmp_path / "out")
    assert code == 1
    assert "holds 2 documents: give --id, e.g. --id first" in told
