"""The questions that a job's settings ask for: --question, --questions, --questions-column, or the task's own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pipeline.answers.schema import Schema, compile_schema
from pipeline.errors import DocumentError, JobError, nearest, one_line
from pipeline.prompts.questions import OWN, Questions, is_own
from pipeline.prompts.task import Task, asks, make_task, user_message
from pipeline.settings.config import JobConfig
from pipeline.settings.options import holdable, json_copy, read_yaml, short
from pipeline.settings.shared import Sampling
from stem_core.settings import LARGEST, SettingError

SAMPLING = tuple(item.name for item in fields(Sampling))
OWN_KEYS = ("question", "max_new_tokens", *SAMPLING)
KEYS = ("name", "question", "max_new_tokens", "schema", *SAMPLING)
MOST_OWN = 1000
# Columns of read_results(wide=True), beside which the questions stand.
TAKEN = ("document_id", "source", "status", "error")
# The name of a question that nobody has worded: that of the task.
PLAIN = {"summarize": "summary", "ask": "answer"}
SLUG_CHARACTERS = 40


def questions_of(config: JobConfig) -> Questions:
    """What a job asks. Raises JobError for what cannot be asked, and for files that cannot be read."""
    given = [({"question": text}, f"--question {short(text)}") for text in config.question]
    given += _listed(config.questions)
    plain = make_task(config.task, None, config.prompt_file, config.system)
    tasks = [_task(item, place, plain) for item, place in given]
    if not tasks and not config.questions_column:
        named = Task(plain.question, plain.template, plain.merge_question, plain.system, PLAIN[config.task])
        return Questions((named,))
    _refuse_doubles(tasks)
    own = None
    if config.questions_column:
        # The column is of the fingerprint by its name.
        own = Task("", plain.template, config.questions_column, plain.system, OWN, own=True)
    if (len(tasks) > 1 or own) and not asks(plain.template):
        raise JobError(
            f"--prompt-file {config.prompt_file}: it does not place {{{{ question }}}}, so that all questions would be "
            "the same; put it behind {{ document }}"
        )
    for task in tasks:
        user_message(task.template, task.question)
    return Questions(tuple(tasks), own, config.questions_column)


def answers_of(config: JobConfig, questions: Questions) -> dict[str, Schema]:
    """By question, the schema of its answers: its own, else that of --schema; those without one are left out."""
    found = {}
    for task in questions.every:
        if task.schema is not None:
            found[task.name] = compile_schema(task.schema, f"question {task.name}: schema")
            if config.thinking == "on":
                raise JobError(
                    f"question {task.name}: a schema with --thinking on: an answer follows the schema from its first "
                    "token on; leave one of them out"
                )
        elif config.schema is not None:
            found[task.name] = compile_schema(config.schema)
        if config.stop and task.name in found:
            raise JobError(
                f"question {task.name}: a schema with --stop {short(config.stop[0])}: its answers end by themselves, "
                "and a stop could only break them; leave one of them out"
            )
    return found


def first_task(config: JobConfig) -> Task:
    """The first question of a job, for commands that look at one. Raises JobError if documents bring theirs along."""
    tasks = questions_of(config).tasks
    if not tasks:
        raise JobError("--questions-column: this command asks one question of all documents; give a --question")
    return tasks[0]


def slug(text: str) -> str:
    """A name made of a question's words: the same whatever else is asked."""
    words = re.sub(r"[\W_]+", "-", text.lower()).strip("-")
    if words and len(words) <= SLUG_CHARACTERS:
        return words
    cut = words[:SLUG_CHARACTERS].rpartition("-")[0] or words[:SLUG_CHARACTERS] or "question"
    return f"{cut}-{hashlib.sha256(text.encode()).hexdigest()[:4]}"


def _listed(questions: Any) -> list[tuple[Any, str]]:
    """The entries of --questions with their places for messages."""
    if questions is None:
        return []
    where, entries = "questions", questions
    if isinstance(questions, str):
        if not Path(questions).exists():
            raise JobError(f"--questions {short(questions)}: no such file; for a question itself there is --question")
        where, entries = f"--questions {questions}", read_yaml(questions, "--questions")
    if isinstance(entries, Mapping):
        if "question" in entries and set(entries) <= set(KEYS):
            raise JobError(
                f"{where}: expected questions by their names, got the keys of one; put '- ' before the first"
            )
        entries = [
            {**(item if isinstance(item, Mapping) else {"question": item}), "name": name}
            for name, item in entries.items()
        ]
    if not isinstance(entries, list | tuple) or not entries:
        raise JobError(f"{where}: expected a list of questions ('- ' before each), got {short(entries)}")
    return [
        ({"question": item} if isinstance(item, str) else item, f"{where}: question {number}")
        for number, item in enumerate(entries, 1)
    ]


