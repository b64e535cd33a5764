"""What tests of all folders share: one small Ray cluster for the whole session, and the bundled model."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "tiny-reader"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Two cores of this machine. Workers find the checkout and the tests' fake engine."""
    import ray

    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "RAY_AUTH_TOKEN", "OMP_NUM_THREADS")}
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests" / "pipeline"), str(ROOT / "tests" / "faults")]
    )
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # otherwise Ray leaves a token file in the home directory
    os.environ["OMP_NUM_THREADS"] = "1"
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
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def model() -> Path:
    """A folder with a small trained model that lists the findings of reports."""
    return MODEL
