"""What tests of all folders share: a small Ray cluster, a stand-in for it in this process, and the bundled model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from shell import NICENESS

if TYPE_CHECKING:
    from ray_here import RayHere

os.environ |= NICENESS
ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "tiny-reader"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with Ray take long, so two processes begin with them, one with those of the shared cluster.

    pytest-xdist gives every process a stretch of the list, all of about the same length.
    """
    shared = [item for item in items if _on_cluster(item)]
    alone = [item for item in items if item.get_closest_marker("ray") and not _on_cluster(item)]
    others = [item for item in items if not (_on_cluster(item) or item.get_closest_marker("ray"))]
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    firsts = [shared, alone] if processes > 1 else [shared + alone]
    total, items[:] = len(items), []
    for part, first in enumerate(firsts):
        room = max(0, (total - len(items)) // (processes - part) - len(first))
        items += first + others[:room]
        del others[:room]
    items += others


@pytest.hookimpl(trylast=True)  # behind the fixtures of `item`
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the cluster behind the last test that needs it: an idle one costs a twentieth of a core."""
    if nextitem is None or not _on_cluster(nextitem):
        _running.close()


def _on_cluster(item: pytest.Item) -> bool:
    return "ray_cluster" in getattr(item, "fixturenames", ())


_running = contextlib.ExitStack()


@pytest.fixture
def ray_cluster() -> None:
    """A Ray cluster of two cores of this machine, shared by the tests that ask for it."""
    import ray

    if not ray.is_initialized():
        _running.enter_context(_cluster())


@contextlib.contextmanager
def _cluster() -> Iterator[None]:
    """Workers find the checkout and the tests' fake engine."""
    import ray

    from pipeline.workers.ray_pool import local_environment

    with local_environment(), pytest.MonkeyPatch.context() as patch:
        paths = [str(ROOT), str(ROOT / "tests" / "pipeline"), str(ROOT / "tests" / "faults")]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 << 20,
            log_to_driver=False,
            logging_level="error",
        )
        yield
        ray.shutdown()


@pytest.fixture
def ray_here() -> Iterator[RayHere]:
    """Jobs of this test run their workers in this process."""
    from ray_here import RayHere  # it imports Ray

    with pytest.MonkeyPatch.context() as patch:  # one that a test does not undo
        patch.syspath_prepend(str(ROOT / "tests" / "pipeline"))  # for the fake engine
        here = RayHere()
        for module in ("heartbeat", "ray_pool"):
            patch.setattr(f"pipeline.workers.{module}.ray", here)
        yield here


@pytest.fixture(scope="session")
def model() -> Path:
    """A folder with a small trained model that lists the findings of reports."""
    return MODEL
