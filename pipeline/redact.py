"""Secrets out of text that people will see: messages, rows, the manifest.

Masked is what is a secret by its shape (a hub token), by its place (the user of a URI, a header of authorisation, a
signature in a query) or by its name (password=...); text about tokens and keys ("max_tokens=256") stays as it is.
"""

from __future__ import annotations

import os
import re

MASK = "***"

# user:password@ of a URI. A password may hold slashes, but the "8265/" of "http://host:8265/a@b" is a port.
_USER_INFO = re.compile(r"(?<=://)(?:[^/@\s'\"]{1,500}|[^/@\s'\":]{1,200}:(?!\d{1,5}/)[^@\s'\"]{1,500})(?=@)")
# Tokens of hubs, forges, chats and model services; JSON web tokens; AWS key ids, with a secret key if one follows; PEM.
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|xox[abeoprs]-[\w-]{10,}"
    r"|sk-(?=[A-Za-z_-]*\d)[\w-]{20,}|AIza[\w-]{35}|ya29\.[\w-]{20,}|eyJ[\w-]{8,400}\.eyJ[\w-]{8,4000}\.[\w-]*"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}\b(?:[:/,;\s]{1,3}[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+]))?)"
    r"|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,30}PRIVATE KEY-----|$)",
    re.DOTALL,
)
_HEADERS = re.compile(
    r"(?i)\b((?:(?:proxy-)?authorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic|token|digest|negotiate)\s+"
    r"|(?:x-api-key|x-auth-token|private-token|x-amz-security-token|x-goog-api-key)['\"]?\s*[:=]\s*['\"]?))[^\s,'\"]+"
)
_BEARER = re.compile(r"(?i)\b(bearer\s+)(?=[A-Za-z._~+/=-]*\d)[\w.~+/=-]{16,}")
# What stands before a value: name=, name%3D, "name": ", name: ; with the mark in front of a parameter of a URI.
_NAMES = re.compile(
    r"(?P<mark>[?&]?)(?P<name>\b[A-Za-z][\w.-]{0,63})(?P<between>=|%3D|['\"]?\s?:(?!//)\s?)(?P<quote>['\"]?)"
)
_QUOTED, _BARE = re.compile(r"[^'\"]+"), re.compile(r"[^&,;\s'\"]+")
# So much of a value is looked at.
_ENOUGH = 2000
# Names whose values are secrets, whatever these look like.
_SECRET_NAME = re.compile(
    r"(?:secret|password|passwd|passphrase|api_?key|(?:secret|access|account|private|auth|encryption)_?key"
    r"|(?:^|_)(?:access|auth|bearer|refresh|session|security|id|api|hub|hf|sas|private|secret)_?token)(?:_?id)?$"
)
# Names whose values are secrets if they look like one, and in the query of a URI in any case.
_PERHAPS_SECRET_NAME = re.compile(r"(?:^|_)(?:token|signature|credentials?)$")
_QUERY_NAME = re.compile(r"(?:^|_)(?:sig|pwd)$|^key$")
_TOKENIZER_NAME = re.compile(r"(?:bos|eos|pad|unk|sep|cls|mask|image|audio|video|stop|special|next|first|last)_token$")
_LOOKS_SECRET = re.compile(r"(?![/~.])(?=[^\d]*\d)(?=[^A-Za-z]*[A-Za-z])[\w+/.~=%-]{16,}")
_NOTHING = ("none", "null", "true", "false", MASK)


def without_secrets(text: str) -> str:
    """`text` with secrets as ***; the values of this process's environment variables with a secret's name are some."""
    for value in _environment_secrets():
        text = text.replace(value, MASK)
    text = _USER_INFO.sub(MASK, text)
    text = _SHAPES.sub(MASK, text)
    text = _HEADERS.sub(rf"\1{MASK}", text)
    text = _BEARER.sub(rf"\1{MASK}", text)
    return _mask_values(text)


def _mask_values(text: str) -> str:
    pieces, at = [], 0
    for found in _NAMES.finditer(text):
        end, pattern = found.end(), _QUOTED if found["quote"] else _BARE
        if found.start() < at or not _names_secret(found):
            continue
        value = pattern.match(text, end, end + _ENOUGH)
        if value and _is_secret(found, value[0]):
            pieces += [text[at:end], MASK]
            at = pattern.match(text, end).end()  # type: ignore[union-attr]
    return "".join([*pieces, text[at:]])


def _names_secret(found: re.Match[str]) -> bool:
    """Whether a value of this name can be a secret."""
    name = _words(found["name"])
    if _SECRET_NAME.search(name) or (_PERHAPS_SECRET_NAME.search(name) and not _TOKENIZER_NAME.search(name)):
        return True
    return bool(found["mark"] and _QUERY_NAME.search(name))


def _is_secret(found: re.Match[str], value: str) -> bool:
    """Whether a value behind a name that can be a secret's is one."""
    if value.lower() in _NOTHING:
        return False
    if _LOOKS_SECRET.fullmatch(value):
        return True
    if ":" in found["between"] and not found["quote"]:  # "password: too short"
        return False
    name, in_query = _words(found["name"]), bool(found["mark"])
    return bool(_SECRET_NAME.search(name)) or (in_query and name != "key")


def _words(name: str) -> str:
    """AccountKey, account-key and ACCOUNT_KEY as account_key."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").replace(".", "_").lower()


def _environment_secrets() -> list[str]:
    """Longest first, since one may be a part of another."""
    found = [
        value
        for name, value in os.environ.items()
        if len(value) >= 8 and value.lower() not in _NOTHING and _environment_secret(name.lower(), value)
    ]
    return sorted(found, key=len, reverse=True)


def _environment_secret(name: str, value: str) -> bool:
    if name.endswith(("credential", "credentials")):  # often the place of a file
        return not value.startswith(("/", "~", "."))
    return bool(_SECRET_NAME.search(name) or _PERHAPS_SECRET_NAME.search(name))
