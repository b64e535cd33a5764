"""Every setting of a job, once: the flags, the keys of a job file and the keyword arguments come from this record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import JobError, nearest, one_line
from pipeline.options import checked, flag, option, short
from stem_core.config import PRESETS, REMOVED_PRESETS, StemConfig
from stem_core.estimators import ESTIMATORS, EstimatorSettings

Config = TypeVar("Config")


def stem_option(kind: str, meaning: str, choices: tuple[str, ...] = ()) -> Any:
    """A field that overrides the preset's; None leaves it."""
    return option(None, kind, meaning, choices=choices, group="attention", changes_output=True)


def with_estimator_settings(config: type[Config]) -> type[Config]:
    """Declares the estimators' own settings in `config`, behind `estimator`, as the estimators' files describe them."""
    declared = {}
    for name, kind in config.__annotations__.items():
        declared[name] = kind
        for item in fields(EstimatorSettings) if name == "estimator" else ():
            declared[item.name] = f"{item.type} | None"
            setattr(config, item.name, stem_option(str(item.type), item.metadata["meaning"]))
    config.__annotations__ = declared
    return config


@dataclass(frozen=True)
@with_estimator_settings
class JobConfig:
    """A summarising job. Values are checked on construction; JobError says what is wrong and how to mend it."""

    input: tuple[str, ...] = option((), "list", "files, folders or globs; local, s3:// or gs://", group="data")
    output: str = option("", "str", "folder for the results; made if missing", group="data")
    model: str = option("", "str", "folder of a transformers model, or its hub id", group="model", changes_output=True)

    text_column: str = option("text", "str", "column (Parquet) or key (JSONL) that holds the text", group="data")
    id_column: str | None = option(
        None,
        "str",
        "column that holds the id; unset: `id` or `document_id` if there is one; else, and if empty: file name and row",
        group="data",
    )
    keep_columns: tuple[str, ...] = option((), "list", "columns of the input to copy into the results", group="data")
    shard: str | None = option(
        None, "shard", "i/n: only the i-th (from 0) of n stable shares of the documents", group="data"
    )

    task: str = option(
        "summarize",
        "str",
        "what to do with each document",
        choices=("summarize", "ask"),
        group="prompt",
        changes_output=True,
    )
    question: str | None = option(
        None, "str", "the question or instruction that follows the document", group="prompt", changes_output=True
    )
    prompt_file: str | None = option(
        None, "str", "Jinja file that makes the user message from {{ document }} and {{ question }}", group="prompt"
    )
    chat_template_args: Mapping[str, Any] | None = option(
        None,
        "map",
        'arguments of the model\'s chat template, as JSON: {"enable_thinking": false}',
        group="prompt",
        changes_output=True,
    )
    prompt_date: str | None = option(
        None,
        "date",
        "today for chat templates that print the date; unset: the day on which the output was begun",
        group="prompt",
        changes_output=True,
    )
    too_long: str = option(
        "error",
        "str",
        "documents beyond the context: error row, truncate (cut out the middle), map-reduce (do parts, then merge)",
        choices=("error", "truncate", "map-reduce"),
        group="prompt",
        changes_output=True,
    )

    max_new_tokens: int = option(256, "int", "most tokens to generate", low=1, group="generation", changes_output=True)
    temperature: float = option(0.0, "float", "randomness; 0 is greedy", low=0, group="generation", changes_output=True)
    top_p: float = option(
        1.0,
        "float",
        "share of the probability that sampling draws from",
        low=0,
        high=1,
        group="generation",
        changes_output=True,
    )
    seed: int = option(
        0,
        "int",
        "seed of sampling; what is drawn for a document depends only on this and on the document's id",
        group="generation",
        changes_output=True,
    )

    attention: str = option(
        "stem", "str", "attention of the prefill", choices=("stem", "dense"), group="attention", changes_output=True
    )
    preset: str = option(
        "sampled",
        "str",
        "how key blocks are chosen: sampled is the default; paper and release are Stem as published, which loses facts "
        "that a document states once",
        choices=tuple(PRESETS),
        group="attention",
        changes_output=True,
    )
    budget: float | None = option(
        None,
        "float",
        "share of the causal blocks to keep, in place of the preset's schedule",
        low=0,
        high=1,
        group="attention",
        changes_output=True,
    )
    base_blocks: int | None = stem_option("int", "blocks that every row keeps, with the schedule of sampled")
    growth: float | None = stem_option("float", "share of its causal blocks that a row keeps besides, likewise")
    block_size: int | None = stem_option("int", "tokens in a block")
    decay: float | None = stem_option("float", "last row's budget as a share of the first one's")
    sink_blocks: int | None = stem_option("int", "leading blocks always kept")
    local_blocks: int | None = stem_option("int", "nearest blocks always kept")
    max_output_error: float | None = stem_option(
        "float", "documents whose attention output sparse prefill changes by more, relatively, are read again, densely"
    )
    dense_layers: int | None = stem_option("int", "leading layers that stay dense")
    dense_below: int | None = stem_option("int", "prompts of fewer tokens stay dense")
    dense_tail: int | None = stem_option("int", "blocks at the prompt's end that see everything")
    estimator: str | None = stem_option("str", "how blocks are scored", tuple(ESTIMATORS))

    device: str = option(
        "auto",
        "str",
        "where models run; auto: on GPUs if there are any",
        choices=("auto", "cpu", "cuda"),
        group="engine",
    )
    precision: str = option(
        "auto",
        "str",
        "number format of weights, attention and KV; fp8 needs GPUs that have it; auto: bf16 on GPUs, fp32 on CPUs",
        choices=("auto", "bf16", "fp16", "fp32", "fp8"),
        group="engine",
        changes_output=True,
    )
    chunk_tokens: int = option(16896, "int", "prompt tokens in one prefill step", low=16, group="engine")
    max_live: int = option(8, "int", "documents that a worker decodes together", low=1, high=1024, group="engine")
    max_context: int | None = option(
        None,
        "int",
        "most tokens of prompt and output; unset: the model's own limit",
        low=2,
        group="engine",
        changes_output=True,
    )
    arena_tokens: int | None = option(None, "int", "tokens of KV memory; unset: what is free", low=2, group="engine")
    load_format: str = option(
        "auto",
        "str",
        "auto: the model's weights; dummy: random ones, for measuring",
        choices=("auto", "dummy"),
        group="engine",
        changes_output=True,
    )
    revision: str | None = option(None, "str", "revision of a hub model", group="model", changes_output=True)
    trust_remote_code: bool = option(
        False, "bool", "run code that comes with the model", group="model", changes_output=True
    )

    workers: int | str = option(
        "auto",
        "auto_int",
        "engines to run; auto: all that the GPUs hold, as the cluster changes; without GPUs, one for each core up to 4",
        low=1,
        group="run",
    )
    gpus_per_worker: int = option(
        1, "int", "GPUs of one node that a worker's model is spread over, by layers", low=1, high=64, group="run"
    )
    deadline: float = option(3600.0, "float", "seconds for one document in a worker; 0: none", low=0, group="run")
    max_attempts: int = option(
        3, "int", "times a document may end its worker before it is given up", low=1, group="run"
    )
    flush_documents: int = option(64, "int", "most results in one part file", low=1, group="run")
    flush_seconds: float = option(10.0, "float", "most seconds that a result waits to be written", low=0, group="run")
    compact: bool = option(True, "bool", "at the end, merge part files if there are more than 100", group="run")
    resume: bool = option(
        True, "bool", "go on where an earlier run stopped; off: refuse an output that holds results", group="run"
    )
    retry_failed: bool = option(False, "bool", "do again the documents whose rows are not ok", group="run")
    force: bool = option(
        False, "bool", "go on although settings, model or input differ from the earlier run's", group="run"
    )
    dry_run: bool = option(False, "bool", "print the plan and stop", group="run")
    ray_address: str | None = option(
        None, "str", "cluster to use; unset: $RAY_ADDRESS, else this machine alone", group="run"
    )

    def __post_init__(self) -> None:
        if isinstance(self.preset, str) and self.preset in REMOVED_PRESETS:
            raise JobError(f"{flag('preset')} {self.preset} is no more: {REMOVED_PRESETS[self.preset]}")
        for item in fields(self):
            object.__setattr__(
                self, item.name, checked(item.name, getattr(self, item.name), item.metadata, item.default)
            )
        for name in ("input", "output", "model"):
            if not getattr(self, name):
                raise JobError(f"{flag(name)} is missing; it is needed: {meaning(name)}")
        if self.budget == 0 or self.top_p == 0:
            raise JobError(
                f"{flag('budget') if self.budget == 0 else flag('top_p')} must be above 0 and at most 1, got 0"
            )
        if self.task == "ask" and not self.question and not self.prompt_file:
            raise JobError("--task ask needs --question: what to ask about each document")
        given = [name for name in STEM_OVERRIDES if getattr(self, name) is not None]
        if self.attention == "dense" and given:
            raise JobError(f"{flag(given[0])} has no meaning with --attention dense; leave one of them out")
        if self.device == "cpu" and self.gpus_per_worker > 1:
            asked = f"{flag('gpus_per_worker')} {self.gpus_per_worker}"
            raise JobError(f"{asked} has no meaning with --device cpu; leave one of them out")
        self._check_precision(self.stem())

    def _check_precision(self, stem: StemConfig | None) -> None:
        if self.precision == "fp8" and stem is not None:
            from pipeline.engine.precision import fp8_block_obstacle

            obstacle = fp8_block_obstacle(stem)
            if obstacle:
                raise JobError(f"{flag('precision')} fp8: {obstacle}; change {flag('block_size')}")

    def stem(self) -> StemConfig | None:
        """The prefill's configuration, or None for dense. Raises JobError if its fields do not go together."""
        if self.attention == "dense":
            return None
        changes = {name: getattr(self, name) for name in STEM_OVERRIDES if getattr(self, name) is not None}
        if "budget" in changes:
            changes |= {"schedule": "density", "density": float(changes.pop("budget"))}
        try:
            return StemConfig.preset(self.preset, **changes)
        except ValueError as error:
            raise JobError(f"attention settings: {error}") from None

    def shard_pair(self) -> tuple[int, int]:
        """(i, n) of --shard; (0, 1) for all."""
        if self.shard is None:
            return 0, 1
        index, _, count = self.shard.partition("/")
        return int(index), int(count)

    def today(self) -> date:
        """The date for prompts of a job that begins now."""
        return date.fromisoformat(self.prompt_date) if self.prompt_date else date.today()

    def output_settings(self) -> dict[str, Any]:
        """The settings that can change an output, defaults filled in."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.metadata["changes_output"]}
        stem = self.stem()
        for name in (*STEM_OVERRIDES, "preset", "attention", "model"):
            values.pop(name, None)
        settings = stem.to_dict() if stem else None
        # Results that are older than these settings are of the same job.
        if settings and not settings["max_output_error"]:
            del settings["max_output_error"]
        if self.prompt_date is None:
            del values["prompt_date"]
        return values | {"stem": settings}

    def fingerprint(self) -> str:
        """12 hex digits over the settings that can change an output (the model's files are fingerprinted apart)."""
        return hashlib.sha256(json.dumps(self.output_settings(), sort_keys=True).encode()).hexdigest()[:12]


# Those that are unset by default.
STEM_OVERRIDES = tuple(
    item.name for item in fields(JobConfig) if item.metadata["group"] == "attention" and item.default is None
)


def meaning(name: str) -> str:
    """The one-line description of a setting."""
    return {item.name: item.metadata["meaning"] for item in fields(JobConfig)}[name]


def from_mapping(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Keys of a job file or of keyword arguments as JobConfig's names; `-` and `_` are the same.

    Raises JobError for an unknown key, with the nearest valid one.
    """
    known = {item.name for item in fields(JobConfig)}
    result = {}
    for key, value in values.items():
        name = key.replace("-", "_") if isinstance(key, str) else ""
        if name not in known:
            raise JobError(f"{origin}: {short(key)} is not a setting{nearest(name, known) or '; see --help'}")
        result[name] = value
    return result


def read_job_file(path: str) -> dict[str, Any]:
    """Settings from a YAML file. Raises JobError if it cannot be read or has unknown keys."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise JobError(f"--config {path}: cannot be read: {one_line(error)}") from None
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:  # ValueError: a 13th month, say
        raise JobError(f"--config {path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(values, Mapping):
        raise JobError(f"--config {path}: expected `key: value` lines, got {type(values).__name__}")
    return from_mapping(values, f"--config {path}")
