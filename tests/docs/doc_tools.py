"""Parse the repository's Markdown files: code blocks, commands, links and headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
README = REPO / "README.md"
GUIDES = sorted(page for page in (REPO / "docs").glob("*.md") if page.name != "settings.md")
PAGES = [README, *GUIDES, REPO / "CONTRIBUTING.md", REPO / "CHANGELOG.md", REPO / "slurm/README.md", REPO / "docker/README.md"]

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_ENVIRONMENT = re.compile(r"^(?:[A-Z_]+=\S* +)+")
_COMMAND = re.compile(r"^(?:\$ )?(?:python -m launcher|launcher)(?= |$)")
_LINK = re.compile(r"\]\(([^)\s]+)\)|\b(?:src|href)=\"([^\"]+)\"")


@dataclass(frozen=True)
class Block:
    """A fenced code block: its language, its text, and the text between it and the block before."""

    language: str
    body: str
    before: str


@dataclass(frozen=True)
class Command:
    """A command line of the launcher in a page, without `python -m launcher`."""

    page: str
    tokens: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.tokens) or '(no arguments)'}"


def name_of(page: Path) -> str:
    return page.relative_to(REPO).as_posix()


def blocks(page: Path) -> list[Block]:
    """Return the fenced code blocks of a page, in order."""
    text, end, result = page.read_text(encoding="utf-8"), 0, []
    for match in _FENCE.finditer(text):
        result.append(Block(match["language"], match["body"], text[end : match.start()]))
        end = match.end()
    return result


def prose(page: Path) -> str:
    """Return the text of a page without its fenced code blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[Command]:
    """Return the launcher's command lines in shell blocks, in indented code and in code spans."""
    lines = [line for block in blocks(page) if block.language == "sh" for line in _joined(block.body)]
    text = prose(page)
    lines += _joined("\n".join(line.strip() for line in text.splitlines() if line.startswith(" " * 8)))
    running = "\n".join(line for line in text.splitlines() if not line.startswith(" " * 8))
    lines += [" ".join(span.split()) for span in re.findall(r"`(python -m launcher[^`]*)`", running)]
    found = dict.fromkeys(tokens for line in lines if (tokens := command_tokens(line)) is not None)
    return [Command(name_of(page), tokens) for tokens in found]


def command_tokens(line: str) -> tuple[str, ...] | None:
    """Return the arguments of a launcher command, or None for any other line."""
    line = _ENVIRONMENT.sub("", line.strip())
    match = _COMMAND.match(line)
    return tuple(shlex.split(line[match.end() :], comments=True)) if match else None


def _joined(text: str) -> list[str]:
    """Return the lines of a shell text, with backslash continuations joined."""
    return re.sub(r"\\\n\s*", "", text).splitlines()


def links(page: Path) -> Iterator[str]:
    """Yield the targets of all links and pictures in a page, outside code."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    for match in _LINK.finditer(text):
        yield match[1] or match[2]


def anchors(page: Path) -> set[str]:
    """Return the heading anchors of a page, as both GitHub and the documentation site generate them."""
    headings = re.findall(r"^#{1,6} +(.+?)\s*#*$", prose(page), re.MULTILINE)
    return {_github_anchor(heading) for heading in headings} & {_site_anchor(heading) for heading in headings}


def _github_anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _site_anchor(heading: str) -> str:
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())
