"""Workers as Ray actors, and the Ray cluster they run in."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import ray
from ray import _raylet
from ray.exceptions import RayActorError, RayError, RayTaskError

from pipeline.engine.config import SoFar
from pipeline.errors import JobError, one_line, without_secrets
from pipeline.imports import ROOT
from pipeline.interruptible import uninterrupted
from pipeline.source import Document
from pipeline.workers.loop import EngineBrokenError, describe_error
from pipeline.workers.pool import Event, WorkerId, drained, failed_call, failed_start, one_loss_each
from pipeline.workers.work import WorkerConfig
from pipeline.workers.worker import Worker

# Calls that a worker takes at once: as many documents as --max-live allows at most, some held ahead, how far it is.
MOST_CALLS = 1024 + 64
START_TIMEOUT = 900.0
PRESTART = "RAY_prestart_worker_first_driver"
READING_EVERY = 2.0  # seconds between two questions to a worker, how far it is
# Every worker holds the whole model; beyond so many on CPUs a person should say that there is memory for them.
AUTO_CPU_WORKERS = 4


@dataclass(frozen=True)
class Cluster:
    """What Ray offers. local: started by this process and for it alone. node_gpus: GPUs of each node."""

    cpus: float
    gpus: float
    local: bool
    nodes: int
    node_gpus: tuple[float, ...] = ()

    def workers(self, gpus: int) -> int:
        """How many workers of `gpus` GPUs each the nodes can hold; a worker's GPUs are all on one node."""
        return sum(int(there // gpus) for there in self.node_gpus)


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Cluster]:
    """A Ray cluster for the time of a with-block: the one at `address` or $RAY_ADDRESS, else one on this machine.

    A session that is connected already is used and left as it is. Raises JobError if the address does not answer.
    """
    if ray.is_initialized():
        yield _describe(local=False)
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "error"}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = address == "local"
    with local_environment() if local else contextlib.nullcontext():
        if local:
            # What Ray prints when one of its parts ends, with pages of its log, heartbeat.py says in a line. It is
            # how Ray's own debugger quiets it.
            ray._private.worker._worker_logs_enabled = False
            options |= {"include_dashboard": False, "object_store_memory": 128 << 20, "dashboard_host": "127.0.0.1"}
        try:
            ray.init(**options)
        except Exception as error:  # Ray raises bare Exceptions, too: "The current node timed out during startup"
            ray.shutdown()  # it may have come half the way
            what = "does not start here" if local else f"at {without_secrets(address)!r} cannot be reached"
            raise JobError(
                f"Ray {what}: {one_line(error, 300)}; what is finished is written, run the same command again"
            ) from None
        try:
            yield _describe(local)
        finally:
            with uninterrupted():
                ray.shutdown()


