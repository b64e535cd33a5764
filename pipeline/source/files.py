"""Which files an input names, on this machine or in an object store, through pyarrow's filesystems."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from pipeline.errors import JobError, nearest_beside, one_line
from pipeline.interruptible import interruptible
from pipeline.location import WILDCARD, is_remote, open_filesystem, printed, safe_name, split_location
from pipeline.results.columns import valid_text
from pipeline.source.formats import SUFFIXES, format_of
from pipeline.source.protocol import Format, SourceFile

# What Spark and Delta keep beside the files of a table: unfinished writes, logs, checkpoints.
BESIDE = ("_temporary", "_delta_log", "_spark_metadata")
# Word puts a file of such a name beside each document that is open, for as long as it is: ~$report.docx.
WORD_LOCK = "~$"


class Found(NamedTuple):
    """A file of a folder: path, bytes and time of change."""

    path: str
    size: int
    modified_ns: int


def find_files(locations: tuple[str, ...]) -> tuple[list[SourceFile], list[str]]:
    """All files that the inputs name, each once, and the names of files that were passed over for their suffix.

    Raises JobError for an input that does not exist, cannot be listed or holds no documents.
    """
    found: dict[str, SourceFile] = {}
    ignored: list[str] = []
    for location in locations:
        if not location.strip():
            raise JobError("--input: a name is empty, as of a variable that is not set; give files, folders or globs")
        try:
            files, passed = interruptible(is_remote(location), _find, location)
        except JobError:
            raise
        except Exception as error:  # filesystems of fsspec raise what they like
            raise JobError(f"--input {safe_name(location)}: cannot be listed: {one_line(error)}") from None
        if not files:
            what = f"only files of other kinds ({', '.join(sorted(passed)[:3])})" if passed else "no files"
            raise JobError(f"--input {safe_name(location)}: holds {what}; expected {', '.join(SUFFIXES)}")
        for file in files:
            found.setdefault(file.name, file)
        ignored += passed
    return list(found.values()), ignored


def directly_in(file: SourceFile, folder: str) -> bool:
    """Whether a file stands in a folder, itself and not below it, by whatever way each is reached."""
    if is_remote(folder) or file.filesystem:
        return file.name.rpartition("/")[0] == safe_name(folder).rstrip("/")
    return os.path.realpath(Path(file.path).parent) == os.path.realpath(split_location(folder).path)


def _find(location: str) -> tuple[list[SourceFile], list[str]]:
    uri, path, prefix = split_location(location)
    filesystem = open_filesystem(uri)
    info = filesystem.get_file_info(path)
    if info.type == FileType.File:
        form = format_of(path)
        if form is None:
            raise JobError(f"--input {safe_name(location)}: its kind is not known; expected {', '.join(SUFFIXES)}")
        item = Found(info.path, info.size, info.mtime_ns or 0)
        return [_source_file(uri, item, info.base_name, prefix, form)], []
    if info.type == FileType.Directory:
        base, wanted = path.rstrip("/"), None
    elif WILDCARD.search(path):
        base = path[: WILDCARD.search(path).start()].rpartition("/")[0]  # type: ignore[union-attr]
        wanted = re.compile(glob_regex(path))
        if filesystem.get_file_info(base).type != FileType.Directory:
            raise JobError(f"--input {safe_name(location)}: the folder {base} does not exist")
    else:
        where = "" if uri else _where_it_ends(Path(path))
        raise JobError(f"--input {safe_name(location)}: does not exist{where or '; give a file, a folder or a glob'}")
    files, passed = [], []
    for item in _walk(filesystem, base):
        if wanted and not wanted.fullmatch(item.path):
            continue
        form = format_of(item.path)
        if form is None:
            passed.append(item.path.rpartition("/")[2])
        else:
            files.append(_source_file(uri, item, item.path[len(base) :].lstrip("/"), prefix, form))
    if wanted and not files and not passed:
        raise JobError(f"--input {safe_name(location)}: no file matches")
    return sorted(files, key=lambda file: file.path), passed


def _where_it_ends(path: Path) -> str:
    """Of a local path that does not exist: the last folder that does, and the name in it that is most like the next."""
    while not path.parent.is_dir():
        path = path.parent
    return f": {path.parent} holds no {path.name!r}{nearest_beside(path) or '; give a file, a folder or a glob'}"


def _walk(filesystem: FileSystem, base: str) -> Iterator[Found]:
    if isinstance(filesystem, LocalFileSystem):
        yield from _walk_folder(base)
        return
    for info in filesystem.get_file_info(FileSelector(base, recursive=True)):
        if info.type == FileType.File and not any(map(_hidden, info.path[len(base) :].split("/"))):
            yield Found(info.path, info.size, info.mtime_ns or 0)


def _hidden(name: str) -> bool:
    return name.startswith((".", WORD_LOCK)) or name in BESIDE


def _walk_folder(base: str) -> Iterator[Found]:
    """Files below a local folder. Links are followed, but not back into a folder that they are in."""
    todo: list[tuple[str, tuple[tuple[int, int], ...]]] = [(base, ())]
    while todo:
        folder, above = todo.pop()
        about = Path(folder).stat()
        here = about.st_dev, about.st_ino
        if here in above:
            continue
        with os.scandir(folder) as entries:
            for entry in entries:
                if _hidden(entry.name):
                    continue
                path = f"{folder}/{entry.name}"
                try:
                    about = entry.stat()
                except OSError:  # a link to nothing: the row of what it should be says so
                    yield Found(valid_text(path), 0, 0)
                    continue
                if stat.S_ISDIR(about.st_mode):
                    todo.append((path, (*above, here)))
                elif stat.S_ISREG(about.st_mode):
                    # A name that is not UTF-8 is one that nothing here can open: its row says so.
                    yield Found(valid_text(path), about.st_size, about.st_mtime_ns)


def glob_regex(pattern: str) -> str:
    """A glob as a regular expression over whole paths: * and ? stay inside a folder, **/ crosses folders."""
    out, i = "", 0
    while i < len(pattern):
        if pattern.startswith("**/", i):
            out, i = out + "(?:[^/]+/)*", i + 3
        elif pattern.startswith("**", i):
            out, i = out + ".*", i + 2
        elif pattern[i] == "*":
            out, i = out + "[^/]*", i + 1
        elif pattern[i] == "?":
            out, i = out + "[^/]", i + 1
        elif pattern[i] == "[" and (end := pattern.find("]", i + 2)) > 0:
            body = pattern[i + 1 : end].replace("\\", "\\\\")
            out, i = out + "[" + ("^" + body[1:] if body[0] in "!^" else body) + "]", end + 1
        else:
            out, i = out + re.escape(pattern[i]), i + 1
    return out


def _source_file(uri: str, found: Found, label: str, prefix: str, form: Format) -> SourceFile:
    return SourceFile(uri, found.path, label, printed(prefix, found.path), form, found.size, found.modified_ns)


_WHOLE = 8 << 20
_SAMPLE = 64 << 10


def content_stamp(filesystem: FileSystem, path: str, size: int) -> str:
    """A hash of a file: of all of it up to 8 MiB, beyond of its size and 64 evenly spread pieces of 64 KiB."""
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with filesystem.open_input_file(path) as file:
        if size <= _WHOLE:
            digest.update(file.read())
        else:
            for i in range(64):
                file.seek((size - _SAMPLE) * i // 63)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
