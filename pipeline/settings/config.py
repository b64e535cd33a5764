"""Every setting of a job: the flags, the keys of a job file and the keyword arguments come from this record.

A setting is declared once, where it is used: those of the engine and of sampling in pipeline.settings.shared, Stem's in
stem_core.config, all others here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from datetime import date
from typing import Any, TypeVar

from pipeline.errors import JobError, nearest
from pipeline.prompts.thinking import THINKING
from pipeline.settings.options import check_flags, flag, flag_error, read_yaml, short
from pipeline.settings.shared import EngineSettings, ReadSettings, Sampling
from pipeline.settings.vllm import NOT_HERE, OURS
from stem_core.config import DEFAULT_PRESET, PRESETS, REMOVED_PRESETS, StemConfig
from stem_core.settings import SettingError, setting

Config = TypeVar("Config")
# Headings of --help and of docs/configuration.md, in their order.
GROUPS = {
    "data": "What is read, and where results go.",
    "model": "The model. A folder needs `config.json`, a tokenizer, and `*.safetensors` or `pytorch_model.bin`; a "
    "`.gguf` file holds all of that.",
    "prompt": "What the model is asked about each document.",
    "generation": "How the output is generated, and looked up in the document.",
    "attention": "How prompts are read. What each setting means in full, and the presets' values: "
    "[Stem's fields and presets](#stems-fields-and-presets).",
    "engine": "Device, number format and memory of each worker.",
    "run": "Workers, failures, files, and going on where an earlier run stopped.",
}


# What most people need; --help has these flags first.
MOST_USED = (
    "input", "output", "model", "question", "max_new_tokens", "precision", "too_long", "workers", "retry_failed",
    "dry_run",
)  # fmt: skip


def with_stem_settings(config: type[Config]) -> type[Config]:
    """Declares StemConfig's settings in `config`, behind its own, to override the preset's; None leaves it."""
    items = StemConfig.__dataclass_fields__
    for name in dict.fromkeys((*StemConfig.__annotations__, *items)):  # those of single estimators last
        if name not in ("schedule", "density"):  # --budget sets both
            rules = dict(items[name].metadata) | {"group": "attention", "changes_output": True}
            setattr(config, name, field(default=None, metadata=rules))
            config.__annotations__[name] = f"{items[name].type} | None"
    return config


@dataclass(frozen=True)
@with_stem_settings
class JobConfig(Sampling, EngineSettings, ReadSettings):
    """A summarising job. Values are checked on construction; JobError says what is wrong and how to mend it."""

    input: tuple[str, ...] = setting((), "files, folders or globs; local, s3:// or gs://", kind="list", group="data")
    output: str = setting("", "folder for the results; made if missing", group="data")
    text_column: str = setting("text", "column, or key of JSON lines, that holds the text", group="data")
    id_column: str | None = setting(
        None,
        "column that holds the id; unset: `id` or `document_id` if there is one; else, and if empty: file name and row",
        group="data",
    )
    keep_columns: tuple[str, ...] = setting(
        (), "columns of the input to copy into the results", kind="columns", group="data"
    )
    shard: str | None = setting(
        None, "i/n: only the i-th (from 0) of n stable shares of the documents", kind="shard", group="data"
    )

    task: str = setting(
        "summarize",
        "what to do with each document",
        choices=("summarize", "ask"),
        group="prompt",
        changes_output=True,
    )
    question: tuple[str, ...] = setting(
        (),
        "the question or instruction that follows the document; give it again for more questions",
        more="each has a row of its own, all are answered by one reading: [questions](questions.md)",
        kind="texts",
        group="prompt",
    )
    questions: str | Sequence[Any] | Mapping[str, Any] | None = setting(
        None,
        "YAML file of questions, each with a name and, if need be, max_new_tokens, a schema or settings of sampling",
        more="in a job file and from Python also the list itself: [questions](questions.md)",
        kind="questions",
        group="prompt",
    )
    questions_column: str | None = setting(
        None,
        "column of the input that holds a document's own questions: a list of texts, or JSON of one",
        more="or mappings with max_new_tokens and settings of sampling of their own: [questions](questions.md)",
        group="prompt",
    )
    system: str | None = setting(None, "system message, before the document", group="prompt")
    prompt_file: str | None = setting(
        None,
        "Jinja file that makes the user message from {{ document }}, {{ question }} and columns: {{ year }}",
        group="prompt",
    )
    chat_template_args: Mapping[str, Any] | None = setting(
        None,
        'arguments of the model\'s chat template, as JSON: {"enable_thinking": false}',
        kind="map",
        group="prompt",
        changes_output=True,
    )
    thinking: str = setting(
        "off",
        "whether a reasoning model thinks before it answers, where its chat template can switch that; auto: as the "
        "template has it; thinking goes to a column of its own",
        more="for gpt-oss, which always thinks, off asks for little of it",
        choices=THINKING,
        group="prompt",
        changes_output=True,
    )
    prompt_date: str | None = setting(
        None,
        "today for chat templates that print the date; unset: the day on which the output was begun",
        kind="date",
        group="prompt",
        changes_output=True,
        added_later=True,
    )
    too_long: str = setting(
        "error",
        "documents beyond the context: error row, truncate (cut out the middle), map-reduce (do parts, then merge)",
        choices=("error", "truncate", "map-reduce"),
        group="prompt",
        changes_output=True,
    )

    max_new_tokens: int = setting(256, "most tokens to generate", low=1, group="generation", changes_output=True)
    stop: tuple[str, ...] = setting(
        (),
        "a text that ends the output before it; give it again for more",
        more="in an answer only, not in the thinking before it; `finish_reason` is stop_string then. Not with a "
        "schema, whose answers end by themselves",
        kind="stops",
        group="generation",
        changes_output=True,
        added_later=True,
    )
    schema: str | None = setting(
        None,
        "JSON Schema that every answer follows: a file, or the schema itself; answers are a typed column then",
        more="from Python also a mapping or a pydantic model class",
        kind="schema",
        group="generation",
        changes_output=True,
        added_later=True,
    )

    evidence: str = setting(
        "on",
        "passages of the document that say what each sentence of the output says, in the column evidence",
        kind="switch",
        choices=("off", "on"),
        group="generation",
    )

    attention: str = setting(
        "stem", "attention of the prefill", choices=("stem", "dense"), group="attention", changes_output=True
    )
    preset: str = setting(
        DEFAULT_PRESET,
        "how key blocks are chosen: sampled is the default; paper and release are Stem as published, which loses facts "
        "that a document states once",
        choices=PRESETS,
        group="attention",
        changes_output=True,
    )
    budget: float | None = setting(
        None,
        "share of the causal blocks to keep, in place of the preset's schedule",
        above=0,
        high=1,
        group="attention",
        changes_output=True,
    )

    device: str = setting(
        "auto",
        "where models run; auto: on GPUs if there are any",
        choices=("auto", "cpu", "cuda"),
        group="engine",
    )

    workers: int | str = setting(
        "auto",
        "engines to run; auto: all that the GPUs hold, as the cluster changes; without GPUs, one for each core up to 4",
        kind="auto_int",
        low=1,
        group="run",
    )
    gpus_per_worker: int = setting(
        1, "GPUs of one node that a worker's model is spread over, by layers", low=1, high=64, group="run"
    )
    deadline: float = setting(3600.0, "seconds for one document in a worker; 0: none", low=0, group="run")
    max_attempts: int = setting(3, "times a document may end its worker before it is given up", low=1, group="run")
    flush_documents: int = setting(64, "most results in one part file", low=1, group="run")
    flush_seconds: float = setting(10.0, "most seconds that a result waits to be written", low=0, group="run")
    compact: bool = setting(True, "at the end, merge part files if there are more than 100", group="run")
    resume: bool = setting(
        True, "go on where an earlier run stopped; off: refuse an output that holds results", group="run"
    )
    retry_failed: bool = setting(False, "do again the documents whose rows are not ok", group="run")
    force: bool = setting(False, "go on although settings, model or input differ from the earlier run's", group="run")
    dry_run: bool = setting(False, "print the plan, with an estimate of the time, and stop", group="run")
    estimate_from: str | None = setting(
        None,
        "results of an earlier run, from whose rows a dry run estimates the time; unset: those in the output",
        group="run",
    )
    gpu_hour_price: float | None = setting(
        None, "what an hour of a GPU costs, in any currency: a dry run then says the cost", above=0, group="run"
    )
    on_finish: str | None = setting(
        None,
        "command to run at the end, or https:// address to post to; gets the summary as JSON",
        more="what it gets, and what it may do: [when a job ends](operations.md#when-a-job-ends)",
        group="run",
    )
    ray_address: str | None = setting(None, "cluster to use; unset: $RAY_ADDRESS, else this machine alone", group="run")

    def __post_init__(self) -> None:
        if isinstance(self.preset, str) and self.preset in REMOVED_PRESETS:
            raise JobError(f"{flag('preset')} {self.preset} is no more: {REMOVED_PRESETS[self.preset]}")
        check_flags(self)
        for name in ("input", "output", "model"):
            if not getattr(self, name):
                raise JobError(f"{flag(name)} is missing; it is needed: {meaning(name)}")
        asked = self.question or self.questions is not None or self.questions_column
        if self.task == "ask" and not asked and not self.prompt_file:
            raise JobError("--task ask needs --question: what to ask about each document")
        if self.schema is not None and self.thinking == "on":
            raise JobError(
                f"{flag('schema')} with {flag('thinking')} on: an answer follows the schema from its first token on, "
                "so that the model could not think before it; leave one of them out"
            )
        given = [name for name in STEM_OVERRIDES if getattr(self, name) is not None]
        if self.attention == "dense" and given:
            raise JobError(f"{flag(given[0])} has no meaning with --attention dense; leave one of them out")
        if self.device == "cpu" and self.gpus_per_worker > 1:
            asked = f"{flag('gpus_per_worker')} {self.gpus_per_worker}"
            raise JobError(f"{asked} has no meaning with --device cpu; leave one of them out")
        self._check_precision(self.stem())

    def _check_precision(self, stem: StemConfig | None) -> None:
        if self.precision == "fp8" and stem is not None:
            obstacle = stem.fp8_obstacle()
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
        except SettingError as error:
            raise flag_error(error) from None
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
        for name in (*STEM_OVERRIDES, "preset", "attention", "model", "adapter"):
            values.pop(name, None)
        values["question"] = None  # what is asked has fingerprints of its own; once it was one of these settings
        settings = stem.to_dict() if stem else None
        for held, record in ((values, JobConfig), (settings or {}, StemConfig)):
            for item in fields(record):
                if item.metadata["added_later"] and held.get(item.name, item.default) == item.default:
                    held.pop(item.name, None)
        return values | {"stem": settings}

    def fingerprint(self) -> str:
        """12 hex digits over the settings that can change an output (the model's files are fingerprinted apart)."""
        return hashlib.sha256(json.dumps(self.output_settings(), sort_keys=True).encode()).hexdigest()[:12]


def declared() -> list[Field[Any]]:
    """The settings of a job by group, in the order of GROUPS; in a group, those that are the job's own come first."""
    groups, own = list(GROUPS), JobConfig.__annotations__
    return sorted(fields(JobConfig), key=lambda item: (groups.index(item.metadata["group"]), item.name not in own))


# Those that are unset by default.
STEM_OVERRIDES = tuple(
    item.name for item in declared() if item.metadata["group"] == "attention" and item.default is None
)


def meaning(name: str) -> str:
    """The one-line description of a setting."""
    return {item.name: item.metadata["meaning"] for item in fields(JobConfig)}[name]


def instead(name: str, known: Collection[str], spelled: Callable[[str], str] = str) -> str:
    """ "; ..." with what to give in place of a name that is not known, or nothing.

    known: the names that are, as `spelled` writes a setting's.
    """
    plain = name.lstrip("-").replace("-", "_").removeprefix("no_")
    ours = OURS.get(plain, "")
    if ours and spelled(ours) in known:
        return f"; it is {spelled(ours)} here: {meaning(ours)}"
    return f"; {NOT_HERE[plain]}" if plain in NOT_HERE else nearest(name, known)


def from_mapping(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Keys of a job file or of keyword arguments as JobConfig's names; `-` and `_` are the same.

    Raises JobError for an unknown key, with the valid one that was meant.
    """
    known = {item.name for item in fields(JobConfig)}
    result = {}
    for key, value in values.items():
        name = key.replace("-", "_") if isinstance(key, str) else ""
        if name not in known:
            raise JobError(f"{origin}: {short(key)} is not a setting{instead(name, known) or '; see --help'}")
        result[name] = value
    return result


def read_job_file(path: str) -> dict[str, Any]:
    """Settings from a YAML file. Raises JobError if it cannot be read or has unknown keys."""
    values = read_yaml(path, "--config")
    if not isinstance(values, Mapping):
        raise JobError(f"--config {path}: expected `key: value` lines, got {type(values).__name__}")
    return from_mapping(values, f"--config {path}")
