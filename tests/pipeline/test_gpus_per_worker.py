"""The setting --gpus-per-worker, from the flag to what Ray and the engine are asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.engine import EngineConfig, EngineError, estimate_plan
from pipeline.errors import JobError
from pipeline.job.configs import make_engine_config
from pipeline.settings.config import STEM_OVERRIDES, JobConfig
from pipeline.workers.ray_pool import Cluster, Share, divide
from tools.shapes import shape_folder

TWO_NODES = Cluster(cpus=64, gpus=11, local=False, nodes=3, node_gpus=(8.0, 3.0, 0.0))
ALONE = replace(TWO_NODES, local=True)


@pytest.mark.parametrize(
    ("workers", "each", "expected"),
    [("auto", 1, 11), ("auto", 2, 5), ("auto", 3, 3), ("auto", 4, 2), ("auto", 8, 1), (2, 3, 2), (1, 8, 1)],
)
def test_workers_take_whole_gpus_of_one_node(workers: int | str, each: int, expected: int) -> None:
    assert divide(TWO_NODES, "auto", workers, 100, each) == Share("cuda", expected, 1.0, float(each), 0)


def test_a_cluster_of_others_may_grow_to_the_number_asked_for() -> None:
    assert divide(TWO_NODES, "cuda", 12, 100).workers == 12
    assert divide(replace(TWO_NODES, gpus=0, node_gpus=()), "cuda", 12, 100, 4) == Share("cuda", 12, 1.0, 4.0, 0)
    with pytest.raises(JobError, match="give a number of --workers if it starts GPUs on demand"):
        divide(replace(TWO_NODES, gpus=0, node_gpus=()), "cuda", "auto", 100)


def test_no_more_workers_than_documents() -> None:
    assert divide(TWO_NODES, "cuda", "auto", 2, 2).workers == 2


@pytest.mark.parametrize(
    ("cluster", "workers", "each", "message"),
    [
        (TWO_NODES, "auto", 9, "--gpus-per-worker 9: .* no node here has more than 8$"),
        (ALONE, 4, 3, "--workers 4: the cluster has 11 GPUs, a worker takes 3 of one node: 3 fit"),
        (ALONE, 12, 1, "--workers 12: the cluster has 11 GPUs, a worker takes one: 11 fit"),
        (Cluster(4, 0, True, 1, (0.0,)), "auto", 2, "--gpus-per-worker 2: Ray sees no GPU here"),
        (Cluster(4, 0, True, 1, (0.0,)), "auto", 1, "--device cuda: Ray sees no GPU here"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(cluster: Cluster, workers: int | str, each: int, message: str) -> None:
    with pytest.raises(JobError, match=message) as raised:
        divide(cluster, "auto" if each > 1 else "cuda", workers, 100, each)
    assert "\n" not in str(raised.value)


def test_setting() -> None:
    given = {"input": ("docs",), "output": "out", "model": "model"}
    assert make_engine_config(JobConfig(**given, gpus_per_worker=4), "cuda").gpus == 4
    assert make_engine_config(JobConfig(**given), "cuda").gpus == 1
    assert JobConfig(**given).fingerprint() == JobConfig(**given, gpus_per_worker=2).fingerprint()
    for wrong in (0, -1, 65, 1.5, "two", True):
        with pytest.raises(JobError, match="--gpus-per-worker must be"):
            JobConfig(**given, gpus_per_worker=wrong)
    with pytest.raises(JobError, match="--gpus-per-worker 2 has no meaning with --device cpu"):
        JobConfig(**given, gpus_per_worker=2, device="cpu")


def test_stem_settings_are_those_without_a_default() -> None:
    assert STEM_OVERRIDES[:3] == ("budget", "base_blocks", "growth")
    assert {"dense_layers", "dense_below", "dense_tail", "stride", "sample_rows"} < set(STEM_OVERRIDES)
    assert not {"attention", "preset"} & set(STEM_OVERRIDES)


def test_devices_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert EngineConfig("m", device="cpu").torch_devices() == (torch.device("cpu"),)
    with pytest.raises(EngineError, match="spread over GPUs only, but gpus=2 was asked for on cpu"):
        EngineConfig("m", device="cpu", gpus=2).torch_devices()
    with pytest.raises(ValueError, match="gpus must be at least 1, got 0"):
        EngineConfig("m", gpus=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [str(device) for device in EngineConfig("m", gpus=3).torch_devices()] == ["cuda:0", "cuda:1", "cuda:2"]
    assert [str(device) for device in EngineConfig("m", device="cuda:2", gpus=2).torch_devices()] == [
        "cuda:2",
        "cuda:3",
    ]
    with pytest.raises(EngineError, match="gpus=3 asked for, but torch sees 2 CUDA devices from cuda:2 on"):
        EngineConfig("m", device="cuda:2", gpus=3).torch_devices()


def test_plan_of_a_70b_model_on_two_gpus(tmp_path: Path) -> None:
    """The head and the embeddings lie on the first GPU, which takes fewer layers for it."""
    config = EngineConfig(str(shape_folder("llama-3.1-70b", tmp_path)), precision="fp8", gpus=2, max_context=131_072)
    plan = estimate_plan(config, 80 << 30)
    assert [part.layers for part in plan.devices] == ["0-38", "39-79"]
    assert [part.bytes_per_token for part in plan.devices] == [39 * 2048, 41 * 2048]
    assert plan.bytes_per_token == 80 * 2048
    first, second = plan.devices
    difference = first.weight_bytes - second.weight_bytes
    assert 2**30 < difference < 2**31, "4.2 GB of embeddings against two layers and the last one's 16 bits"
    for part in plan.devices:
        need = part.weight_bytes + part.reserve_bytes + plan.arena_tokens * part.bytes_per_token
        assert need <= part.total_bytes == 80 << 30
    assert plan.arena_tokens == 509_568
    assert plan.documents(131_072) == 3
    assert any("cuda:1: layers 39-79, weights 34.11 GiB" in line for line in plan.lines())
    assert json.loads(json.dumps(plan.to_dict()))["devices"][1]["layers"] == "39-79"
    less = plan.shrunk(plan.arena_tokens - 1000)
    assert less.reserve_bytes - plan.reserve_bytes == 1000 * plan.bytes_per_token
    assert [part.reserve_bytes for part in less.devices] == [
        part.reserve_bytes + 1000 * part.bytes_per_token for part in plan.devices
    ]


def test_the_fullest_gpu_sets_the_arena(tmp_path: Path) -> None:
    folder = str(shape_folder("llama-3.1-70b", tmp_path))
    with pytest.raises(
        EngineError, match=r"left for KV at .* bytes a token on cuda:\d: too little; .* more GPUs a worker"
    ):
        estimate_plan(EngineConfig(folder, precision="bf16", gpus=2), 64 << 30)
    with pytest.raises(EngineError, match=r"arena_tokens=600000 need .* are free for KV on cuda:\d; lower it"):
        estimate_plan(EngineConfig(folder, precision="fp8", gpus=2, arena_tokens=600_000), 80 << 30)


def test_a_driver_without_gpus_plans_what_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    folder = str(shape_folder("llama-3.1-8b", tmp_path))
    plan = estimate_plan(EngineConfig(folder, gpus=4, max_context=65_536))
    assert (plan.precision, plan.total_bytes, plan.arena_tokens, plan.max_context) == ("bf16", 0, 0, 65_536)
    assert [part.layers for part in plan.devices] == ["0-5", "6-14", "15-23", "24-31"]
    lines = plan.lines()
    assert "there are not so many here to ask" in lines[0]
    assert len(lines) == 6
    assert not any("GiB)" in line for line in lines), "no arena is made up"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = estimate_plan(EngineConfig(folder, device="cuda", precision="fp8"))
    assert (plan.precision, plan.total_bytes, plan.bytes_per_token) == ("fp8", 0, 65_536)
    assert plan.lines()[0] == "memory of a GPU (estimated before loading; there is none here to ask), precision fp8"
    assert [line.split()[0] for line in plan.lines()[1:]] == ["weights", "reserve", "KV"]
    assert plan.lines()[-1].endswith(" 65,536 bytes a token")
    with pytest.raises(EngineError, match="spread over GPUs only"):
        estimate_plan(EngineConfig(folder, device="cpu", gpus=4))


ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| 70B on ")
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[1]}")
def test_the_table_of_models_on_several_gpus_is_what_the_planner_says(row: list[str], tmp_path: Path) -> None:
    name, precision, *cells = row
    config = EngineConfig(
        str(shape_folder("llama-3.1-70b", tmp_path)),
        precision=precision,
        gpus=int(name.split()[2]),
        max_context=131_072,
    )
    said = []
    for gib in (24, 48, 80, 141):
        try:
            plan = estimate_plan(config, gib << 30)
        except EngineError:
            said.append("-")
            continue
        said.append(f"{plan.max_context:,} / {plan.documents(33_024)} / {plan.documents(131_072)}")
    assert said == cells
