"""The same documents give the same outputs, whatever runs beside them, in what order, and after what interruption."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray_here import RayHere

from pipeline import read_results
from pipeline.engine import Engine, EngineConfig, Request
from pipeline.engine.config import Sampling
from pipeline.job.job import run
from pipeline.settings.config import JobConfig
from stem_core.config import StemConfig
from tools.faults.corpus import write_model

GREEDY, SEEDED = Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=5)
SPARSE = StemConfig.preset("release", block_size=16, stride=8, dense_below=0, dense_layers=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model")


def generate(
    tiny: Path,
    sampling: Sampling,
    attention: StemConfig | None,
    order: list[int],
    max_live: int,
    chunk: int,
    stop: int = 0,
) -> dict[str, list[int]]:
    """Token ids by document. stop: give half of the documents up after so many steps and add them again at the end."""
    config = EngineConfig(str(tiny), device="cpu", attention=attention, max_live=max_live, chunk_tokens=chunk)
    engine = Engine(config)
    requests = {}
    for i in order:
        ids = np.random.default_rng(i).integers(5, 2000, 40 + 37 * i)
        requests[f"d{i}"] = Request(f"d{i}", ids, 10 + i, sampling)
        engine.add(requests[f"d{i}"])
    done, steps = {}, 0
    while engine.has_work:
        steps += 1
        if steps == stop:
            for name in list(requests)[::2]:
                if name not in done:
                    engine.abort(name)
                    engine.add(requests[name])
        done |= {completion.request_id: completion.token_ids for completion in engine.step()}
    engine.close()
    return done


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("attention", [None, SPARSE], ids=["dense", "stem"])
def test_outputs_do_not_depend_on_company_order_or_interruptions(
    tiny: Path, sampling: Sampling, attention: StemConfig | None
) -> None:
    order = list(range(7))
    alone = generate(tiny, sampling, attention, order, max_live=1, chunk=4096, stop=0)
    assert len({tuple(ids) for ids in alone.values()}) == 7, "the documents have outputs of their own"
    for seed, (max_live, chunk, stop) in enumerate([(2, 64, 0), (7, 4096, 0), (4, 128, 9), (3, 64, 20)]):
        random.Random(seed).shuffle(order)
        assert generate(tiny, sampling, attention, order, max_live, chunk, stop) == alone, (max_live, chunk, stop)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_jobs_give_the_same_outputs_whatever_their_workers_and_deaths(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn outputs, which differ with any difference in logits or seeds, where greedy ones need a large one."""
    rows = [{"id": f"d{i}", "text": "the harbour committee reviewed the budget " * (3 + i)} for i in range(14)]
    rows.append({"id": "victim", "text": "the winter storm " * 70})

    def job(
        name: str, order: list[dict[str, Any]], engine: str = "pipeline.engine:Engine", **settings: Any
    ) -> dict[str, str]:
        docs = tmp_path / f"{name}.jsonl"
        docs.write_text("".join(json.dumps(row) + "\n" for row in order))
        values = {"input": str(docs), "output": str(tmp_path / name), "model": str(tiny), "device": "cpu"}
        values |= {"max_new_tokens": 12, "temperature": 0.8, "chunk_tokens": 128}
        run(JobConfig(**(values | settings)), engine_factory=engine, grace=1.0)  # type: ignore[arg-type]
        return {row["document_id"]: row["output"] for row in read_results(tmp_path / name).to_pylist()}

    (tiny / "prefill.once").unlink(missing_ok=True)
    with monkeypatch.context() as patch:  # the worker is in this process
        patch.setattr("pipeline.workers.ray_pool.ray", RayHere())
        first = job("one", rows, "pipeline.engine:Engine", workers=1, max_live=1)
    assert len(first) == 15
    assert job("two", rows[::-1], "tools.faults.engines:DiesInPrefill", workers=2, max_live=5) == first
    assert (tiny / "prefill.once").exists(), "one of its workers was killed"
    attempts = {row["document_id"]: row["attempts"] for row in read_results(tmp_path / "two").to_pylist()}
    assert attempts["victim"] == max(attempts.values()) == 2
