"""The quality floor: sparse prefill at the demo's settings must keep the findings of a long report."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from jobs.demo.scoring import Score, read_findings, score
from pipeline.engine import Engine, EngineConfig, Request
from pipeline.prompts.prompt import PromptBuilder
from pipeline.prompts.tokens import load_tokens
from pipeline.settings.config import JobConfig, read_job_file
from pipeline.settings.questions import first_task
from stem_core.budget import row_budgets
from stem_core.config import StemConfig

ROOT = Path(__file__).parents[2]
# 6 findings in 8.3K tokens. Real prose is read by the same settings in tests/test_examples.py (the notebook).
REPORT = "report-02.txt"
FLOOR = 0.95
BROKEN = 0.6


@cache
def demo_job() -> JobConfig:
    settings = read_job_file(str(ROOT / "examples/demo.yaml"))
    return JobConfig(**settings | {"model": str(ROOT / settings["model"]), "output": "unused"})


def demo_attention() -> StemConfig:
    attention = demo_job().stem()
    assert attention is not None
    return attention


def sink_and_window(config: StemConfig) -> StemConfig:
    """As many blocks in every row as `config` keeps, none of them chosen by a score."""
    n_blocks = 8192 // config.block_size
    kept = int(row_budgets(n_blocks, config)[: n_blocks - config.dense_tail].max())
    return config.replace(local_blocks=kept - config.sink_blocks)


def summarise(attention: StemConfig) -> Score:
    """A free-running greedy summary of REPORT, through prompt and engine as in the main job."""
    job = demo_job()
    tokens = load_tokens(job.model)
    builder = PromptBuilder(tokens, first_task(job))
    engine = Engine(EngineConfig(model=job.model, device="cpu", attention=attention, arena_tokens=20_000))
    text = (ROOT / f"examples/documents/{REPORT}").read_text(encoding="utf-8")
    prompt = builder.build(text, engine.max_context - job.max_new_tokens)
    engine.add(Request(REPORT, prompt.ids.tolist(), job.max_new_tokens))
    completions = []
    while engine.has_work:
        completions += engine.step()
    [completion] = completions
    assert completion.status == "ok", completion.error
    assert completion.attention == "stem"
    assert completion.density == pytest.approx(attention.density, abs=0.02)
    return score(tokens.decode(completion.token_ids), read_findings(ROOT / "examples/findings.jsonl")[REPORT])


def test_demo_settings_keep_the_findings() -> None:
    found = summarise(demo_attention())
    assert found.recall >= FLOOR, f"{found.found} of {found.planted} findings"


def test_selection_without_scores_loses_findings() -> None:
    """Else the floor would hold whatever the selection does."""
    found = summarise(sink_and_window(demo_attention()))
    assert found.recall <= BROKEN, f"{found.found} of {found.planted} findings"
