"""The launcher accepts every launcher command in README.md and the guides; nothing is started.

The messages quoted in docs/troubleshooting.md exist in the source.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
from doc_tools import GUIDES, PAGES, README, REPO, Command, blocks, command_tokens, commands, name_of

from launcher.cli import init
from launcher.cli.main import main
from launcher.cli.verbs import TABLE, VERBS, find_verb
from launcher.config.compose import run_hydra
from launcher.security.redaction import looks_secret

PAGE = REPO / "docs/troubleshooting.md"
# Placeholder for a value in a message of the source.
_VALUE = "\0"
# Each command once, even if several pages show it.
COMMANDS = list({command.tokens: command for page in PAGES for command in commands(page)}.values())


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the presets that the guides tell readers to save."""
    for page in (README, *GUIDES):
        for block in blocks(page):
            if block.language == "yaml" and (
                names := re.findall(r"`(my_conf/[\w/]+\.yaml)`|Save this as `(\w+\.yaml)`", block.before)
            ):
                file = tmp_path / "".join(names[-1])
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block.body, encoding="utf-8")
    # The file that `init --data rows.jsonl` writes.
    (tmp_path / "rows.yaml").write_text("model: tiny\ndata: {path: rows.jsonl}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.rest
@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_the_launcher_accepts_the_command(
    command: Command, presets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = list(command.tokens)
    verb = tokens.pop(0) if tokens and re.fullmatch(r"[a-z]+", tokens[0]) else "train"
    assert not any(looks_secret("", token) for token in tokens)
    if "--help" in tokens or verb == "help":
        assert main([verb, *tokens] if verb in VERBS else tokens) == 0
        return
    assert verb in VERBS
    row = find_verb(verb, tokens)
    arguments = row.parse(tokens)
    if verb == "init":
        init._compose(arguments.model, arguments.data, arguments.overrides)
        return
    if row.takes_settings:
        if verb != "config" or arguments.overrides[:1] != ["RUN"]:
            _compose(arguments.overrides)
        return
    if overrides := vars(arguments).get("overrides"):
        _compose(["model=tiny", "cluster.price_per_gpu_hour=1", *overrides])


def _compose(tokens: list[str]) -> None:
    """Compose and validate the settings; raise ConfigError on a mistake."""
    assert run_hydra(tokens)


def test_every_verb_has_its_place_in_the_guides() -> None:
    shown = {command.tokens[0] for command in COMMANDS if command.tokens}
    assert set(VERBS) - {"train"} <= shown


def test_the_table_of_commands_has_every_verb_in_its_group() -> None:
    rows = [
        {*re.findall("`([^`]+)`", line)} for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| `")
    ]
    groups = {verb.group: {row.name for row in TABLE if row.group == verb.group} for verb in TABLE}
    assert sorted(map(sorted, rows)) == sorted(map(sorted, groups.values()))


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_a_guide_begins_with_a_command_that_works_as_it_stands(page: Path) -> None:
    first = blocks(page)[0]
    assert first.language == "sh"
    assert len(first.before.strip().splitlines()) == 1, "nothing but the title comes before"
    line = first.body.splitlines()[0]
    tokens = command_tokens(line)
    if tokens is None:
        target = re.fullmatch(r"make (\w+)", line)
        assert target
        assert re.search(rf"^{target[1]}:", (README.parent / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    else:
        assert not any(re.search(r"\b[A-Z]{3,}\b(?!-)|/shared|my", token.replace("H100-80GB", "")) for token in tokens)


def quoted_messages() -> list[str]:
    """Return the first cell of each table row: a message with `...` in place of values."""
    rows = re.findall(r"^\| `` ?(.+?) ?`` \||^\| `(.+?)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [first or second for first, second in rows]


@functools.cache
def templates() -> tuple[str, ...]:
    """Return all string literals in the launcher's source, with a placeholder for each value."""
    found: set[str] = set()
    for file in (REPO / "launcher").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.add("".join(p.value if isinstance(p, ast.Constant) else _VALUE for p in node.values))
    return tuple(found)


def is_in_the_source(message: str) -> bool:
    """Return whether a text in the source contains the constant parts of the message in order."""
    parts = [part for part in message.split("...") if part]
    pattern = re.compile(".*".join(re.escape(part) for part in parts), re.DOTALL)
    return any(pattern.search(template) for template in templates())


@pytest.mark.parametrize("message", quoted_messages())
def test_a_quoted_message_is_one_of_the_launcher(message: str) -> None:
    assert max(map(len, message.split("..."))) >= 8, "too little of it is constant to be found"
    assert is_in_the_source(message), f"no message of the launcher reads: {message}"


def test_a_quoted_message_that_no_longer_exists_is_detected() -> None:
    assert not is_in_the_source("a message that ... never had")


def test_the_page_covers_many_messages() -> None:
    assert len(quoted_messages()) >= 25
