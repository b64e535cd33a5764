"""Ray that does not start, or ends in mid-work, costs one line."""

from __future__ import annotations

import contextlib
import os
import socket

import psutil
import pytest

from pipeline.errors import JobError
from pipeline.workers import ray_pool
from pipeline.workers.heartbeat import EVERY, ClusterLostError, Heartbeat


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_address_where_nobody_listens_any_more_is_told() -> None:
    clock = Clock()
    with socket.create_server(("127.0.0.1", 0)) as server:
        heartbeat = Heartbeat({"raylet": server.getsockname()}, 0.0, clock)
        for _ in range(3):
            clock.now += EVERY
            heartbeat.check()
    heartbeat.check()  # not yet time to look
    clock.now += EVERY
    with pytest.raises(ClusterLostError, match="its raylet is gone; what is finished is written, run the same command"):
        heartbeat.check()


def test_one_that_comes_back_in_time_is_not_lost() -> None:
    clock = Clock()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        heartbeat = Heartbeat({"GCS": address}, 10.0, clock)
    for _ in range(3):
        clock.now += 3.0
        heartbeat.check()
    with socket.create_server(address):
        clock.now += 1.0
        heartbeat.check()
    clock.now += 9.0
    heartbeat.check()
    clock.now += 1.0
    with pytest.raises(ClusterLostError, match="GCS"):
        heartbeat.check()


def test_one_that_is_too_busy_to_answer_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*arguments: object, **options: object) -> None:
        raise TimeoutError

    clock = Clock()
    heartbeat = Heartbeat({"GCS": ("127.0.0.1", 1)}, 0.0, clock)
    monkeypatch.setattr(socket, "create_connection", slow)
    clock.now += 1.0
    heartbeat.check()


@pytest.mark.parametrize(
    "error",
    [Exception("The current node timed out during startup.\nSee the logs."), RuntimeError("no"), TimeoutError("late")],
)
@pytest.mark.parametrize(("address", "what"), [("local", "Ray does not start here"), ("ray://h:1", "Ray at 'ray://h")])
def test_a_ray_that_does_not_start_is_one_line(
    address: str, what: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(**options: object) -> None:
        raise error

    ended = []
    monkeypatch.setattr(ray_pool.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_pool.ray, "init", fails)
    monkeypatch.setattr(ray_pool.ray, "shutdown", lambda: ended.append(1))
    message = f"{what}.*; what is finished is written, run the same command again"
    with pytest.raises(JobError, match=message) as told, ray_pool.connected(address):
        pass
    assert "\n" not in str(told.value)
    assert ended


def worker_processes() -> list[str]:
    """Command lines of the processes that Ray has started for tasks and actors below this one."""
    lines = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            lines.append(" ".join(process.cmdline()))
    # The raylet's own line names the script, too.
    started = [line for line in lines if "default_worker.py" in line and "/raylet " not in line]
    return started + [line for line in lines if line.startswith("ray::IDLE")]


@pytest.mark.ray
def test_ray_starts_more_than_once_in_a_process() -> None:
    """Each time with a token of its own, though Ray keeps the first that it reads."""

    def tokens() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}

    before = tokens()
    for _ in range(2):
        with ray_pool.connected("local") as cluster:
            assert cluster.local
            assert tokens() != before
            assert not worker_processes(), "they would compete with our workers' imports"
        assert tokens() == before
