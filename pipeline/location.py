"""Where files are: a path on this machine, or a URI. The one place where URIs are taken apart and printed.

In a URI %XX stands for a byte of a name; what else people type is taken as it stands, # and spaces too, so that
s3://bucket/run#1 is that and not s3://bucket/run. What is printed can be typed again, and passed to other programs.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

from pyarrow.fs import FileSystem, LocalFileSystem

from pipeline.errors import JobError, one_line, without_secrets
from pipeline.interruptible import interruptible

WILDCARD = re.compile(r"[*?\[]")
# pathlib makes s3:/bucket of s3://bucket; nobody has a folder of such a name.
_ONE_SLASH = re.compile(r"(?:s3|gs|gcs|hdfs|viewfs|abfss?|hf|file):/(?!/)")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_URI_SAFE = "/-._~!$&'()*+,;=:@"
# Of Google's client, whose own limit is 15 minutes; others give up after seconds.
RETRY_SECONDS = 30


class Parts(NamedTuple):
    """A URI as it was typed. user: with its @."""

    scheme: str
    user: str
    host: str
    path: str
    query: str


class Place(NamedTuple):
    """A location as its filesystem takes it.

    filesystem: URI that pyarrow opens the filesystem by; "" is this machine's. path: in that filesystem, a pattern if
    the location has wildcards. prefix: what `printed` needs to make such a path a name again.
    """

    filesystem: str
    path: str
    prefix: str


def is_uri(location: str) -> bool:
    """Whether a location is a URI, file:// or another."""
    return bool(_SCHEME.match(location) or _ONE_SLASH.match(location))


def is_remote(location: str) -> bool:
    """Whether a location names an object store or another URI rather than a path of this machine."""
    return is_uri(location) and _parts(location).scheme != "file"


def _parts(location: str) -> Parts:
    if _ONE_SLASH.match(location):
        location = location.replace(":/", "://", 1) if not location.startswith("file:") else "file://" + location[5:]
    match = _SCHEME.match(location)
    assert match is not None
    scheme, rest = match[1].lower(), location[match.end() :]
    query = ""
    if scheme != "file":
        rest, _, query = rest.partition("?")
    place, slash, path = rest.partition("/")
    if ":" in place and "@" not in place and "@" in path:  # a secret may hold a slash
        user, _, rest = rest.rpartition("@")
        place, slash, path = rest.partition("/")
        return Parts(scheme, user + "@", place, slash + path, query)
    user, at, host = place.rpartition("@")
    return Parts(scheme, user + at, host, slash + path, query)


def split_location(location: str) -> Place:
    """A location's filesystem, and its path or pattern inside it. Raises JobError if the URI cannot be understood."""
    if not is_uri(location):
        return Place("", str(Path(location).expanduser().absolute()), "")
    scheme, user, host, path, query = _parts(location)
    wild = WILDCARD.search(path)
    if scheme == "file":
        if host not in ("", "localhost"):
            raise JobError(f"{safe_name(location)}: a file on {host!r} cannot be read here; expected file:///path")
        return Place("", _pattern(path) if wild else unquote(path), "")
    base = path[: wild.start()].rpartition("/")[0] if wild else path
    if scheme in ("gs", "gcs") and "retry_limit_seconds" not in query:
        query = "&".join(filter(None, [query, f"retry_limit_seconds={RETRY_SECONDS}"]))
    uri = f"{scheme}://{user}{host}{quote(unquote(base), safe=_URI_SAFE)}" + (f"?{query}" if query else "")
    try:
        root = filesystem_path(uri)
    except Exception as error:  # filesystems of fsspec raise what they like
        raise JobError(f"{safe_name(location)}: cannot be opened: {one_line(error)}") from None
    prefix = f"{scheme}://" if host and root.startswith(host) else f"{scheme}://{host}/"
    return Place(uri, root + (_pattern(path[len(base) :]) if wild else ""), prefix)


def _pattern(path: str) -> str:
    """A path with wildcards, decoded; characters that were encoded stand for themselves."""
    return unquote(re.sub(r"%(2[aA]|3[fF]|5[bB])", lambda found: f"[{unquote(found[0])}]", path))


@lru_cache(maxsize=16)
def _opened(uri: str) -> tuple[FileSystem, str]:
    return interruptible(True, FileSystem.from_uri, uri)


def open_filesystem(uri: str) -> FileSystem:
    """The filesystem of a `Place`."""
    return _opened(uri)[0] if uri else LocalFileSystem()


def filesystem_path(uri: str) -> str:
    """The path that a URI names inside its filesystem."""
    return _opened(uri)[1]


def printed(prefix: str, path: str) -> str:
    """The name of a path: what can be typed for it again."""
    return prefix + "".join(map(_encoded, path.lstrip("/"))) if prefix else path


def _encoded(char: str) -> str:
    return char if char.isprintable() and char not in " %?#*[]" else quote(char.encode(errors="surrogateescape"))


def safe_name(location: str) -> str:
    """A location without credentials and query, for messages and rows."""
    if not is_uri(location):
        return location
    scheme, _, host, path, _ = _parts(location)
    kept = path if WILDCARD.search(path) else printed("/", unquote(path)) if path else ""
    return f"{scheme}://{host}{kept}"


def has_credentials(location: str) -> bool:
    """Whether a URI holds a user name or key."""
    return is_remote(location) and without_secrets(location) != location


def split_name(location: str) -> tuple[str, str]:
    """A file's folder, and its name there."""
    if not is_uri(location):
        return str(Path(location).parent), Path(location).name
    base, mark, query = location.partition("?")
    folder, _, name = base.rpartition("/")
    return folder + mark + query, unquote(name)
