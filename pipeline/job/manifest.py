"""manifest.json: what an output folder was made from, so that a later run can tell if it continues the same job."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields
from datetime import date
from pathlib import Path
from typing import Any

from pyarrow.fs import LocalFileSystem

from pipeline.adapters import CONFIG as ADAPTER_CONFIG
from pipeline.adapters import WEIGHTS as ADAPTER_WEIGHTS
from pipeline.adapters import adapter_problem, merge_problem
from pipeline.errors import JobError, one_line
from pipeline.location import open_filesystem, safe_name
from pipeline.model_files import config_problem, gguf_problem, is_gguf, weights_problem
from pipeline.prompts.questions import Questions
from pipeline.results.columns import utc_now
from pipeline.results.rows import SUMMARY
from pipeline.results.seal import json_seal
from pipeline.results.store import Store
from pipeline.settings.config import JobConfig
from pipeline.settings.options import short
from pipeline.source import SourceFile
from pipeline.source.files import content_stamp
from pipeline.versions import job_versions

NAME = "manifest.json"
FORMAT = 2
# Local inputs up to so many bytes are fingerprinted by content, larger and remote ones by size and time of change.
CONTENT_BYTES = 1 << 30
# What is asked is compared question by question. A changed file is no other job: the documents that changed in it are
# done again.
DECIDING = ("config", "model", "reading")
TYPES: dict[str, Any] = {
    "fingerprints": dict, "config": dict, "versions": dict, "state": str, "written_at": str, "documents": int,
    "seconds": (int, float), "questions": dict, "asked": list, "prompt": dict,
}  # fmt: skip
READING = ("text_column", "id_column", "keep_columns", "shard")
MODEL_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt", ".bin", ".py")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def model_fingerprint(model: str, revision: str | None, weights: bool = True, trust_remote_code: bool = False) -> str:
    """Over a folder's configuration, weights and tokenizer, or a hub model's commit.

    Large weight files count by size and 64 spread samples. Raises JobError if the model is not there or,
    with `weights`, has none that are read.
    """
    folder = Path(model).expanduser()
    if is_gguf(model) and (folder.is_file() or not folder.exists()):
        problem = gguf_problem(model)
        if problem:
            raise JobError(f"--model {model}: {problem}")
        return _digest([(folder.name, content_stamp(LocalFileSystem(), str(folder), folder.stat().st_size))])
    if folder.is_dir():
        try:
            _check_folder(folder, model, weights)
            files = sorted(p for p in folder.iterdir() if p.is_file() and p.name.endswith(MODEL_SUFFIXES))
            local = LocalFileSystem()
            return _digest([(p.name, content_stamp(local, str(p), p.stat().st_size)) for p in files])
        except OSError as error:
            raise JobError(f"--model {model}: cannot be read: {one_line(error)}") from None
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise JobError(f"--model {model}: no such folder; give a transformers model folder or a hub id like org/name")
    return _digest([model, hub_commit(model, revision, trust_remote_code)])


def _check_folder(folder: Path, model: str, weights: bool) -> None:
    problem = adapter_problem(folder)
    if problem:
        raise JobError(f"--model {model}: {problem}")
    if not (folder / "config.json").is_file():
        raise JobError(f"--model {model}: no config.json there; expected a transformers model folder or a hub id")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise JobError(f"--model {model}: its config.json is not valid JSON: {one_line(error, 200)}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise JobError(f"--model {model}: its config.json names no model_type; expected a transformers model")
    problem = weights_problem(folder) if weights else ""
    if problem:
        raise JobError(f"--model {model}: {problem}")


def adapter_fingerprint(adapter: str) -> str:
    """Over an adapter's config and weights. Raises JobError for one that cannot be merged."""
    problem = merge_problem(adapter)
    if problem:
        raise JobError(f"--adapter {adapter}: {problem}")
    folder, local = Path(adapter).expanduser(), LocalFileSystem()
    try:
        files = [folder / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
        return _digest([(p.name, content_stamp(local, str(p), p.stat().st_size)) for p in files])
    except OSError as error:
        raise JobError(f"--adapter {adapter}: cannot be read: {one_line(error)}") from None


def hub_commit(model: str, revision: str | None, trust_remote_code: bool = False) -> str:
    """The commit of a hub model. Raises JobError if it cannot be found."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # the hub client raises many kinds
        known = config_problem(error, model, revision)
        why = known or f"no such folder, and the hub did not give it: {one_line(error, 200)}"
        raise JobError(f"--model {model}: {why}") from None
    return str(getattr(config, "_commit_hash", None) or revision or "")


def input_fingerprint(files: list[SourceFile]) -> str:
    """Over the input's files; only recorded, since each row knows what it was made from (Row.input_stamp)."""
    local = all(not file.filesystem for file in files) and sum(file.size for file in files) <= CONTENT_BYTES
    stamps = []
    for file in files:
        stamp: str | int = file.modified_ns
        if local:
            try:
                stamp = content_stamp(open_filesystem(file.filesystem), file.path, file.size)
            except OSError:
                stamp = "unreadable"
        stamps.append((file.label, file.kind, file.size, stamp))
    return _digest(sorted(stamps))


def fingerprints(config: JobConfig, files: list[SourceFile]) -> dict[str, str]:
    """The fingerprints of a job. Those in DECIDING must be the same for a run to go on where another stopped."""
    model = model_fingerprint(config.model, config.revision, config.load_format != "dummy", config.trust_remote_code)
    return {
        "config": config.fingerprint(),
        "model": _digest([model, adapter_fingerprint(config.adapter)]) if config.adapter else model,
        "reading": _digest([config.text_column, config.id_column, config.keep_columns, config.shard_pair()]),
        "input": input_fingerprint(files),
    }


def config_values(config: JobConfig) -> dict[str, Any]:
    """All settings as plain values, without credentials that may stand in locations."""
    values = asdict(config)
    del values["on_finish"]  # the address of a webhook is a secret, and a command may hold one
    values["input"] = [safe_name(item) for item in config.input]
    for name in ("output", "model", "adapter", "ray_address", "estimate_from"):
        values[name] = values[name] and safe_name(values[name])
    values["keep_columns"], values["question"] = list(config.keep_columns), list(config.question)
    return values


def load(store: Store) -> dict[str, Any] | None:
    """The manifest, or None if there is none. Raises JobError if it is damaged."""
    data = store.read(NAME)
    if data is None:
        return None
    try:
        manifest = json.loads(data)
        _check_values(manifest)
        prompt_date(manifest)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise JobError(
            f"--output {store.name}: {NAME} is damaged ({one_line(error, 100)}); --force writes a new one"
        ) from None
    return manifest


def prompt_date(manifest: dict[str, Any]) -> date:
    """The date that the earlier run's prompts tell; of runs older than this entry, the day of their last writing."""
    return date.fromisoformat(manifest.get("prompt_date") or manifest["written_at"][:10])


def _check_values(manifest: Any) -> None:
    """Raise ValueError for what no job wrote. Earlier versions wrote no seal."""
    if not isinstance(manifest, dict):
        raise ValueError(f"expected a JSON object, got {type(manifest).__name__}")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"its format is {short(manifest.get('format'))}, expected {FORMAT}")
    for name, kind in TYPES.items():
        if name in manifest and not isinstance(manifest[name], kind):
            raise ValueError(f"its {name} is {short(manifest[name])}")
    if not isinstance(manifest.get("fingerprints"), dict):
        raise ValueError("it has no fingerprints")
    if "seal" in manifest and manifest["seal"] != json_seal(_unsealed(manifest)):
        raise ValueError("its content is not what its seal says")


