"""Questions to documents that are read once: many to one, several to each of a job, and what a decode step costs."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.engine import Completion, Engine, Request, SharedPrompt
from pipeline.engine.probes.timing import decode_step_ms
from pipeline.errors import JobError
from tools.benchmark.engine.phases import random_prompts, run_documents


@dataclass(frozen=True)
class Prompts:
    """Token ids. one, many: a document for a single question, and one for all of `asked`: different ones, so that no
    cache knows them. job: the documents to each of which `asked[:each]` go.
    """

    one: np.ndarray
    many: np.ndarray
    job: list[np.ndarray]
    asked: list[np.ndarray]
    each: int


def prompts_of(arguments: argparse.Namespace, vocabulary: int) -> Prompts:
    """Random ones, for the flags of tools.benchmark.engine; the same for every engine."""
    longest = max(arguments.lengths)
    lengths = sorted((arguments.lengths[i % len(arguments.lengths)] for i in range(arguments.documents)), reverse=True)
    one, many = random_prompts([longest, longest], vocabulary, seed=11)
    if arguments.questions_each > arguments.questions:
        raise JobError(f"--questions-each {arguments.questions_each}: at most --questions {arguments.questions}")
    asked = random_prompts([arguments.question_tokens] * arguments.questions, vocabulary, seed=12)
    job = random_prompts(lengths, vocabulary, seed=13)
    return Prompts(one, many, job, asked, arguments.questions_each)


def ask(engine: Engine, prompts: Prompts, new_tokens: int) -> dict[str, Any]:
    """Seconds of one question and of many to the longest document, of several to each document of a job and of a job
    with one question in whole prompts; milliseconds of the decode steps.

    Raises JobError if a request does not end well.
    """
    for count in (len(prompts.asked), prompts.each, 1):  # steps are captured, kernels compiled
        _shared(engine, [prompts.one[:700]], prompts.asked[:count], 8)
    one, _ = _shared(engine, [prompts.one], prompts.asked[:1], new_tokens)
    many, done = _shared(engine, [prompts.many], prompts.asked, new_tokens)
    several, all_done = _shared(engine, prompts.job, prompts.asked[: prompts.each], new_tokens)
    plain, _ = run_documents(engine, [np.concatenate([ids, prompts.asked[0]]) for ids in prompts.job], new_tokens)
    tails = [len(ids) for ids in prompts.asked]
    steps = {
        count: decode_step_ms(engine, tails[:count], prefix_tokens=len(prompts.one))
        for count in (1, len(prompts.asked))
    }
    apart = decode_step_ms(engine, [len(prompts.one) + tails[0]])
    alone, together = steps[1], steps[len(prompts.asked)]
    return {
        "document_tokens": len(prompts.one),
        "question_tokens": tails[0],
        "questions": len(prompts.asked),
        "new_tokens": new_tokens,
        "one_seconds": one,
        "all_seconds": many,
        "all_vs_one": many / one,
        "prefill_seconds": sum(completion.prefill_seconds for completion in done),
        "step_of_one_ms": alone,
        "step_of_all_ms": together,
        "step_vs_one": None if alone is None or together is None else together / alone,
        "step_of_one_whole_prompt_ms": apart,
        "job_documents": len(prompts.job),
        "job_questions_each": prompts.each,
        "job_seconds": several,
        "job_prefill_seconds": sum(completion.prefill_seconds for completion in all_done),
        "job_of_one_question_seconds": plain,
        "jobs_how": f"{prompts.each} times the job of whole prompts, which was run once",
        "jobs_vs_questions": prompts.each * plain / several,
    }


def _shared(
    engine: Engine, documents: list[np.ndarray], asked: list[np.ndarray], new_tokens: int
) -> tuple[float, list[Completion]]:
    """Seconds from the first add_shared() to the last completion, and the completions."""
    begin = time.perf_counter()
    for number, ids in enumerate(documents):
        requests = tuple(Request(f"{number} {i}", tail, new_tokens) for i, tail in enumerate(asked))
        engine.add_shared(SharedPrompt(ids, requests))
    done: list[Completion] = []
    while engine.has_work:
        done += engine.step()
    seconds = time.perf_counter() - begin
    for completion in done:
        if completion.status != "ok":
            raise JobError(f"request {completion.request_id} ended with {completion.status}: {completion.error}")
    if len(done) != len(documents) * len(asked):
        raise JobError(f"{len(done)} answers to {len(documents)} documents x {len(asked)} questions")
    return seconds, done
