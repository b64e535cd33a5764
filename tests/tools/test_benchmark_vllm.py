"""vLLM in the engine's benchmark, played by a module of that name: what it is asked, what becomes of its answers."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

import tools.benchmark.engine.vllm_peer as peer
from tools.benchmark.__main__ import main
from tools.benchmark.engine.phases import random_prompts
from tools.benchmark.engine.questions import prompts_of
from tools.benchmark.engine.report import headings, rows

TINY = str(Path(__file__).parents[2] / "models" / "tiny-reader")
# bf16 on a CPU: the arms and vLLM must share a precision.
FLAGS = (
    f"engine --shape {TINY} --device cpu --precision bf16 --arms dense --lengths 200 100 --latency-lengths 150 300 "
    "--documents 3 --new-tokens 4 --block-size 16 --chunk-tokens 64 --phases latency job vllm "
    "--agreement-tokens 1000"
).split()
# Slow enough to be seen, and told what it was called with.
FAKE = """
import json, time
from types import SimpleNamespace as Some
__version__ = "0.0-fake"
BROKEN = {broken!r}
def told(**what):
    with open({calls!r}, "a") as file:
        file.write(json.dumps(what) + "\\n")
class SamplingParams:
    def __init__(self, **given):
        self.__dict__.update(given)
class LLM:
    def __init__(self, **given):
        told(**given)
        if BROKEN == "compiled" and not given["enforce_eager"]:
            raise RuntimeError("no compiler")
        if BROKEN == "dies":
            raise SystemExit(9)
        cache = Some(num_gpu_blocks=10, block_size=16)
        self.llm_engine = Some(step=lambda: time.sleep(0.002), vllm_config=Some(cache_config=cache))
    def generate(self, prompts, params, use_tqdm):
        told(ids=[prompt["prompt_token_ids"] for prompt in prompts], new=params.max_tokens, eos=params.ignore_eos)
        for _ in range(params.max_tokens):
            self.llm_engine.step()
        short = BROKEN == "short" and len(prompts) == 3
        return [Some(outputs=[Some(token_ids=[7] * (params.max_tokens - short))]) for _ in prompts]
