"""Documents and results in an S3-compatible server that runs here; the job is stopped like by kill -9, and resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import read_results
from pipeline.errors import JobError
from pipeline.job.job import run
from pipeline.results import lock
from pipeline.results.parts import compact, part_names
from pipeline.results.store import Store
from pipeline.settings.config import JobConfig
from pipeline.source import DocumentReader, find_files, list_documents

pytest.importorskip("moto.server", reason="needs moto[server]")
from tools.faults.bucket import KEYS, credentials, server, upload

pytestmark = pytest.mark.usefixtures("ray_here")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with credentials(), server() as address:
        yield address


SECRET = "quite-secret"


class KilledError(BaseException):
    """The process is gone: nothing is cleared away, as far as that can be played inside one."""


def test_a_job_from_and_to_a_bucket_is_killed_and_resumed(
    tmp_path: Path, endpoint: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.5)
    monkeypatch.setattr(lock, "LEASE_SECONDS", 8.0)
    (tmp_path / "docs").mkdir()
    rows = [{"id": f"d{i:02}", "text": f"text {i} " * 9} for i in range(12)]
    (tmp_path / "docs" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "docs" / "plain.txt").write_text("a file of its own")
    source, output = upload(tmp_path / "docs", endpoint, "faults")
    # Workers on a cluster do not have this process's environment, so keys stand in the URIs here.
    source, place = (uri.replace("s3://", f"s3://nobody:{SECRET}@") for uri in (source, output))
    for name in KEYS:
        monkeypatch.delenv(name)

    def job(**settings: Any) -> Any:
        values = {"input": source, "output": place, "model": str(model), "device": "cpu", "workers": 1}
        values |= {"max_new_tokens": 8, "flush_documents": 4} | settings
        return run(JobConfig(**values), engine_factory="fake_engine:FakeEngine")  # type: ignore[arg-type]

    written = []
    real = Store.put

    def dies(store: Store, name: str, data: Any) -> None:
        if name.startswith("part-"):
            if len(written) == 2:
                raise KilledError
            written.append(name)
        real(store, name, data)

    with monkeypatch.context() as dying:
        dying.setattr(Store, "put", dies)
        # A killed process does not give its claim back either.
        dying.setattr(lock.ClaimLock, "release", lambda self: self._stop.set())
        with pytest.raises(KilledError):
            job()
    before = {row["document_id"]: row for row in read_results(place).to_pylist()}
    assert len(before) == 8
    report = job()
    assert report.done_now == 13 - 8
    after = {row["document_id"]: row for row in read_results(place).to_pylist()}
    assert sorted(after) == sorted([*(row["id"] for row in rows), "plain.txt"])
    assert read_results(place).num_rows == 13
    assert all(after[name] == row for name, row in before.items())
    assert "nothing to do" in job().messages[-1]
    assert compact(Store(place)) == 1
    assert read_results(place).num_rows == 13

    store = Store(place)
    with store.locked(), pytest.raises(JobError, match="another job is writing there"):
        job()
    manifest = store.read("manifest.json") or b""
    assert SECRET.encode() not in manifest
    assert b"s3://faults/docs" in manifest
    assert SECRET not in str(after) + str(report)
    assert part_names(store)[0].startswith("part-000000-")


def test_names_with_signs_of_uris_in_a_bucket(tmp_path: Path, endpoint: str) -> None:
    (tmp_path / "docs").mkdir()
    source, _ = upload(tmp_path / "docs", endpoint, "names")
    query = source.partition("?")[2]
    for number in (1, 2):
        store = Store(f"s3://names/out#{number}?{query}")
        store.create()
        store.write("a b%20.txt", b"text %d" % number)
        files, _ = find_files((f"s3://names/out#{number}?{query}",))
        assert [file.name for file in files] == [f"s3://names/out%23{number}/a%20b%2520.txt"]
        for location in (files[0].name, f"s3://names/out#{number}/a b%2520.txt", f"s3://names/out%23{number}/*.txt"):
            document = list_documents(find_files((f"{location}?{query}",))[0]).document(0)
            assert DocumentReader("text", []).read(document)[0] == f"text {number}"
    assert not Store(f"s3://names/out?{query}").list()
