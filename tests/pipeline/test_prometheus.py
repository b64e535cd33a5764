"""A real Prometheus beside a running job on a cluster finds Ray's metrics, and every panel has something to draw."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import patient
from shell import shell
from test_metrics import queries

from pipeline import read_results

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.ray
# A job that loses a worker, and one that lasts until it is told to stop.
DRIVER = """
import sys
from pathlib import Path
import ray
from pipeline.settings.config import JobConfig
from pipeline.job.job import run
folder, model, address = sys.argv[1:]
ray.init(address=address, log_to_driver=False, logging_level="error")
for name in ("killer", "slow"):
    place = Path(folder, name)
    config = JobConfig(
        input=str(place / "docs"), output=str(place / "out"), model=model, device="cpu", workers=1, max_attempts=1,
        max_new_tokens=8, flush_documents=2,
    )
    run(config, engine_factory="fake_engine:FakeEngine")
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]


def wait_for(what: str, check: Callable[[], Any]) -> Any:
    until = time.monotonic() + patient(90)
    while not (found := check()):
        assert time.monotonic() < until, what
        time.sleep(0.3)
    return found


def environment() -> dict[str, str]:
    kept = shell()
    paths = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "pipeline")]),
    }
    settings = {"RAY_AUTH_MODE": "disabled", "RAY_metrics_report_interval_ms": "1000", "OMP_NUM_THREADS": "1"}
    return kept | paths | settings


@contextlib.contextmanager
def program(log: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    with (
        log.open("w") as file,
        subprocess.Popen(command, env=environment(), stdout=file, stderr=subprocess.STDOUT) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()


@pytest.fixture
def prometheus() -> str:
    found = shutil.which("prometheus")
    if found is None:
        reason = "no Prometheus on this machine: apt-get install --no-install-recommends prometheus"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a cluster of this machine, and the folder of its session."""
    port, dashboard, agent, client = free_ports(4)
    ray = shutil.which("ray", path=environment()["PATH"])
    assert ray
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:  # a short path
        command = f"""{ray} start --head --block --port {port} --dashboard-host 127.0.0.1 --dashboard-port {dashboard}
            --dashboard-agent-listen-port {agent} --ray-client-server-port {client} --node-ip-address 127.0.0.1
            --num-cpus 1 --object-store-memory 100000000 --disable-usage-stats --temp-dir {folder}""".split()
        session = Path(folder, "session_latest")
        with program(tmp_path / "ray.log", *command):
            for name in ("prom_metrics_service_discovery.json", "metrics/prometheus/prometheus.yml"):
                wait_for(f"Ray writes {name}", (session / name).exists)
            yield f"127.0.0.1:{port}", session


class Server:
    """A Prometheus on the loopback address that asks every second."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1/query?"

    def ask(self, query: str) -> list[tuple[dict[str, str], float]]:
        """Labels and values of the series that there are now."""
        url = self._url + urllib.parse.urlencode({"query": query.replace(" or vector(0)", "")})
        with contextlib.suppress(ConnectionError, urllib.error.URLError):
            with urllib.request.urlopen(url, timeout=5) as answer:
                result = json.load(answer)["data"]["result"]
            return [(item["metric"], float(item["value"][1])) for item in result]
        return []


@pytest.fixture
def server(prometheus: str, cluster: tuple[str, Path], tmp_path: Path) -> Iterator[Server]:
    """It is configured by the file that Ray writes, as the README says."""
    config = (cluster[1] / "metrics" / "prometheus" / "prometheus.yml").read_text()
    assert "_interval: 10s" in config
    (tmp_path / "prometheus.yml").write_text(config.replace("_interval: 10s", "_interval: 1s"))
    (port,) = free_ports(1)
    flags = f"--config.file={tmp_path}/prometheus.yml --storage.tsdb.path={tmp_path}/tsdb --log.level=error"
    with program(tmp_path / "prometheus.log", prometheus, *flags.split(), f"--web.listen-address=127.0.0.1:{port}"):
        yield Server(port)


def write(folder: Path, texts: list[str]) -> None:
    folder.mkdir(parents=True)
    for i, text in enumerate(texts):
        (folder / f"d{i:03}.txt").write_text(text)


def test_all_panels_show_a_running_job_and_counts_stay_when_it_ends(
    server: Server, cluster: tuple[str, Path], tmp_path: Path, model: Path
) -> None:
    write(tmp_path / "killer" / "docs", ["CRASH"])
    write(tmp_path / "slow" / "docs", ["SLOW " * (i % 9 + 1) for i in range(400)])
    command = [sys.executable, "-c", DRIVER, str(tmp_path), str(model), cluster[0]]
    panels = queries()
    with program(tmp_path / "driver.log", *command) as driver:

        def missing() -> list[tuple[str, str]]:
            assert driver.poll() is None, (tmp_path / "driver.log").read_text()
            return [item for item in panels if not any(math.isfinite(value) for _, value in server.ask(item[1]))]

        wait_for("all queries return series", lambda: not missing())
        arenas = server.ask("ray_stemline_arena_capacity_tokens")
        assert [value for _, value in arenas] == [4 * 4096], "of the worker that is left, not of the one that died"
        assert server.ask('sum(ray_stemline_workers{state="live"})')[0][1] == 1
        assert server.ask("ray_stemline_workers_lost_total")[0][0]["reason"] == "died"
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(patient(30)) == 0, (tmp_path / "driver.log").read_text()

    rows = [row for name in ("killer", "slow") for row in read_results(tmp_path / name / "out").to_pylist()]
    assert 4 <= len(rows) < 400
    wait_for("gauges end with their job", lambda: not server.ask("ray_stemline_workers"))
    for status, count in (("ok", len(rows) - 1), ("worker_died", 1)):
        assert server.ask(f'sum(ray_stemline_documents_total{{status="{status}"}})')[0][1] == count
    tokens = sum(row["prompt_tokens"] or 0 for row in rows)
    assert server.ask("sum(ray_stemline_prompt_tokens_total)")[0][1] == tokens