def _unsealed(manifest: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in manifest.items() if name != "seal"}


def questions_asked(questions: Questions, old: dict[str, Any] | None) -> dict[str, dict[str, str]]:
    """By name, fingerprint and text of each question that a folder has answers to; those not asked any more, too."""
    texts = dict(questions.asked)
    now = {name: {"fingerprint": mark, "question": texts[name] or ""} for name, mark in questions.prints().items()}
    return {**_asked_before(old), **now} if old else now


def _asked_before(old: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The questions of an earlier run. Before there were several, a job had one, which rows do not name."""
    if "questions" in old:
        return old["questions"]
    known = old["fingerprints"].get("prompt")
    return {SUMMARY: {"fingerprint": known, "question": ""}} if known else {}


def _reworded(old: dict[str, Any], questions: Questions) -> list[str]:
    """Names of questions that were asked before in other words, or in another way."""
    before = _asked_before(old)
    return [name for name, mark in questions.prints().items() if before.get(name, {}).get("fingerprint", mark) != mark]


def check(old: dict[str, Any], new: dict[str, str], config: JobConfig, questions: Questions, store: Store) -> list[str]:
    """What differs from the earlier run, in words; empty if nothing does. Raises JobError if so and not --force."""
    changed = [name for name in DECIDING if old["fingerprints"].get(name) != new[name]]
    reworded = _reworded(old, questions)
    if not changed and not reworded:
        return []
    words = [f"prompt (question {short(name)}; another name makes it another question)" for name in reworded[:1]]
    for name in changed:
        details = _changed_settings(old, config, name) if name in ("config", "reading") else []
        words.append(f"{name} ({', '.join(details)})" if details else name)
    text = ", ".join(words)
    if config.force:
        return [f"going on with --force although these differ from the earlier run: {text}"]
    raise JobError(
        f"--output {store.name}: it was made with another {text}; "
        "choose another output, or --force to keep its rows and go on"
    )


def _changed_settings(old: dict[str, Any], config: JobConfig, kind: str) -> list[str]:
    before = old.get("config", {})
    now = json.loads(json.dumps(config_values(config), default=str))  # as save() wrote the others: tuples are lists
    names = [item.name for item in fields(JobConfig) if item.metadata["changes_output"]]
    pairs = {name: (before.get(name), now[name]) for name in (names if kind == "config" else READING)}
    return [f"{name}: {short(was)} -> {short(is_)}" for name, (was, is_) in pairs.items() if was != is_]


def save(store: Store, config: JobConfig, prints: dict[str, str], **more: Any) -> None:
    """Write the manifest in one step."""
    manifest = {
        "format": FORMAT,
        "written_at": utc_now().isoformat(),
        "fingerprints": prints,
        "config": config_values(config),
        "versions": job_versions(),
        **more,
    }
    manifest = json.loads(json.dumps(manifest, default=str))
    store.write(NAME, json.dumps(manifest | {"seal": json_seal(manifest)}, indent=2).encode())
