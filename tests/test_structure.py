"""Imports run one way, in no circle; wheel, image, workflow and hooks name what is there."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
# Each package, and those that it may import: the ones below it.
BELOW = {
    "tools": {"jobs", "pipeline", "stem_core", "kernels"},
    "jobs": {"pipeline", "stem_core", "kernels"},
    "pipeline": {"stem_core", "kernels"},
    "stem_core": {"kernels"},
    "kernels": set(),
}


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of each of our modules that a file imports, in functions, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = [node.value.replace(":", ".")]  # what importlib or a worker is told to import
            if not all(part.isidentifier() for part in found[0].split(".")) or "." not in found[0]:
                continue
        else:
            continue
        for name in found:
            if name.partition(".")[0] in BELOW:
                yield node.lineno, name


def wrong_imports(package: str, folder: Path) -> list[str]:
    """Where a package imports one that is not below it."""
    allowed = BELOW[package] | {package}
    return [
        f"{path.relative_to(folder)}:{line} imports {name}"
        for path in sorted((folder / package).rglob("*.py"))
        for line, name in imports_of(path)
        if name.partition(".")[0] not in allowed
    ]


@pytest.mark.parametrize("package", BELOW)
def test_imports_run_one_way(package: str) -> None:
    assert not wrong_imports(package, ROOT)


@pytest.mark.parametrize(
    "code",
    [
        "from tools.benchmark import attention",
        "import tools",
        "def late() -> None:\n    from tools.faults.runs import LIVE",
        'importlib.import_module("tools.docs")',
        'run(job, engine_factory="tools.faults.engines:CountingEngine")',
    ],
)
def test_such_an_import_would_be_found(code: str, tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/summarize.py").write_text(code, encoding="utf-8")
    assert wrong_imports("jobs", tmp_path)
    assert [package for package in BELOW if "jobs" in BELOW[package]] == ["tools"]


def graph(package: str) -> dict[str, set[str]]:
    """The modules of a package, and which of them each one imports."""
    names = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found: dict[str, set[str]] = {}
    for module, path in names.items():
        found[module] = set()
        for _, name in imports_of(path):
            target = name if name in names else name.rpartition(".")[0]
            if target in names and target != module:
                found[module].add(target)
    return found


def circles(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves by way of others."""

    def reaches(module: str) -> set[str]:
        seen: set[str] = set()
        todo = [*edges[module]]
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += edges[name]
        return seen

    return sorted(module for module in edges if module in reaches(module))


@pytest.mark.parametrize("package", ["tools", "jobs"])
def test_no_imports_in_a_circle(package: str) -> None:
    assert not circles(graph(package))


def test_a_circle_would_be_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


PROJECT = tomllib.loads(text("pyproject.toml"))


def test_tools_stay_out_of_the_wheel() -> None:
    settings = PROJECT["tool"]
    packed = settings["setuptools"]["packages"]["find"]["include"]
    for package in BELOW:
        assert any(fnmatchcase(f"{package}.room", pattern) for pattern in packed) == (package != "tools"), package
    assert set(settings["mypy"]["packages"]) == set(BELOW)


def image_problems(dockerfile: str, ignored: str) -> list[str]:
    """What is wrong with an image of Stemline, and with what its build may read."""
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE) for name in line.split()]
    let_in = re.findall(r"^!(.*)$", ignored, re.MULTILINE)
    found = [f"{name} is not there" for name in copied if not (ROOT / name).exists()]
    found += [f"{name} is copied but ignored" for name in copied if name not in let_in]
    found += [f"{name} is sent to the build for nothing" for name in let_in if name not in copied]
    found += [f"{name} is missing" for name in (*BELOW["tools"], "models") if name not in copied]
    python = re.search(r"^FROM python:(\d+\.\d+)-", dockerfile, re.MULTILINE)
    if not python or python[1] not in text("constraints.txt").splitlines()[0]:
        found.append("another Python than that of constraints.txt")
    return found


def test_the_image_holds_what_a_job_needs() -> None:
    dockerfile = text("Dockerfile")
    assert not image_problems(dockerfile, text(".dockerignore"))
    job = text("examples/cluster/rayjob.yaml")
    (built,) = re.findall(r"docker build -t (\S+) \.", dockerfile)
    assert built == f"stemline:{PROJECT['project']['version']}"
    assert set(re.findall(r"image: (\S+)", job)) == {built}
    (folder,) = re.findall(r"^WORKDIR (.*)$", dockerfile, re.MULTILINE)
    assert f"ENV PYTHONPATH={folder}\n" in dockerfile
    assert re.search(rf"name: PYTHONPATH\s+value: {folder}\n", job)


@pytest.mark.parametrize(
    ("was", "becomes", "problem"),
    [
        ("COPY kernels kernels", "COPY kernel kernel", "kernel is not there"),
        ("COPY pipeline pipeline\n", "", "pipeline is missing"),
        ("COPY jobs jobs", "COPY jobs tests jobs", "tests is copied but ignored"),
        ("python:3.11", "python:3.12", "another Python"),
    ],
)
def test_a_wrong_image_would_be_found(was: str, becomes: str, problem: str) -> None:
    assert was in text("Dockerfile")
    found = image_problems(text("Dockerfile").replace(was, becomes), text(".dockerignore"))
    assert any(line.startswith(problem) for line in found), found


def test_the_workflow_runs_what_ci_runs() -> None:
    workflow = yaml.safe_load(text(".github/workflows/ci.yaml"))
    tests = workflow["jobs"]["tests"]
    versions = tests["strategy"]["matrix"]["python"]
    assert versions == ["3.11", "3.12", "3.13"]
    assert f">={versions[0]}" == PROJECT["project"]["requires-python"]
    assert [step["run"] for step in tests["steps"] if "run" in step] == [".ci/run"]
    assert "${{ matrix.python }}" in tests["container"]["image"]
    assert any(step.get("run") == "python -m build" for step in workflow["jobs"]["wheel"]["steps"])


def test_hooks_run_what_make_lint_runs() -> None:
    (local,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    lint = text("Makefile").partition("\nlint:")[2].partition("\n\n")[0]
    for hook in local["hooks"]:
        told = hook["entry"].removeprefix(".venv/bin/").removesuffix(" --fix")
        assert f"$(VENV)/bin/{told}" in lint, hook
    assert len(local["hooks"]) == lint.count("$(VENV)/bin/")


def test_citation_and_changelog_tell_the_version() -> None:
    version = PROJECT["project"]["version"]
    cited = yaml.safe_load(text("CITATION.cff"))
    assert cited["version"] == version
    (paper,) = cited["references"]
    assert paper["identifiers"][0]["value"].removeprefix("arXiv:") in text("README.md")
    assert f"\n## {version} ({cited['date-released']})\n" in text("CHANGELOG.md")
