"""A job's settings in the forms that its workers and their engines take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import pyarrow as pa

from pipeline.engine.config import EngineConfig
from pipeline.location import safe_name
from pipeline.model_files import is_local
from pipeline.prompts.questions import Questions
from pipeline.settings.config import JobConfig
from pipeline.settings.questions import answers_of
from pipeline.settings.shared import EngineSettings, ReadSettings, Sampling
from pipeline.workers.work import GRACE_SECONDS, WorkerConfig
from stem_core.settings import values_of


def make_worker_config(
    config: JobConfig,
    questions: Questions,
    today: date,
    device: str,
    threads: int,
    *,
    kept: Sequence[pa.Field] = (),
    engine_factory: str = "",
    grace: float | None = None,
) -> WorkerConfig:
    """The job's settings in the form a worker takes them."""
    answers = answers_of(config, questions)
    return WorkerConfig(
        engine=replace(make_engine_config(config, device), grammars=bool(answers)),
        questions=questions,
        too_long=config.too_long,
        max_new_tokens=config.max_new_tokens,
        sampling=Sampling(**values_of(config, Sampling)),
        stop=config.stop,
        text_column=config.text_column,
        reading=ReadSettings(**values_of(config, ReadSettings)),
        model_name=model_label(config),
        config_hash=config.fingerprint(),
        today=today,
        template_args=config.chat_template_args,
        thinking=config.thinking,
        evidence=config.evidence == "on",
        schemas={name: schema.text for name, schema in answers.items()},
        typed_answers=len({schema.arrow_type for schema in answers.values()}) < 2,
        kept=tuple(pa.field(field.name, field.type) for field in kept),
        deadline=config.deadline,
        grace=GRACE_SECONDS if grace is None else grace,
        threads=threads,
        engine_factory=engine_factory or "pipeline.engine:Engine",
    )


def make_engine_config(config: JobConfig, device: str) -> EngineConfig:
    """The job's settings in the form the engine takes them."""
    values = values_of(config, EngineSettings)
    if is_local(config.model):
        values["model"] = _absolute(config.model)
    if config.adapter is not None:
        values["adapter"] = _absolute(config.adapter)
    return EngineConfig(
        **values,
        device=device,
        gpus=config.gpus_per_worker,
        attention=config.stem(),
        seed=config.seed,
    )


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def model_label(config: JobConfig) -> str:
    """What rows call the model: its name, the adapter merged into it, and by how much its context was stretched."""
    label = safe_name(config.model)
    if config.adapter is not None:
        label += f" + {safe_name(config.adapter)}"
    return label if config.rope_scaling is None else f"{label} (YaRN {config.rope_scaling:g})"
