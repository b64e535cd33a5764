"""What the pages tell a reader to run: commands in shell blocks and in the text, flags in the text, Python blocks."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The changelog speaks of what was, and is no advice.
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "examples/**/*.md", "models/*/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
PROGRAMS = (
    "make", "python", "ray", "prometheus", "kubectl", "ssh", "pip", ".ci/run", "git", "bash", "sh", "docker",
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """words: program and arguments; `python -m` and settings of the environment in front of it are left out.

    complete: whether it stands in a block, or has arguments; otherwise the text only names it.
    """

    page: str
    words: tuple[str, ...]
    complete: bool

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


@dataclass(frozen=True)
class Block:
    """A Python block of a page; number counts from 0."""

    page: str
    number: int
    code: str


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _fenced(text: str, *languages: str) -> list[str]:
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _spans(text: str) -> list[str]:
    """Inline code, on one line."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]


def _command(page: str, words: list[str], in_block: bool) -> Command | None:
    """None if these words are no command, an import say."""
    while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0]):
        words = words[1:]
    if not words:
        return None
    words[0] = words[0].removeprefix(".venv/bin/")
    if words[:2] == ["python", "-m"]:
        words, python = words[2:], True
    elif words[0] == "stemline":
        words, python = ["jobs." + words[1], *words[2:]] if len(words) > 1 and words[1][0] != "-" else words, True
    else:
        python = in_block
    if not in_block and re.fullmatch(r"(jobs|tools)(\.\w+)+", words[0]):
        # Without `python -m` the text speaks of a command, with some of its flags.
        return Command(page, tuple(words), complete=python and len(words) > 1 and words[-1] != "...")
    known = in_block or python or words[0] in PROGRAMS
    return Command(page, tuple(words), complete=in_block or len(words) > 1) if known else None


def commands() -> list[Command]:
    """Every command, once for each page."""
    found: list[Command | None] = []
    for page in PAGES:
        name, text = _name(page), page.read_text(encoding="utf-8")
        for block in _fenced(text, "sh", "bash", "shell", "console"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [_command(name, words, True) for line in lines if (words := shlex.split(line, comments=True))]
        for span in _spans(text):
            if "'" in span and span.count("'") % 2:
                continue  # prose in a code span
            found.append(_command(name, shlex.split(span), False))
    return list(dict.fromkeys(command for command in found if command))


def flags() -> list[Command]:
    """Every inline span that begins with a flag; of `--a x|y` one for each alternative."""
    found = []
    for page in PAGES:
        for span in _spans(page.read_text(encoding="utf-8")):
            if re.match(r"--[a-z]", span):
                words = shlex.split(span)
                choices = words[-1].split("|")
                found += [Command(_name(page), (*words[:-1], choice), False) for choice in choices]
    return list(dict.fromkeys(found))


def blocks() -> list[Block]:
    """Every Python block."""
    return [
        Block(_name(page), number, code)
        for page in PAGES
        for number, code in enumerate(_fenced(page.read_text(encoding="utf-8"), "python", "py"))
    ]


def languages() -> set[str]:
    """Languages of all fenced blocks."""
    return {
        language
        for page in PAGES
        for language in re.findall(r"^```(\w*)\n.*?^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    }
