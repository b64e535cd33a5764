"""Flags from JobConfig's fields; errors of the user as one line."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn

from pipeline.errors import JobError, one_line
from pipeline.imports import WrongPackageError, check_kernels, prefer_ours, without_pandas
from pipeline.interruptible import left_behind, stop_signals
from pipeline.settings.config import MOST_USED, JobConfig, declared, flag, instead, read_job_file
from stem_core.settings import kind_of


class _Help(argparse.HelpFormatter):
    """Adds a flag's default to its help, unless that speaks of it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said, value = action.help or "", action.default
        if "default" in said or value in (None, argparse.SUPPRESS, "", [], (), float("inf")) or value is False:
            return said
        shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        return f"{said} (default: {shown.replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are JobError: exit code 2 means something else here.

    A description "What it does: python -m jobs.name ARGUMENTS" gives the usage, too: a list of all flags would hide it.
    Of the script `stemline`, usage is `stemline name ARGUMENTS`.
    """

    def __init__(self, **settings: Any) -> None:
        what, colon, usage = (settings.get("description") or "").partition(": python -m ")
        if colon:
            settings |= {"description": what, "usage": f"python -m {usage} [flags]"}
        if by_script():
            settings |= {
                key: settings[key].replace("python -m jobs.", "stemline ")
                for key in ("usage", "prog")
                if settings.get(key)
            }
        super().__init__(**{"formatter_class": _Help} | settings)

    def error(self, message: str) -> NoReturn:
        """Raise JobError, with the flag that was meant where one is not known."""
        if message.startswith("unrecognized arguments:"):
            unknown = (message.split(":", 1)[1].split() or ["''"])[0]
            known = [option for action in self._actions for option in action.option_strings]
            name = unknown.split("=")[0]
            if name in {flag(item.name) for item in declared()} - set(known):
                message = f"{name} is a flag of jobs.summarize, and none of this command; see --help"
            elif name.startswith("-"):
                message = f"{unknown} is not a flag{instead(name, known, flag) or '; see --help'}"
            else:
                message = (
                    f"{unknown} is not a flag, and belongs to none; put a text with spaces between quotes; see --help"
                )
        raise JobError(message)


def add_job_flags(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """A flag for every setting of JobConfig but those in `without`, and --config for a YAML file of them."""
    parser.add_argument(
        "--config", metavar="JOB.yaml", help="settings from a YAML file, named like the flags; a flag wins"
    )
    groups: dict[str, Any] = {}
    for item in sorted(declared(), key=lambda item: _most_used(item.name)):
        if item.name not in without:
            title = "what most people need" if item.name in MOST_USED else item.metadata["group"]
            group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
            group.add_argument(flag(item.name), dest=item.name, default=argparse.SUPPRESS, **_argument(item))


def _most_used(name: str) -> int:
    """Where a flag stands in --help: those of MOST_USED in their order, all others behind them."""
    return MOST_USED.index(name) if name in MOST_USED else len(MOST_USED)


_PLACEHOLDERS = {
    "int": "N",
    "float": "X",
    "auto_int": "N|auto",
    "shard": "I/N",
    "date": "DATE",
    "map": "JSON",
    "encoding": "NAME",
    "schema": "FILE",
    "questions": "YAML",
}


def _argument(item: Field[Any]) -> dict[str, Any]:
    kind, choices = kind_of(item), item.metadata["choices"]
    told = ("on" if item.default else None) if kind == "bool" else item.default
    shown = "" if told in (None, "", ()) else f" (default: {told})"
    about: dict[str, Any] = {"help": (item.metadata["meaning"] + shown).replace("%", "%%")}
    if kind == "bool":
        return about | {"action": argparse.BooleanOptionalAction}
    if kind in ("list", "columns"):
        return about | {"nargs": "+", "metavar": "NAME"}
    if kind in ("texts", "stops"):
        return about | {"action": "append", "metavar": "TEXT"}
    placeholder = "{" + ",".join(map(str, choices)) + "}" if choices else _PLACEHOLDERS.get(kind, "TEXT")
    return about | {"type": _converter(kind), "metavar": placeholder}


def _converter(kind: str) -> Callable[[str], Any]:
    """Text of the command line to a value; what does not convert stays text and JobConfig says what it should be."""

    def convert(text: str) -> Any:
        try:
            if kind in ("int", "auto_int"):
                return int(text)
            if kind == "float":
                return float(text)
            if kind == "map" or (kind == "questions" and text.lstrip().startswith(("[", "{"))):
                return json.loads(text)
        except ValueError:
            pass
        return text

    return convert


def job_config(arguments: argparse.Namespace) -> JobConfig:
    """The job's settings: flags over the file's. Raises JobError."""
    values = read_job_file(arguments.config) if arguments.config else {}
    known = {item.name for item in fields(JobConfig)}
    values |= {name: value for name, value in vars(arguments).items() if name in known}
    return JobConfig(**values)


def check_output(folder: Path) -> None:
    """Raise JobError, before the work is done, if no files can be written to the folder of --output."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise JobError(f"--output {folder}: {there} is a file; give a folder")
    try:
        tempfile.TemporaryDirectory(dir=there).cleanup()  # permissions alone do not tell: /proc is said to be writable
    except OSError as error:
        raise JobError(
            f"--output {folder}: {there} cannot be written to ({one_line(error)}); give another folder"
        ) from None


