"""The pages of docs/ say what the code says: messages, flags, files, links, sizes; the RayJob is well-formed."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jobs.cli import Parser, add_job_flags, job_config
from pipeline.engine.config import EngineConfig, EngineError
from pipeline.engine.devices import GIB
from pipeline.engine.memory import plan
from pipeline.engine.model.meta_model import meta_model
from pipeline.engine.model.precision import Precision
from pipeline.results.rows import STATUSES
from pipeline.settings.config import JobConfig
from stem_core.config import StemConfig

ROOT = Path(__file__).parents[1]
PAGES = (
    "docs/operations.md",
    "docs/troubleshooting.md",
    "docs/algorithm.md",
    "docs/checks.md",
    "docs/answers.md",
    "CONTRIBUTING.md",
)
MEASURED = ("docs/speed.md", "docs/quality.md", "docs/faults.md")  # whose commands have flags of their own
PACKAGES = ("jobs", "kernels", "pipeline", "stem_core", "tools")
# Flags of other programs, and of our own that are not settings of the job.
OTHER_FLAGS = {
    "--address", "--config", "--dashboard-host", "--documents", "--driver-ms", "--dtype", "--failures", "--format",
    "--from-file", "--head", "--help", "--json", "--local-dir", "--no-resume", "--no-wait", "--ray-overhead",
    "--rows", "--skip-text", "--web", "--working-dir",
}  # fmt: skip
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "head_dim": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "Qwen3-8B": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "head_dim": 128,
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    },
    "70B": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}  # fmt: skip
CARDS = (24, 48, 80, 141)


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def strings() -> tuple[str, ...]:
    """Every string in the packages, a NUL for what is filled in at run time; adjacent literals are one."""
    found = []
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


CHECKED = re.findall(r"^\|.*\| `([^`]+)`(?:, .*)? \|$", text("docs/checks.md"), re.MULTILINE)
FRAGMENTS = re.findall(r"^### `([^`]+)`$", text("docs/troubleshooting.md"), re.MULTILINE)


def test_there_are_messages() -> None:
    assert len(FRAGMENTS) >= 20
    assert len(CHECKED) >= 7
    assert len(set(FRAGMENTS)) == len(FRAGMENTS)


@pytest.mark.parametrize("fragment", [*FRAGMENTS, *CHECKED])
def test_a_quoted_message_is_in_the_code(fragment: str) -> None:
    if " " in fragment:
        assert any(fragment in string for string in strings())
    else:
        assert fragment in STATUSES


def test_every_status_is_explained() -> None:
    assert set(STATUSES) - {"ok", "error"} <= set(FRAGMENTS)


def test_messages_that_are_quoted_in_the_text_are_in_the_code() -> None:
    quoted = (
        "is not a setting", "the cluster takes no jobs", "only files of other kinds", "plots need matplotlib",
        "are below dense_below",
    )  # fmt: skip
    for fragment in quoted:
        assert f"`{fragment}" in text("docs/troubleshooting.md")
        assert any(fragment in string for string in strings()), fragment


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page: str) -> None:
    known = {"--" + item.name.replace("_", "-") for item in fields(JobConfig)} | OTHER_FLAGS
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text(page))) <= known


@pytest.mark.parametrize("page", [*PAGES, *MEASURED, "README.md"])
def test_files_and_links_exist(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", text(page))
    for link in links:
        assert ((ROOT / page).parent / link).exists(), link
    for name in re.findall(r"`((?:jobs|kernels|pipeline|stem_core|tests|tools|examples)/[\w./*-]+)`", text(page)):
        assert list(ROOT.glob(name)), name
    for module in re.findall(r"python -m ((?:jobs|tools)\.\w+)", text(page)):
        assert list(ROOT.glob(module.replace(".", "/") + "*")), module


@pytest.mark.parametrize("page", [*PAGES, *MEASURED])
def test_pages_are_linked_from_the_readme(page: str) -> None:
    assert f"]({page})" in text("README.md")


def site_pages(entries: list[Any]) -> list[str]:
    """The pages that the menu of the site lists, in folders, too."""
    found = []
    for entry in entries:
        (page,) = entry.values()
        found += [page] if isinstance(page, str) else site_pages(page)
    return found


def test_the_site_has_every_page_once() -> None:
    pages = site_pages(yaml.safe_load(text("mkdocs.yml"))["nav"])
    assert sorted(pages) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def build_site(config: Path, output: Path) -> subprocess.CompletedProcess[str]:
    words = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(output),
    ]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Links and their anchors lead somewhere. A broken link is a warning, and that ends the build."""
    pytest.importorskip("mkdocs")
    done = build_site(ROOT / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/glossary/index.html").is_file()
    loaded = re.findall(
        r"""<(?:script|link|img)[^>]* (?:src|href)="?(https?:)""", (tmp_path / "site/index.html").read_text()
    )
    assert not loaded, "the site asks the network for something"
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "docs/index.md").write_text("[nowhere](glossary.md#nowhere)\n", encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text(text("mkdocs.yml"), encoding="utf-8")
    broken = build_site(tmp_path / "mkdocs.yml", tmp_path / "broken")
    assert broken.returncode != 0
    assert "nowhere" in broken.stderr


def test_the_readme_links_to_anchors_that_are_there() -> None:
    links = re.findall(r"\]\((docs/[^)#]+)?#([^)]+)\)", text("README.md"))
    assert links
    for page, anchor in links:
        lines = text(page or "README.md").splitlines()
        headings = [re.sub(r"[^\w -]", "", line.lstrip("# ")).lower() for line in lines if line[:1] == "#"]
        assert anchor in [heading.replace(" ", "-") for heading in headings], f"{page}#{anchor}"


def test_measured_peaks_are_those_of_the_speed_page() -> None:
    peaks = re.findall(r"= [\d.]+ GiB \| ([\d.]+ GiB) \|", text("docs/operations.md"))
    assert peaks == ["33.0 GiB", "19.2 GiB"]
    assert all(peak in text("docs/speed.md") for peak in peaks)


ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in text("docs/operations.md").splitlines()
    if re.match(r"\| (Llama-3\.1-8B|Qwen3-8B|70B) \|", line)
]