def own_tasks(questions: Questions, values: Mapping[str, Any]) -> list[Task]:
    """The questions that a document brought along. values: its columns. Raises DocumentError if they are none."""
    own, column = questions.own, questions.own_column
    if own is None or column is None:
        return []
    tasks = []
    for number, item in enumerate(_own_entries(values.get(column), column), 1):
        if isinstance(item, Mapping):  # in Parquet each has all keys of the column's type
            item = {key: value for key, value in item.items() if value is not None}
        place = f"its questions ({column}): question {number}"
        try:
            text, most, sampling = asked_as({"question": item} if isinstance(item, str) else item, place, OWN_KEYS)
        except JobError as error:
            raise DocumentError(str(error)) from None
        named = replace(own, name=f"{OWN}-{number}", question=text, merge_question=text)
        tasks.append(replace(named, max_new_tokens=most, sampling=sampling))
    return tasks


def _own_entries(value: Any, column: str) -> list[Any]:
    """What is in a document's column: a list, or JSON of one. Raises DocumentError for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DocumentError(
                f"its questions ({column}) are a text that is not JSON; expected a list of texts, or JSON of one"
            ) from None
    if value is None or value == []:
        raise DocumentError(f"it has no questions of its own ({column} is empty)")
    if not isinstance(value, list):
        raise DocumentError(f"its questions ({column}) are not a list of texts")
    if len(value) > MOST_OWN:
        raise DocumentError(f"it has {len(value):,} questions of its own ({column}); at most {MOST_OWN:,} are asked")
    return value


def asked_as(item: Any, place: str, keys: Collection[str]) -> tuple[str, int | None, dict[str, Any]]:
    """The text of a question's entry, its max_new_tokens and its settings of sampling, in place of the job's.

    keys: those that the entry may have. Raises JobError with its place.
    """
    if not isinstance(item, Mapping):
        raise JobError(f"{place}: expected a text or keys ({', '.join(keys)}), got {short(item)}")
    for key in item:
        if key not in keys:
            raise JobError(
                f"{place}: {short(key)} is not a key{nearest(str(key), keys) or '; they are ' + ', '.join(keys)}"
            )
    text = item.get("question")
    if not isinstance(text, str) or not text.strip() or not holdable(text):
        raise JobError(f"{place}: its question must be a text, got {short(text)}")
    most = item.get("max_new_tokens")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= LARGEST):
        raise JobError(f"{place}: max_new_tokens must be a whole number of at least 1, got {short(most)}")
    return text.strip(), most, _sampling(item, place)


def _task(item: Any, place: str, plain: Task) -> Task:
    """The task of an entry. Raises JobError with its place."""
    text, most, sampling = asked_as(item, place, KEYS)
    name = item.get("name", slug(text))
    _check_name(name, place)
    schema = item.get("schema")
    if schema is not None and not isinstance(schema, Mapping):
        raise JobError(f"{place}: its schema must be a JSON object, got {short(schema)}")
    try:
        schema = json_copy(schema)
    except ValueError as error:
        raise JobError(f"{place}: its schema is not JSON: {one_line(error)}") from None
    return Task(text, plain.template, text, plain.system, name, most, sampling, schema)


def _sampling(item: Mapping[str, Any], place: str) -> dict[str, Any]:
    given = {name: item[name] for name in SAMPLING if name in item}
    try:
        Sampling(**given)
    except SettingError as error:
        raise JobError(
            f"{place}: {error.name} must be {error.expected}, got {short(error.value)}{error.hint}"
        ) from None
    return given


def _check_name(name: Any, place: str) -> None:
    if not isinstance(name, str) or not 1 <= len(name) <= 100 or not name.isprintable() or name != name.strip():
        raise JobError(f"{place}: its name must be a text of 1 to 100 printable characters, got {short(name)}")
    if "#" in name or "/" in name:
        raise JobError(f"{place}: its name {short(name)} has a # or a /; leave them out")
    if name in TAKEN or is_own(name):
        raise JobError(f"{place}: the name {short(name)} means something else in the results; choose another")


def _refuse_doubles(tasks: list[Task]) -> None:
    seen: dict[str, Task] = {}
    for task in tasks:
        other = seen.setdefault(task.name, task)
        if other is task:
            continue
        if other.question == task.question:
            raise JobError(f"the question {short(task.question)} is asked twice, by the name {short(task.name)}")
        raise JobError(
            f"two questions have the name {short(task.name)}: {short(other.question)} and {short(task.question)}; name "
            "them apart in a --questions file"
        )