@contextlib.contextmanager
def local_environment() -> Iterator[None]:
    """Environment of a private cluster: workers find our packages first, and a throw-away token guards its ports.

    Without the latter Ray writes a token file to the home directory, after which a plain `ray start` demands it.
    """
    wanted: dict[str, str | None] = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        # Else Ray starts a Python process for every CPU as soon as it is up, which nobody needs here, and while they
        # import, our workers' imports take longer: 11.2 s instead of 8.7 on 32 CPUs.
        PRESTART: os.environ.get(PRESTART, "0"),
    }
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray sets the mode itself, and leaves it.
        wanted |= {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_AUTH_MODE": None}
        # It advises to switch the token off.
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    before = {name: os.environ.get(name) for name in wanted}
    _set_environment(wanted)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: dict[str, str | None]) -> None:
    """Set variables, remove those that are None, and have Ray read its token anew: it keeps the first of a process."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    loader = getattr(_raylet, "AuthenticationTokenLoader", None)  # older versions of Ray have no tokens
    if loader is not None:
        loader.instance().reset_cache()


def room_now(share: Share, gpus_per_worker: int) -> int:
    """How many workers like those of `share` the connected cluster holds at this moment."""
    return room_for(_describe(local=False), share.device, gpus_per_worker)


def room_for(cluster: Cluster, device: str, gpus_per_worker: int) -> int:
    """How many workers --workers auto makes of a cluster."""
    if device == "cuda":
        return cluster.workers(gpus_per_worker)
    return min(max(1, int(cluster.cpus)), AUTO_CPU_WORKERS)


def _describe(local: bool) -> Cluster:
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = tuple(there.get("GPU", 0.0) for there in alive)
    return Cluster(sum(there.get("CPU", 0.0) for there in alive), sum(gpus), local, len(alive), gpus)


@dataclass(frozen=True)
class Share:
    """Workers and what each takes. threads: for torch, at most $OMP_NUM_THREADS; 0 leaves its default."""

    device: str
    workers: int
    cpus: float
    gpus: float
    threads: int


def divide(cluster: Cluster, device: str, workers: int | str, documents: int, gpus_per_worker: int = 1) -> Share:
    """How many workers, on what. Raises JobError if the cluster cannot hold them.

    A number of workers on GPUs may be larger than a cluster that is not `local` holds: it may grow, by itself or by the
    demand of those that wait.
    """
    if device == "auto":
        device = "cuda" if cluster.gpus >= 1 or gpus_per_worker > 1 else "cpu"
    if device == "cuda":
        return _divide_gpus(cluster, workers, documents, gpus_per_worker)
    cores = max(1, int(cluster.cpus))
    count = min(room_for(cluster, device, 1), documents) if workers == "auto" else min(int(workers), documents)
    if count > 64 * cores:
        raise JobError(f"--workers {count}: the cluster has {cores} cores; give at most {64 * cores}")
    threads = max(1, cores // count) if cluster.nodes == 1 else 1
    # Two busy threads on one core wait for each other at every barrier; whoever shares the machine sets the bound.
    bound = os.environ.get("OMP_NUM_THREADS", "")
    return Share("cpu", count, min(1.0, cores / count), 0.0, min(threads, int(bound)) if bound.isdecimal() else threads)


def _divide_gpus(cluster: Cluster, workers: int | str, documents: int, each: int) -> Share:
    if workers != "auto" and not cluster.local:
        return Share("cuda", min(int(workers), documents), 1.0, float(each), 0)
    if cluster.gpus < 1:
        asked = "--device cuda" if each == 1 else f"--gpus-per-worker {each}"
        other = "give a number of --workers if it starts GPUs on demand, else use" if not cluster.local else "use"
        raise JobError(f"{asked}: Ray sees no GPU here; {other} --device cpu, or a cluster with GPUs by --ray-address")
    room = cluster.workers(each)
    if not room:
        most = max(cluster.node_gpus, default=0.0)
        raise JobError(
            f"--gpus-per-worker {each}: a worker's GPUs are all on one node, and no node here has more than {most:g}"
        )
    count = room if workers == "auto" else int(workers)
    if count > room:
        takes = "a worker takes one" if each == 1 else f"a worker takes {each} of one node"
        raise JobError(f"--workers {count}: the cluster has {cluster.gpus:g} GPUs, {takes}: {room} fit")
    return Share("cuda", min(count, documents), 1.0, float(each), 0)


class RayPool:
    """The scheduler's Pool over Ray actors that are never restarted and whose calls are never retried by Ray.

    Every call tells of its own end, so that waiting costs the same with ten calls out as with ten thousand.
    """

    def __init__(
        self, config: WorkerConfig, share: Share, *, local: bool, start_timeout: float = START_TIMEOUT,
        worker_class: Any = Worker,
    ) -> None:  # fmt: skip
        options: dict[str, Any] = {
            "num_cpus": share.cpus, "num_gpus": share.gpus,
            "max_restarts": 0, "max_task_retries": 0,
            "max_concurrency": MOST_CALLS,
        }  # fmt: skip
        if not local and not ray.get_runtime_context().runtime_env.get("working_dir"):
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            options["runtime_env"] = {"env_vars": {"PYTHONPATH": path}}
        self._actor = ray.remote(worker_class).options(**options)
        self._config = ray.put(config)
        self._start_timeout = start_timeout
        self._workers: dict[WorkerId, Any] = {}
        # Calls that ended: worker, document ("" for its start), and what came of it. Ray's thread puts, ours takes.
        self._ended: queue.SimpleQueue[tuple[WorkerId, str, Future[Any]]] = queue.SimpleQueue()
        self._starting: dict[WorkerId, float] = {}  # in the order of their starts
        self._count = 0
        self._held: dict[WorkerId, set[str]] = {}  # their documents
        self._asked: dict[WorkerId, Future[dict[str, SoFar]]] = {}  # how far they are
        self._reading: dict[WorkerId, dict[str, SoFar]] = {}  # what they said last
        self._ask_again = 0.0

    def start(self) -> WorkerId:
        """Begin to start a worker."""
        worker, self._count = self._count, self._count + 1
        actor = self._actor.remote(self._config)
        self._workers[worker] = actor
        load: Any = actor.load
        self._watch(load.remote(), worker, "")
        self._starting[worker] = time.monotonic()
        self._held[worker] = set()
        return worker

    def submit(self, worker: WorkerId, document: Document, careful: bool) -> None:
        """Give a document to a worker."""
        self._held[worker].add(document.document_id)
        self._watch(self._workers[worker].process.remote(document, careful), worker, document.document_id)

    def wait(self, timeout: float) -> list[Event]:
        """Events since the last call; waits up to `timeout` seconds for the first."""
        events = [self._event(*ended) for ended in drained(self._ended, timeout)]
        return one_loss_each([event for event in events if event.worker in self._workers]) + self._late_starts()

    def kill(self, worker: WorkerId) -> None:
        """End a worker and forget its calls."""
        self._starting.pop(worker, None)
        self._held.pop(worker, None)
        self._reading.pop(worker, None)
        self._asked.pop(worker, None)
        actor = self._workers.pop(worker, None)
        if actor is not None:
            with contextlib.suppress(RayError):
                ray.kill(actor, no_restart=True)

    def reading(self) -> dict[str, SoFar] | None:
        """Worker.reading of all workers together, as they said when asked a while ago, without the documents that have
        ended since; None between two such questions.

        Nobody is waited for.
        """
        now = time.monotonic()
        if now < self._ask_again:
            return None
        self._ask_again = now + READING_EVERY
        for worker, actor in self._workers.items():
            asked = self._asked.get(worker)
            if asked is not None and asked.done():
                with contextlib.suppress(RayError, EngineBrokenError):  # an event tells of it
                    self._reading[worker] = asked.result()
            if worker not in self._starting and (asked is None or asked.done()):
                self._asked[worker] = actor.reading.remote().future()
        return {
            name: done
            for worker, documents in self._reading.items()
            for name, done in documents.items()
            if name in self._held[worker]
        }

    def stats(self, timeout: float = 5.0) -> list[dict[str, float]]:
        """What the living workers report about themselves within `timeout` seconds."""
        asked = [actor.stats.remote() for worker, actor in self._workers.items() if worker not in self._starting]
        found = []
        if asked:
            for answer in ray.wait(asked, num_returns=len(asked), timeout=timeout)[0]:
                with contextlib.suppress(RayError):
                    found.append(ray.get(answer))
        return found

    def close(self) -> None:
        """End all workers."""
        for worker in list(self._workers):
            self.kill(worker)

    def _watch(self, call: Any, worker: WorkerId, document_id: str) -> None:
        ended = self._ended  # not self: a call that never ends must not keep the pool
        call.future().add_done_callback(lambda future: ended.put((worker, document_id, future)))

    def _event(self, worker: WorkerId, document_id: str, ended: Future[Any]) -> Event:
        starting = worker in self._starting
        try:
            value = ended.result()
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if starting:
                return failed_start(worker, cause)
            return failed_call(worker, document_id, cause)
        except RayActorError as error:
            return Event("start_failed" if starting else "died", worker, document_id, reason=describe_death(error))
        except RayError as error:  # what it made is lost with its node
            return Event("start_failed" if starting else "died", worker, document_id, reason=describe_error(error))
        if document_id:
            self._held.get(worker, set()).discard(document_id)
            return Event("result", worker, document_id, rows=value)
        self._starting.pop(worker, None)
        return Event("started", worker, info=value)

    def _late_starts(self) -> list[Event]:
        now, late = time.monotonic(), []
        for worker, begun in self._starting.items():
            if now - begun <= self._start_timeout:
                break
            late.append(worker)
        reason = (
            f"it was not ready after {self._start_timeout:g} s; either the cluster has no room for it "
            f"(free: {one_line(str(ray.available_resources()), 200)}) or its model loads too slowly"
        ) if late else ""  # fmt: skip
        return [Event("start_failed", worker, reason=reason) for worker in late]


def describe_death(error: BaseException) -> str:
    """Why an actor is gone, out of Ray's long message."""
    text = one_line(error, 4000)
    for pattern in (
        r"Worker exit detail: (.*?)(?: Some common causes|$)",
        r"death cause: (.*)$",
        r"The actor is dead because (.*)$",
    ):
        match = re.search(pattern, text)
        if match:
            return one_line("the worker process ended: " + match.group(1), 300)
    return one_line("the worker process ended: " + text, 300)