"""


def run(folder: Path, *flags: str, broken: str = "") -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    """Exit code, results, what the module was called with."""
    (folder / "site" / "vllm").mkdir(parents=True)
    calls = folder / "calls"
    calls.touch()
    code = FAKE.format(broken=broken, calls=str(calls))
    (folder / "site" / "vllm" / "__init__.py").write_text(code)
    ended = main([*FLAGS, *flags, "--vllm-path", str(folder / "site"), "--output", str(folder / "out")])
    results = json.loads((folder / "out" / "engine.json").read_text())
    return ended, results, [json.loads(line) for line in calls.read_text().splitlines()]


def test_the_same_lists_of_tokens_and_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, results, (engine, *calls) = run(tmp_path, "--vllm-chunk-tokens", "32")
    assert code == 0, results["failed"]
    assert (engine["quantization"], engine["kv_cache_dtype"], engine["enable_prefix_caching"]) == (None, "auto", False)
    assert engine["max_num_batched_tokens"] == 32
    assert engine["max_model_len"] == 364
    config = json.loads((Path(TINY) / "config.json").read_text())
    timed = [call for call in calls if call["ids"][0][:2] not in ([0, 1], [5, 5])]  # not those that warm up
    assert all(call["eos"] for call in calls)
    for length, wanted in ((150, timed[:3]), (300, timed[3:6])):
        ids = random_prompts([length], config["vocab_size"])[0].tolist()
        assert [(call["ids"], call["new"]) for call in wanted] == [([ids], 1), ([ids], 1), ([ids], 4)]
    (job,) = timed[6:]
    assert (job["ids"], job["new"]) == (
        [ids.tolist() for ids in random_prompts([200, 200, 100], config["vocab_size"])],
        4,
    )

    theirs, ours = results["vllm"]["bf16"], results["engine"]["dense-bf16"]
    assert theirs["about"]["vllm"] == "0.0-fake"
    assert [point["prompt_tokens"] for point in theirs["latency"]] == [150, 300]
    assert theirs["latency"][0]["decode_step_ms"] == pytest.approx(2, abs=1.9)
    assert theirs["job"]["prompt_tokens"] == ours["job"]["prompt_tokens"] == [200, 200, 100]
    factor = theirs["job"]["seconds"] / ours["job"]["seconds"]
    assert results["ratios"]["dense-bf16"]["job_vs_vllm"] == pytest.approx(factor)
    assert headings(results) == ["", "HF generate, sdpa", "vLLM bf16", "dense-bf16", "dense-bf16 / vLLM"]
    table = {row[0]: row[1:] for row in rows(results)}
    assert table["job: seconds"][3] == f"{factor:.2f}x"
    first = [found["latency"][1]["first_token_seconds"] for found in (theirs, ours)]
    assert table["300 tokens: first token"] == (
        "",
        f"{first[0]:.2f} s",
        f"{first[1]:.2f} s",
        f"{first[0] / first[1]:.2f}x",
    )
    assert table["300 tokens: decode step"][3].endswith("x")
    shown = capsys.readouterr().out
    assert "vLLM bf16: 0.0-fake" in shown
    assert "room for 160" in shown


def test_where_it_is_not_installed_the_table_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLAGS, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "engine.json").read_text())
    assert results["vllm"]["bf16"]["missing"].startswith("vLLM is not installed for ")
    table = {row[0]: row[1:] for row in rows(results)}
    assert table["job: seconds"][:2] == table["150 tokens: first token"][:2] == ("", "not installed")
    assert headings(results)[-1] == "dense-bf16"
    assert "vLLM bf16: vLLM is not installed for" in capsys.readouterr().out


def test_without_a_compiler_it_runs_eagerly(tmp_path: Path) -> None:
    code, results, calls = run(tmp_path, broken="compiled")
    assert code == 0
    assert [call["enforce_eager"] for call in calls if "enforce_eager" in call] == [False, True]
    assert results["vllm"]["bf16"]["about"]["eager"]
    assert "no compiler; now without compilation" in results["skipped"][0]


def test_what_was_measured_before_it_failed_stands(tmp_path: Path) -> None:
    code, results, _ = run(tmp_path, broken="short")
    assert code == 1
    assert results["failed"] == ["vllm: bf16: RuntimeError: an output is too short"]
    assert len(results["vllm"]["bf16"]["latency"]) == 2
    assert "RuntimeError" in (tmp_path / "out" / "vllm-bf16.log").read_text()


def test_a_process_that_dies_or_hangs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "GRACE_SECONDS", 0.0)
    _, results, _ = run(tmp_path / "dies", "--phases", "vllm", broken="dies")
    assert all("died with exit code" in line for line in results["failed"]), results
    assert results["failed"]
    _, results, _ = run(tmp_path / "hangs", "--phases", "vllm", "--vllm-seconds", "0.01")
    assert all("no end after" in line for line in results["failed"])
    assert results["failed"]


def test_the_time_limit_skips(tmp_path: Path) -> None:
    _, results, _ = run(tmp_path, "--vllm-seconds", "0")
    assert results["vllm"]["bf16"].keys() == {"about"}
    assert [line for line in results["skipped"] if "the time was over" in line]


def test_questions_with_a_prefix_cache(tmp_path: Path) -> None:
    """The engine's own lists, sorted by document, in an engine that caches; the other phases in one that does not."""
    flags = "--phases latency questions vllm --questions 4 --questions-each 2 --question-tokens 20 --max-live 4"
    code, results, calls = run(tmp_path, *flags.split())
    assert code == 0, results["failed"]
    assert [call["enable_prefix_caching"] for call in calls if "enable_prefix_caching" in call] == [False, True]
    prompts = prompts_of(
        Namespace(lengths=[200, 100], documents=3, questions=4, questions_each=2, question_tokens=20),
        json.loads((Path(TINY) / "config.json").read_text())["vocab_size"],
    )
    asked = [ids.tolist() for ids in prompts.asked]
    one, many, several = [call["ids"] for call in calls[-3:]]
    assert one == [prompts.one.tolist() + asked[0]]
    assert many == [prompts.many.tolist() + question for question in asked]
    assert several == [ids.tolist() + question for ids in prompts.job for question in asked[:2]]
    theirs, ours = results["vllm"]["bf16"]["questions"], results["engine"]["dense-bf16"]["questions"]
    factor = theirs["all_seconds"] / ours["all_seconds"]
    assert results["ratios"]["dense-bf16"]["questions_all_seconds_vs_vllm"] == pytest.approx(factor)
    table = {row[0]: row[1:] for row in rows(results)}
    assert table["questions: all_seconds"][3] == f"{factor:.2f}x"