def test_the_sizing_table_has_all_models() -> None:
    assert [(row[0], row[1]) for row in ROWS] == [(name, precision) for name in SHAPES for precision in ("bf16", "fp8")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[1]}")
def test_the_sizing_table_is_what_the_planner_says(
    row: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planner's estimate for a CUDA device that need not be there."""
    model, precision, weights, chunk, per_token, *cells = row
    values = SHAPES[model] | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    monkeypatch.setattr(EngineConfig, "torch_device", lambda self: torch.device("cuda", 0))
    made_in, hf_config = Precision(precision, torch.bfloat16), plan.load_config(EngineConfig(str(tmp_path)))
    monkeypatch.setattr(plan, "resolve_precision", lambda *asked: made_in)
    made_of = meta_model(EngineConfig(""), hf_config, made_in)
    monkeypatch.setattr(plan, "meta_model", lambda *model: made_of)
    config = EngineConfig(str(tmp_path), precision=precision, attention=StemConfig.preset("release"))
    said = []
    for gib in CARDS:
        try:
            made = plan.estimate_plan(config, gib * GIB)
        except EngineError:
            said.append("-")
            continue
        said.append(f"{made.max_context:,} / {made.documents(33_024)} / {made.documents(131_072)}")
        assert f"{made.weight_bytes / GIB:.1f} GiB" == weights
        assert f"{plan.chunk_bytes(config, hf_config, made_in) / GIB:.1f} GiB" == chunk
        assert (made.reserve_bytes > plan.chunk_bytes(config, hf_config, made_in)) == (precision == "fp8")
        assert f"{made.bytes_per_token:,}" == per_token
    assert said == cells


@cache
def ray_job() -> dict[str, Any]:
    return yaml.safe_load(text("examples/cluster/rayjob.yaml"))


def test_ray_job_has_a_head_without_gpu_and_workers_with_one() -> None:
    job = ray_job()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    (group,) = cluster["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert worker["image"] == head["image"]
    assert f"ray=={cluster['rayVersion']}\n" in text("constraints.txt")


def test_ray_job_keeps_secrets_in_secrets() -> None:
    cluster = ray_job()["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        secret = {item["name"] for item in container["env"] if "secretKeyRef" in item.get("valueFrom", {})}
        assert secret == {"HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
        assert {item["name"] for item in container["env"] if "value" in item} == {"PYTHONPATH", "HF_HOME"}
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_job_takes_the_flags_of_the_ray_job() -> None:
    words = shlex.split(ray_job()["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs.summarize"]
    parser: argparse.ArgumentParser = Parser(allow_abbrev=False)
    add_job_flags(parser)
    config = job_config(parser.parse_args(words[3:]))
    (group,) = ray_job()["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert config.workers == group["replicas"]
    assert Path(config.output).is_absolute()