def by_script() -> bool:
    """Whether the console script `stemline` runs."""
    return Path(sys.argv[0]).stem == "stemline"


def this_python() -> str:
    """The interpreter as one types it: `python` if that finds it, else its path, from the working folder if below."""
    return _as_typed("python", Path(sys.executable))


def command(name: str) -> str:
    """How one types another command of ours: with the script `stemline` if that runs, else with this Python."""
    if by_script():
        return f"{_as_typed('stemline', Path(sys.argv[0]).absolute())} {name}"
    return f"{this_python()} -m jobs.{name}"


def _as_typed(name: str, program: Path) -> str:
    if shutil.which(name) == str(program):
        return name
    return shlex.quote(str(program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program))


def run_main(main: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> NoReturn:
    """Call `main` with the command line; exit with its code, 1 after a user error (one line), 130 if interrupted."""
    sys.stdout, sys.stderr = (stream or io.StringIO() for stream in (sys.stdout, sys.stderr))  # >&- leaves None
    try:
        prefer_ours()
        check_kernels()
        without_pandas()
        code = main(sys.argv[1:] if arguments is None else arguments)
    except (JobError, WrongPackageError) as error:
        code = 1
        _tell(f"error: {error}")
    except OSError as error:
        if not _of_output(error):
            raise
        code = _lost(error)
    except (KeyboardInterrupt, SystemExit) as ended:
        # Ray's own way to take a SIGTERM, while it starts and when it is gone again, is to exit with its number.
        if isinstance(ended, SystemExit) and ended.code != signal.SIGTERM:
            raise
        code = 130
        for number in stop_signals():  # what is left is to end: one more Ctrl-C would break into Ray's own shutdown
            signal.signal(number, signal.SIG_IGN)
        _tell("stopped")
    code = _flushed(code)
    if left_behind():
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """What a with-block prints may go into a pipe that nobody reads, onto a full disk or a closed terminal."""
    try:
        yield
    except OSError as error:
        if not _of_output(error):
            raise
        _to_nowhere()


def _of_output(error: OSError) -> bool:
    """Whether it is standard output that cannot be written to."""
    return error.filename is None and error.errno in (None, errno.EPIPE, errno.ENOSPC, errno.EIO)


def _flushed(code: int) -> int:
    """`code` once what was printed is out; if it cannot go out, that of `_lost` in place of 0."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return code or _lost(error)
    return code


def _lost(error: OSError) -> int:
    """The exit code where standard output cannot be written to: 1, or 0 if its reader had enough."""
    _to_nowhere()
    if isinstance(error, BrokenPipeError):
        return 0
    _tell(f"error: standard output cannot be written to: {error.strerror}")
    return 1


def _to_nowhere() -> None:
    """Standard output from now on, so that Python's own last flush does not fail."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
