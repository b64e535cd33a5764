"""tools.faults: the table of faults, the shares of identical outputs, and folders that are in use."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from patience import patient
from result_rows import make_row

from pipeline import read_results
from pipeline.engine.config import Completion, EngineConfig, Request
from pipeline.errors import JobError
from pipeline.results.rows import result_schema
from pipeline.results.sink import Sink
from pipeline.results.store import Store
from tools.faults import determinism, table
from tools.faults.__main__ import main
from tools.faults.bucket import bucket
from tools.faults.corpus import Count, write_model
from tools.faults.engines import BAD_WORD, VICTIM
from tools.faults.runs import Place


def test_a_used_folder_is_refused_by_every_command(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep this")
    for command in ("table", "kills", "restarts", "soak", "bucket"):
        with pytest.raises(JobError, match="it is not empty; give another"):
            main([command, "--folder", str(tmp_path)])
    with pytest.raises(JobError, match="it is not empty"):
        bucket(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_faults_by_name() -> None:
    assert [fault.name for fault in table.choose(["oom", "driver"])] == ["oom", "driver"]
    assert table.choose([]) == list(table.FAULTS.values())
    with pytest.raises(JobError, match="--only sigtrem: no such fault; did you mean 'sigterm'"):
        table.choose(["sigtrem"])
    assert (table.VICTIM, table.BAD_WORD) == (VICTIM, BAD_WORD)


def finished(folder: Path, statuses: dict[str, str], expected: int, taken: int, **victim: Any) -> Place:
    """A job's folder as a run with these rows leaves it."""
    store = Store(str(folder / "out"))
    store.create()
    sink = Sink(store, result_schema(), flush_documents=100, flush_seconds=1)
    for name, status in statuses.items():
        sink.add(make_row(name, "x", status, **(victim if name == VICTIM else {})))
    sink.flush()
    (folder / "engine.log").write_text("a line\n" * taken)
    (folder / "driver.log").write_text("its last words\n")
    ids = [VICTIM, *(f"d{i}" for i in range(expected - 1))]
    return Place(folder, ids, [])


def test_what_is_not_as_it_should_be_is_told(tmp_path: Path) -> None:
    killer, prefill, oom = (table.FAULTS[name] for name in ("killer", "prefill", "oom"))
    good = {VICTIM: "worker_died", "d0": "ok", "d1": "ok"}
    again = 3 + killer.again
    cases = {
        "": (killer, good, 3, again, 2),
        "1 rows lost": (killer, good, 4, again, 2),
        "exit code 1": (killer, good, 3, again, 1),
        "statuses": (killer, good | {VICTIM: "ok"}, 3, again, 2),
        "the victim's row is ok": (killer, good | {VICTIM: "ok", "d0": "worker_died"}, 3, again, 2),
        "computed again, at most": (killer, good, 3, again + 1, 2),
        "the fault did not happen": (prefill, good | {VICTIM: "ok"}, 3, 3, 0),
        "tried 0 times, expected 2": (oom, good | {VICTIM: "ok"}, 3, 3, 0),
    }
    for number, (message, (fault, statuses, expected, taken, code)) in enumerate(cases.items()):
        place = finished(tmp_path / str(number), statuses, expected, taken)
        found = table._problem(place, fault, code)
        assert message in found
        assert bool(found) == bool(message)
    tried = [table.Tried(killer, Count(3, 1, 0, {"ok": 2}, 9), 7.4, "a row is missing")]
    assert table.markdown(tried).splitlines()[-1] == (
        "| a document that kills its worker each time **a row is missing** | 3 | 1 | 0 | 6 (11) | 2 ok | 7 |"
    )


@pytest.mark.ray
def test_a_fault_is_tried_on_a_real_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "FEW", (8, 40))
    (tried,) = table.table(tmp_path, [table.FAULTS["decode"]], device="cpu")
    assert tried.problem == ""
    assert (tried.count.documents, tried.count.lost, tried.count.doubled) == (9, 0, 0)
    assert tried.count.statuses == {"ok": 9}
    assert 1 <= tried.count.again <= 9
    attempts = read_results(tmp_path / "decode" / "out", ["document_id", "attempts"]).to_pylist()
    assert {row["document_id"]: row["attempts"] for row in attempts}[VICTIM] == 2
    assert max(row["attempts"] for row in attempts) == 2
    log = (tmp_path / "decode" / "driver.log").read_text()
    assert "lost with" in log, "a worker was killed"


def test_shares_of_a_real_engine(tmp_path: Path) -> None:
    config = EngineConfig(str(write_model(tmp_path / "model")), device="cpu", arena_tokens=4000, chunk_tokens=256)
    config = replace(config, attention=determinism.SPARSE)
    prompts = determinism.make_prompts(config.model, 2, 400, texts=True)
    assert [len(ids) for ids in prompts.values()] == [300, 400]
    assert list(prompts) == ["random-0", "text-1"]
    shares = list(determinism.compare(config, prompts, 4, until=time.monotonic() + patient(900)))
    assert len(shares) == 2 * (len(determinism.VARIATIONS) + 2)
    assert {(share.same, share.documents) for share in shares} == {(2, 2)}


class Sociable:
    """An engine whose outputs depend on how many documents are in it."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.waiting: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def step(self) -> list[Completion]:
        request, number = self.waiting[0], len(self.waiting)
        self.waiting = self.waiting[1:]
        return [Completion(request.request_id, "ok", token_ids=[7, 7, number])]


def test_shares_of_an_engine_whose_documents_mind_their_company() -> None:
    requests = determinism.make_requests({"a": np.zeros(3, int), "b": np.zeros(3, int)}, 3)
    engine = Sociable(EngineConfig("none"))
    alone = determinism.generate(engine, requests, determinism.ALONE)
    assert set(map(tuple, alone.values())) == {(7, 7, 1)}
    variation = determinism.Variation("together")
    together = determinism.generate(engine, requests, variation)
    greedy, seeded = determinism.count_same(variation, alone, together, 0.0)
    # The last of the four is alone by then.
    assert (greedy.same, greedy.documents, greedy.parted) == (0, 2, (2, 2))
    assert (seeded.same, seeded.documents, seeded.parted) == (1, 2, (2,))
    assert determinism.markdown([greedy, seeded]).splitlines()[-1] == "| together | 0 of 2 | 1 of 2 |"


@pytest.mark.parametrize(
    ("one", "other", "place"), [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [], None)]
)
def test_first_differences(one: list[int], other: list[int], place: int | None) -> None:
    assert determinism.first_difference(one, other) == place


def test_full_width_steps_run_all_rows() -> None:
    from pipeline.engine import engine

    usual = engine.batch_bucket
    with determinism.full_width():
        assert engine.batch_bucket(1, 8) == 8
    assert engine.batch_bucket is usual
    assert usual(3, 8) == 4


def test_memory_that_is_taken_on_a_gpu_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls; that a real GPU then runs out is seen only on one."""
    import torch

    from tools.faults import engines

    calls: list[Any] = []
    room = {2 << 20: 2, 1 << 20: 1, 512: 3}
    empty = torch.empty

    def allocate(size: int, **about: Any) -> Any:
        if not room[size]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        room[size] -= 1
        return empty(1)

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: calls.append(share))
    monkeypatch.setattr(torch, "empty", allocate)
    device, taken = SimpleNamespace(type="cuda"), []
    with engines.memory_bound(device):  # type: ignore[arg-type]
        engines.take_memory(device, taken)  # type: ignore[arg-type]
    assert calls == ["empty", 0.0, 1.0]
    assert len(taken) == 6
