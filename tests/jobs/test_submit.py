"""A job on a cluster that was started with `ray start`: by jobs.submit, by `ray job submit`, and stopped halfway."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from patience import patient
from shell import shell

from jobs.submit import connect
from pipeline import read_results, summarize
from pipeline.errors import JobError

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.ray


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]


def environment() -> dict[str, str]:
    """What a user's shell has; nothing of the other tests' cluster."""
    kept = {key: value for key, value in shell().items() if not key.startswith("PYTHONPATH")}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
    return kept | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "PATH": path}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the job server of a cluster with two cores.

    In a folder of its own: Ray gives a job the address of the cluster that was started last in its server's folder, and
    other tests start some in Ray's usual one. The folder's path must be short, for the sockets in it.
    """
    port, dashboard, agent, client = free_ports(4)
    ray = shutil.which("ray", path=environment()["PATH"])
    assert ray
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = f"""{ray} start --head --block --port {port} --dashboard-host 127.0.0.1 --dashboard-port {dashboard}
            --dashboard-agent-listen-port {agent} --ray-client-server-port {client} --node-ip-address 127.0.0.1
            --num-cpus 2 --object-store-memory 100000000 --disable-usage-stats --temp-dir {folder}""".split()
        log = tmp_path_factory.mktemp("ray") / "log"
        with (
            log.open("w") as file,
            subprocess.Popen(command, env=environment(), stdout=file, stderr=file) as head,
        ):
            address = f"http://127.0.0.1:{dashboard}"
            until = time.monotonic() + patient(90)
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api/version", timeout=2):
                    break
                assert head.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.5)
            yield address
            head.terminate()


def write(folder: Path, count: int, words: int) -> Path:
    folder.mkdir()
    for i in range(count):
        (folder / f"d{i:03}.txt").write_text(f"Report {i}. " + "The harbour budget was reviewed in spring. " * words)
    return folder


def flags(docs: Path, out: Path, model: Path) -> list[str]:
    return [
        "--input",
        str(docs),
        "--output",
        str(out),
        "--model",
        str(model),
        "--workers",
        "1",
        "--max-new-tokens",
        "8",
    ]


def ray_submit(address: str) -> list[str]:
    return f"ray job submit --address {address} --working-dir . -- python -m jobs.summarize".split()


def outputs(folder: Path) -> dict[str, str | None]:
    table = read_results(folder, ["document_id", "output"]).to_pylist()
    assert len({row["document_id"] for row in table}) == len(table)
    return {row["document_id"]: row["output"] for row in table}


def call(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=patient(240), check=False
    )


def test_both_ways_of_submitting_give_the_outputs_of_this_machine_and_a_jobs_exit_codes(
    cluster: str, tmp_path: Path, model: Path
) -> None:
    docs = write(tmp_path / "docs", 3, 5)
    local = summarize(input=docs, model=model, max_new_tokens=8).to_pylist()
    ray = call(*ray_submit(cluster), *flags(docs, tmp_path / "ray", model))
    assert ray.returncode == 0, ray.stdout[-2000:] + ray.stderr[-2000:]
    (docs / "empty.txt").write_bytes(b"")
    submitted = call(
        sys.executable, "-m", "jobs.submit", "--address", cluster, *flags(docs, tmp_path / "submit", model)
    )
    assert submitted.returncode == 2, submitted.stdout[-2000:] + submitted.stderr[-2000:]
    assert "3 of 4" in submitted.stdout
    assert "empty.txt: its text is empty" in submitted.stdout
    expected = {row["document_id"]: row["output"] for row in local}
    assert len(expected) == 3
    assert outputs(tmp_path / "ray") == expected
    assert outputs(tmp_path / "submit") == expected | {"empty.txt": None}


def test_what_cannot_run_on_a_cluster_is_told(cluster: str, tmp_path: Path, model: Path) -> None:
    docs = write(tmp_path / "docs", 1, 5)
    relative = call(*ray_submit(cluster), *flags(docs, Path("relative"), model))
    assert relative.returncode != 0
    assert "a submitted job runs in a temporary copy" in relative.stdout + relative.stderr
    nowhere = call(
        sys.executable, "-m", "jobs.submit", "--address", "http://127.0.0.1:9", *flags(docs, tmp_path / "out", model)
    )
    assert nowhere.returncode == 1
    assert nowhere.stderr.startswith("error: --address http://127.0.0.1:9: no Ray job server answers")


def test_a_cluster_that_wants_its_token_is_told_from_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str) -> None:
        raise ray.exceptions.AuthenticationError("Missing authentication token")

    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", refuse)
    with pytest.raises(JobError, match="--address http://head:8265: the cluster asks for its token: set RAY_AUTH_MODE"):
        connect("http://head:8265")


def test_a_stopped_job_has_written_what_was_finished(cluster: str, tmp_path: Path, model: Path) -> None:
    docs, out = write(tmp_path / "docs", 400, 30), tmp_path / "out"
    command = [sys.executable, "-m", "jobs.submit", "--address", cluster, *flags(docs, out, model)]
    command += ["--flush-documents", "1000", "--flush-seconds", "1", "--max-live", "1"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as client:
        assert client.stdout is not None
        for line in client.stdout:
            if "starting 1 worker on" in line:
                break
        until = time.monotonic() + patient(120)
        while not list(out.glob("part-*")):  # until some documents are finished
            assert time.monotonic() < until
            time.sleep(0.05)
        written = outputs(out)
        client.send_signal(signal.SIGTERM)
        rest = client.stdout.read()
    assert client.returncode == 130, rest
    until = time.monotonic() + patient(30)
    while json.loads((out / "manifest.json").read_text())["state"] != "stopped":
        assert time.monotonic() < until
        time.sleep(0.2)
    assert written.items() <= outputs(out).items()
    assert 0 < len(outputs(out)) < 400
