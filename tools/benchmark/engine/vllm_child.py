"""vLLM on a plan that `tools.benchmark.engine.vllm_peer` wrote, in a process that imports nothing of ours.

    python -P vllm_child.py PLAN.json

Each finding is a line on stdout that begins with MARK, written as soon as it is known; all else is vLLM's own log.
Settings: greedy, no stops, no prefix cache, random weights, CUDA graphs; fp8 means W8A8 linears and KV in fp8.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MARK = "@finding "
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: it ends with it
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
GRAPH_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32)


def say(what: str, **fields: Any) -> None:
    print(f"\n{MARK}{json.dumps({'what': what, **fields})}", flush=True)


class Peer:
    """One vLLM engine. plan: see `tools.benchmark.engine.vllm_peer.plan_of`."""

    def __init__(self, plan: dict[str, Any]) -> None:
        import numpy as np
        import torch
        import vllm

        self._plan, self._end = plan, time.perf_counter() + plan["seconds"]
        fp8, live = plan["precision"] == "fp8", plan["max_live"]
        begin = time.perf_counter()
        self._llm = vllm.LLM(
            model=plan["model"], skip_tokenizer_init=True, load_format="dummy", dtype="bfloat16", seed=0,
            quantization="fp8" if fp8 else None, kv_cache_dtype="fp8" if fp8 else "auto",
            max_model_len=plan["max_context"], max_num_batched_tokens=plan["chunk_tokens"], max_num_seqs=live,
            gpu_memory_utilization=plan["memory_share"], enable_prefix_caching="questions" in plan,
            enable_chunked_prefill=True, disable_log_stats=True, enforce_eager=plan["eager"],
            **({} if plan["eager"] else {"compilation_config": {"cudagraph_capture_sizes": _graphs(live)}}),
        )  # fmt: skip
        self._steps: list[float] = []
        self._watch_steps()
        cache = self._llm.llm_engine.vllm_config.cache_config
        say(
            "about", vllm=vllm.__version__, torch=torch.__version__, chunk_tokens=plan["chunk_tokens"],
            eager=plan["eager"], repeats=plan["repeats"], load_seconds=time.perf_counter() - begin,
            kv_tokens=(cache.num_gpu_blocks or 0) * (cache.block_size or 0),
        )  # fmt: skip
        with np.load(plan["prompts"]) as prompts:
            self._single = [prompts[f"single{i}"].tolist() for i in range(len(plan["lengths"]))]
            self._job = [prompts[f"job{i}"].tolist() for i in range(plan["documents"])]
            self._texts = {name: ids.tolist() for name, ids in prompts.items() if name.startswith("questions")}

    def run(self) -> None:
        """Warm up, then measure what the plan asks for, until its seconds are over."""
        plan, chunk = self._plan, self._plan["chunk_tokens"]
        warm = min(2 * chunk + 100, plan["max_context"] - 8)
        self._generate([[index % 1000 for index in range(warm)]], 4)
        self._generate([[5] * min(700, warm)] * min(8, plan["max_live"]), 8)
        for length, prompt in zip(plan["lengths"], self._single, strict=True):
            self._in_time(f"first token of {length}", lambda prompt=prompt: self._first_token(prompt))  # type: ignore[misc]
        if self._job:
            self._in_time("job", self._documents)
        if "questions" in plan:
            self._in_time("questions", self._questions)

    def _in_time(self, name: str, measure: Callable[[], None]) -> None:
        if time.perf_counter() > self._end:
            say("skipped", reason=f"{name}: the time was over")
        else:
            measure()

    def _first_token(self, prompt: list[int]) -> None:
        """The best of the repeats; and decode steps of a further run, past its first sixteen."""
        times = [self._generate([prompt], 1) for _ in range(self._plan["repeats"])]
        step = None
        if (new := self._plan["step_tokens"]) > 1:
            self._generate([prompt], new)
            count = min(max(1, new - 17), len(self._steps) - 1)
            step = 1000 * (self._steps[-1] - self._steps[-1 - count]) / count
        say(
            "latency", prompt_tokens=len(prompt), first_token_seconds=min(times), all_seconds=times,
            decode_step_ms=step, measured_steps=0 if step is None else count,
        )  # fmt: skip

    def _documents(self) -> None:
        """The whole job, its documents in the order of the plan: from the first request to the last token."""
        new = self._plan["new_tokens"]
        seconds = self._generate(self._job, new)
        say(
            "job", documents=len(self._job), prompt_tokens=[len(prompt) for prompt in self._job], new_tokens=new,
            seconds=seconds, documents_per_hour=3600 * len(self._job) / seconds,
            output_tokens_per_second=new * len(self._job) / seconds,
        )  # fmt: skip

    def _questions(self) -> None:
        """One question, many to another document, several to each of many: sorted by document, for the prefix cache.

        "questions" of the plan: how many there are, how many go to each document, how many documents.
        """
        count, each, documents = self._plan["questions"]
        new = self._plan["new_tokens"]
        asked = [self._texts[f"questions_asked{i}"] for i in range(count)]
        job = [self._texts[f"questions_job{i}"] for i in range(documents)]
        one = self._generate([self._texts["questions_one"] + asked[0]], new)
        many = self._generate([self._texts["questions_many"] + question for question in asked], new)
        several = self._generate([document + question for document in job for question in asked[:each]], new)
        say(
            "questions", questions=count, new_tokens=new, one_seconds=one, all_seconds=many, all_vs_one=many / one,
            job_documents=documents, job_questions_each=each, job_seconds=several,
        )  # fmt: skip

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Seconds. Raises RuntimeError for an output that is too short."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        self._steps.clear()
        begin = time.perf_counter()
        done = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        if any(len(request.outputs[0].token_ids) != new_tokens for request in done):
            raise RuntimeError("an output is too short")
        return seconds

    def _watch_steps(self) -> None:
        """Note when each step of the engine ends: a prefill chunk, or a token of each document."""
        engine, step = self._llm.llm_engine, self._llm.llm_engine.step

        def timed() -> Any:
            outputs = step()
            self._steps.append(time.perf_counter())
            return outputs

        engine.step = timed


def _graphs(max_live: int) -> list[int]:
    return sorted({size for size in GRAPH_BATCHES if size < max_live} | {max_live})


def main() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if find_spec("vllm") is None:
        say("missing", reason=f"vLLM is not installed for {sys.executable}")
    else:
        try:
            Peer(plan).run()
        except Exception as error:  # what was measured stands; the log has the traceback
            import traceback

            traceback.print_exc()
            say("failed", reason=f"{type(error).__name__}: {str(error)[:300]}", alive=True)
    say("end")
    sys.stdout.flush()
    os._exit(0)  # without the engine's own end, which can hang


if __name__ == "__main__":
    main()
