"""As much of Ray as a job needs, in the test's own process: a worker there starts in milliseconds instead of seconds.

For tests of what jobs do with documents, rows and workers. What a worker does to its process (it ends, is killed,
freezes), and what Ray does, needs a real cluster: the fixture `ray_cluster`. So do several workers with real models:
transformers sets torch's defaults of the whole process while it loads one.
"""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, ClassVar

from ray.exceptions import RayActorError, RayTaskError

from pipeline.workers.worker import Worker


class RayHere:
    """Stands in for the module `ray` in pipeline.workers.

    What goes to a worker and what comes back is pickled, as it is on the way through Ray.
    """

    runtime_env: ClassVar[dict[str, str]] = {"working_dir": "the folder of a job that was submitted"}

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 1.0}}]  # --workers auto is one, for which see above

    def get_runtime_context(self) -> Any:
        return self

    def put(self, value: Any) -> Any:
        return value

    def remote(self, worker_class: type[Worker]) -> _Class:
        return _Class(worker_class)

    def kill(self, actor: Actor, no_restart: bool) -> None:
        actor.end()

    def wait(self, calls: list[_Call], num_returns: int, timeout: float) -> tuple[list[_Call], list[_Call]]:
        return calls, []

    def get(self, call: _Call) -> Any:
        return call.future().result()


class _Class:
    """What ray.remote(class) gives."""

    def __init__(self, worker_class: type[Worker]) -> None:
        self._worker_class = worker_class
        self._count = 0

    def options(self, **options: Any) -> _Class:
        assert options["max_restarts"] == options["max_task_retries"] == 0, "the scheduler owns retries"
        return self

    def remote(self, *arguments: Any) -> Actor:
        worker, self._count = self._worker_class(*_sent(arguments)), self._count + 1
        worker._name += f".{self._count}"  # otherwise all have that of this process
        return Actor(worker)


class Actor:
    """A worker whose methods run in an event loop of its own; `actor.method.remote(...)` calls one."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="actor", daemon=True)
        self._thread.start()

    def __getattr__(self, name: str) -> _Method:
        return _Method(getattr(self._worker, name), self._loop)

    def end(self) -> None:
        """What it was doing fails. A step of the engine that does not end is left to itself."""
        self._worker.close(0.0)
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Method:
    def __init__(self, method: Callable[..., Coroutine[Any, Any, Any]], loop: asyncio.AbstractEventLoop) -> None:
        self._method, self._loop = method, loop

    def remote(self, *arguments: Any) -> _Call:
        return _Call(asyncio.run_coroutine_threadsafe(self._called(*_sent(arguments)), self._loop))

    async def _called(self, *arguments: Any) -> Any:
        try:
            return _sent(await self._method(*arguments))
        except Exception as error:
            raise RayTaskError(self._method.__name__, "", error) from error
        except asyncio.CancelledError:
            raise RayActorError from None


class _Call:
    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def future(self) -> Future[Any]:
        return self._future


def _sent(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))
