"""The same questions read by the product's engine, in any of its precisions, fp8 too.

The engine answers prompts and shows nothing of what happens inside, so there are no retained mass, needle blocks and
KL, and every question's prompt is prefilled by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jobs.evaluate.answers import Answer
from jobs.evaluate.arms import ENGINE_ARMS, Arm
from jobs.evaluate.options import Options
from jobs.evaluate.prompts import Prompt, Reading
from jobs.shapes import shape_folder
from pipeline.engine import Completion, Engine, EngineConfig, Request
from pipeline.engine.loading import context_limit, load_config, load_precision
from pipeline.engine.precision import fp8_block_obstacle
from pipeline.errors import JobError
from stem_core.config import StemConfig


def engine_arms(arms: Sequence[Arm], precisions: Sequence[str]) -> list[Arm]:
    """Each arm in each precision, named after both. Raises JobError for one that the engine does not run."""
    for arm in arms:
        if not arm.is_product:
            raise JobError(f"--engine: it cannot run arm {arm.name!r}; it runs {', '.join(ENGINE_ARMS)}")
        obstacle = fp8_block_obstacle(arm.config) if arm.config is not None and "fp8" in precisions else ""
        if obstacle:
            raise JobError(f"--engine fp8: {obstacle}; choose with --block-sizes")
    return [replace(arm, name=f"{arm.name} {name}", precision=name) for arm in arms for name in precisions]


def engine_config(options: Options, precision: str, attention: StemConfig | None = None) -> EngineConfig:
    """The model of an evaluation, as the engine loads it."""
    folder = options.model
    if options.load_format == "dummy":  # one of jobs.shapes by name, or any config.json
        folder = str(shape_folder(options.model, options.output / "shape"))
    return EngineConfig(
        folder,
        device=str(options.device),
        precision=precision,
        attention=attention,
        chunk_tokens=options.chunk_tokens,
        load_format=options.load_format,
        revision=options.revision,
        seed=options.seed,
    )


class EngineReader:
    """Reads under one arm at a time, with an engine of that arm's precision and attention.

    Raises EngineError for a model or precision that cannot run here.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        configs = [engine_config(options, precision) for precision in options.engine]
        for config in configs:
            load_precision(config)
        loaded = load_config(configs[0])
        self.limit = context_limit(loaded)
        self.layers = int(loaded.get_text_config().num_hidden_layers)

    def read(self, readings: Sequence[Reading], arm: Arm) -> list[Answer]:
        """Answers to all questions and lookups of some documents. Raises JobError where the engine ends one otherwise.

        A lookup is a prompt that ends where the value is said again; the model must go on with the value.
        """
        asked = {str(index): answer for index, answer in enumerate(_unanswered(readings, arm))}
        engine = Engine(engine_config(self._options, arm.precision or "auto", arm.config))
        try:
            for request_id, answer in asked.items():
                engine.add(Request(request_id, answer.prompt.ids, answer.prompt.max_new_tokens))
            while engine.has_work:
                for completion in engine.step():
                    _fill_in(asked[completion.request_id], completion)
        finally:
            engine.close()
        return list(asked.values())


def _unanswered(readings: Sequence[Reading], arm: Arm) -> list[Answer]:
    answers = []
    for reading in readings:
        for lookup in reading.lookups:
            whole = reading.prompts[0]
            first, last = lookup.second
            answers.append(Answer(arm, reading, Prompt(whole.question, whole.ids[:first], (), last - first), lookup))
        answers += [Answer(arm, reading, prompt) for prompt in reading.prompts if prompt.max_new_tokens]
    return answers


def _fill_in(answer: Answer, completion: Completion) -> None:
    if completion.status != "ok":
        name = answer.reading.document.name
        raise JobError(f"--engine: {answer.arm.name}, {name}: {completion.status}: {completion.error}")
    answer.prefill_seconds, answer.answer_seconds = completion.prefill_seconds, completion.decode_seconds
    if answer.lookup is None:
        answer.token_ids = completion.token_ids
    else:
        first, last = answer.lookup.second
        answer.correct = completion.token_ids == answer.reading.prompts[0].ids[first:last].tolist()
