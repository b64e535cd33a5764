"""An estimator is one file and one entry of a table: nothing else knows the estimators by name."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from kernels.block_selection import BlockSelection, choose_block_selection
from kernels.dispatch import Choice
from pipeline.engine import Engine, EngineConfig, Request
from pipeline.engine.memory.rehearsal import key_state_bytes
from pipeline.settings.config import STEM_OVERRIDES
from stem_core import PromptBudget, StemConfig, patch_model
from stem_core.attention import stem_prefill
from stem_core.budget import prompt_budget
from stem_core.estimators import ESTIMATORS, Chunk, Estimator, EstimatorSettings
from stem_core.estimators.sample import Sample
from stem_core.selection import HEAD_CAP, HEAD_FLOOR, RULES, Rule, stem_selection
from tests.pipeline.engine_models import last_logits, prompts, run, save_model

ROOT = Path(__file__).parents[1]
OWN_FIELDS = {item.name for item in fields(EstimatorSettings)}


def names_in(node: ast.AST) -> set[str]:
    """Estimators' names among the string constants below `node`."""
    found = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}
    return found & set(ESTIMATORS)


def choices_by_name(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Where code decides by an estimator's name, or reads a setting of one estimator.

    Naming one as a value is no decision: {"estimator": "oam"}, replace(config, estimator="oam"), a preset, a heading.
    """
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Compare | ast.MatchValue) and names_in(node):
            yield line, "compares with a name"
        elif isinstance(node, ast.Tuple | ast.List | ast.Set) and len(names_in(node)) > 1:
            yield line, "lists names"
        elif isinstance(node, ast.Dict) and sum(key is not None and bool(names_in(key)) for key in node.keys) > 1:
            yield line, "is a table by name"
        elif isinstance(node, ast.Attribute) and node.attr in OWN_FIELDS - {"stride"}:  # tensors have strides, too
            yield line, f"reads {node.attr}"


def test_no_code_but_an_estimators_own_decides_by_its_name() -> None:
    files = [path for folder in ("stem_core", "pipeline", "jobs", "tools") for path in (ROOT / folder).rglob("*.py")]
    files = [path for path in files if path.parent != ROOT / "stem_core" / "estimators"]
    assert len(files) > 150
    found = [
        f"{path.relative_to(ROOT)}:{line} {what}"
        for path in files
        for line, what in choices_by_name(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        'if config.estimator == "sample": pass',
        'if config.estimator in ("oam", "other"): pass',
        'KNOWN = ("oam", "sample")',
        'SCORES = {"oam": 1, "sample": 2}',
        "rows = config.sample_rows",
        'match name:\n    case "oam": pass',
    ],
)
def test_such_code_would_be_found(code: str) -> None:
    assert list(choices_by_name(ast.parse(code)))


def test_every_setting_of_an_estimator_is_a_setting_of_jobs() -> None:
    assert set(STEM_OVERRIDES) >= OWN_FIELDS >= {"stride", "value_weight", "sample_rows"}


def test_settings_are_known_without_torch() -> None:
    code = "import sys, jobs.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_costs_are_shares_of_dense_attention() -> None:
    config = StemConfig(block_size=64, stride=8, sample_rows=8)
    # Of a pair of blocks, in products of D channels: dense attention takes 64 * 64 for logits and as many for outputs.
    products = {"sample": 8 * 64, "oam": 8}
    assert {name: ESTIMATORS[name].cost(config) for name in ESTIMATORS} == {
        name: count / (2 * 64 * 64) for name, count in products.items()
    }


@dataclass
class BlockMeans:
    """Mean key of each complete block."""

    means: Tensor
    blocks: int = 0

    @property
    def tensors(self) -> tuple[Tensor]:
        return (self.means,)


class Toy(Estimator):
    """Mean query times mean key, and the heads of a layer share a query block's budget."""

    name, meaning, largest_block = "toy", "products of means", 16

    def cost(self, config: StemConfig) -> float:
        return 1 / (2 * config.block_size**2)

    def choose(self, q: Tensor, config: StemConfig) -> Choice:
        return Choice("reference", "toys have no other")

    def new_key_state(self, config: StemConfig, k: Tensor, prompt_tokens: int, device: torch.device) -> BlockMeans:
        blocks = -(-prompt_tokens // config.block_size)
        return BlockMeans(torch.empty(k.shape[0], k.shape[1], blocks, k.shape[3], device=device))

    def scores(self, chunk: Chunk, config: StemConfig) -> Tensor:
        size, end = config.block_size, chunk.start + chunk.q.shape[2]
        state = chunk.keys or self.new_key_state(config, chunk.k, end, chunk.k.device)
        assert isinstance(state, BlockMeans)
        assert state.blocks * size == chunk.start
        new = chunk.k[:, :, chunk.start - chunk.key_start : end - chunk.key_start]
        whole = new.shape[2] // size
        state.means[:, :, state.blocks : state.blocks + whole] = means(new[:, :, : whole * size], size)
        state.blocks += whole
        known = means(chunk.k, size) if chunk.keys is None else state.means[:, :, : -(-end // size)]
        return means(chunk.q, size) @ known.repeat_interleave(chunk.q.shape[1] // known.shape[1], 1).mT

    def rule(self, config: StemConfig) -> str:
        return "toy"


def means(x: Tensor, size: int) -> Tensor:
    return torch.stack([part.float().mean(2) for part in x.split(size, 2)], 2) if x.shape[2] else x.float()


def shared_by_heads(
    scores: Tensor, config: StemConfig, budget: PromptBudget, first_row: int, impl: str
) -> BlockSelection:
    """The best of all heads' blocks for each query block, its diagonal in every head."""
    N, H, rows, n_keys = scores.shape
    i, j = torch.arange(first_row, first_row + rows)[:, None], torch.arange(n_keys)
    ranked = scores.masked_fill(j == i, torch.inf).masked_fill(j > i, -torch.inf).transpose(1, 2).flatten(2)
    place = ranked.argsort(-1, descending=True).argsort(-1).view(N, rows, H, n_keys).transpose(1, 2)
    kept = place < H * budget.rows(first_row, first_row + rows, scores.device)[:, None]
    return BlockSelection(torch.where(kept, j, n_keys).sort(-1).values.int(), kept.sum(-1, dtype=torch.int32))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Registers the toy and its rule; gets the counts [N, H, rows] of all selections."""
    counts: list[Tensor] = []

    def noted(*arguments: Any) -> BlockSelection:
        selection = shared_by_heads(*arguments)
        counts.append(selection.counts)
        return selection

    monkeypatch.setitem(ESTIMATORS, "toy", Toy())
    monkeypatch.setitem(RULES, "toy", Rule(noted, choose_block_selection))
    return counts


def test_an_entry_in_the_table_is_all_that_a_new_estimator_takes(tmp_path: Path, toy: list[Tensor]) -> None:
    stem = StemConfig(
        schedule="density", density=0.2, block_size=16, estimator="toy", dense_layers=1, sink_blocks=0, local_blocks=1
    )
    folder, prompt = save_model(tmp_path, "qwen3"), prompts([700])[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.as_tensor(prompt)[None]
    expected = patch_model(model, stem).generate(
        ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids)
    )
    whole = [counts.clone() for counts in toy]
    assert all(len(counts.unique(dim=1)[0]) > 1 for counts in whole), "heads keep different numbers of blocks"

    toy.clear()
    config = EngineConfig(str(folder), device="cpu", attention=stem, arena_tokens=1024, chunk_tokens=128)
    engine = Engine(config)
    done = run(engine, [Request("a", prompt, 8)])["a"]
    assert done.token_ids == expected[0, 700:].tolist()
    toy[-2:] = [torch.cat(toy[-2:], 2)]  # the last layer takes the prompt's last block apart
    for layer, counts in enumerate(whole):
        assert torch.equal(torch.cat(toy[layer :: len(whole)], 2), counts), "chunks select what the whole prompt does"
    assert "scores: toy reference (toys have no other)" in done.kernel
    # Two sparse layers of 2 KV heads: 44 blocks of a float32 mean of 16.
    assert key_state_bytes(engine._runner, 700) == 2 * 2 * 44 * 16 * 4
    sparse, dense = last_logits(engine, prompt), last_logits(Engine(replace(config, attention=None)), prompt)
    assert (sparse - dense).abs().max() > 0.1, "sparse prefill must show, or this test shows nothing"
    with pytest.raises(ValueError, match="estimator 'toy' takes blocks of up to 16 tokens, got block_size=32"):
        stem.replace(block_size=32)


class EvenSample(Sample):
    """The shares of sampled queries, but every head has the query block's budget."""

    name = "even"

    def rule(self, config: StemConfig) -> str:
        return "rows"


def uneven_heads(length: int) -> list[Tensor]:
    """q, k, v of 4 and 2 heads; a head's queries are the sharper, the higher its number."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, 16, generator=generator) for heads in (4, 2, 2))
    return [q * torch.tensor([0.1, 0.5, 2.0, 6.0])[:, None, None], k, v]


@pytest.mark.parametrize("schedule", ["release", "density"])
def test_heads_share_budgets(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ESTIMATORS, "even", EvenSample())
    config = StemConfig(
        schedule=schedule, density=0.2 if schedule == "density" else None, block_size=16, estimator="sample",
        sink_blocks=1, local_blocks=2, dense_tail=2,
    )  # fmt: skip
    length, n = 1900, 119
    q, k, v = uneven_heads(length)
    budget = prompt_budget(length, config)
    assert budget.budgets is not None
    whole = stem_selection(q, k, v, config, budget)
    budgets, causal = torch.tensor(budget.budgets), torch.arange(1, n + 1)
    assert torch.equal(whole.counts.sum(1)[0], 4 * budgets)
    assert whole.density() == pytest.approx(budget.density)
    assert (whole.counts >= (HEAD_FLOOR * budgets).ceil()).all()
    assert (whole.counts <= (HEAD_CAP * budgets).ceil().minimum(causal)).all()
    assert (whole.counts[:, :, -2:] == causal[-2:]).all(), "the dense tail"
    sparse = whole.counts[0, :, budgets < causal].double().mean(1)
    assert sparse[3] > 2 * sparse[0], "every row of a sharp head has blocks of its own; those of a dull one are alike"
    kept = whole.to_mask(n)
    assert (kept.sum(-1) == whole.counts).all()

    assert whole.order is not None
    assert torch.equal(whole.order.sort(-1).values, torch.arange(2 * n).expand(1, 2, -1))
    sizes = whole.counts.view(1, 2, 2, n).flip(-1).transpose(2, 3).flatten(2).gather(-1, whole.order.long())
    assert (sizes.diff() <= 0).all()

    for start in range(0, length, 7 * 16):
        end = min(length, start + 7 * 16)
        part = stem_selection(q[:, :, start:end], k[:, :, :end], v[:, :, :end], config, budget, start=start)
        rows = slice(start // 16, -(-end // 16))
        assert torch.equal(part.to_mask(n), kept[:, :, rows]), f"chunk at {start}"

    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def error(chosen: StemConfig) -> float:
        return float((stem_prefill(q, k, v, chosen, budget) - dense).norm() / dense.norm())

    assert error(config) < error(config.replace(estimator="even"))


def test_scores_that_do_not_compare_are_not_shared_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(ESTIMATORS["oam"]), "rule", lambda self, config: "heads")
    q, k, v = uneven_heads(200)
    config = StemConfig(schedule="density", density=0.5, block_size=16)
    with pytest.raises(AssertionError, match="other scores do not compare across heads"):
        stem_selection(q, k, v, config, prompt_budget(200, config))
