"""Sections as one self-contained HTML page, without scripts, fonts or external files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup, escape

from launcher import atomic_files
from launcher.cli.render import charts
from launcher.cli.render.sections import Part
from launcher.errors import ConfigError

# Part of every page (templates/page.html.jinja), and used to recognize one: nothing is fetched and nothing runs, whatever a text
# on the page contains.
_POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""
# Longer words in tables may break after punctuation.
_LONG_WORD = 16


def require_writable_page(file: Path) -> Path:
    """Reject an unwritable path, or a file that is not one of the launcher's pages.

    Raises:
        ConfigError: about `--html`.
    """
    if file.is_dir() or not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        what, remedy = "the page cannot be written to this path", "choose a file in a folder that you can write to"
        raise ConfigError(what, where="--html", value=str(file), remedy=remedy)
    if file.is_file() and (content := file.read_text(errors="replace")) and _POLICY not in content:
        what = "the file is not a page of the launcher, so it is not overwritten"
        raise ConfigError(what, where="--html", value=str(file), remedy="name another file")
    return file


def write(file: Path, content: str) -> None:
    """Write a page to a path that `require_writable_page` accepts.

    Raises:
        ConfigError: if it does not, or if writing fails.
    """
    # UTF-8 cannot encode lone surrogates, which occur in some file names.
    encoded = content.encode(errors="xmlcharrefreplace")
    try:
        if require_writable_page(file).exists() and not file.is_file():
            file.write_bytes(encoded)
        else:
            # Only this user can read it, because pages show data rows.
            atomic_files.write_bytes(file.resolve(), encoded, mode=0o600)
    except OSError as error:
        what = f"the page cannot be written: {error.strerror}"
        raise ConfigError(what, where="--html", value=str(file), remedy="name a file on another disk") from None


def to_page(title: str, subtitle: str, parts: Sequence[Part]) -> str:
    """Return a page of sections; their texts are escaped."""
    # Imported here: most verbs write no page.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"cell": _cell, "draw": charts.draw}
    return templates.get_template("page.html.jinja").render(title=title, subtitle=subtitle, parts=parts)


def _cell(text: object) -> Markup:
    """Return a table cell's text with its line breaks, and with places where long words such as paths may break."""

    def breakable(word: str) -> Markup:
        return escape(word) if len(word) <= _LONG_WORD else Markup("<wbr>").join(re.split(r"(?<=[/.,:;=_&?-])", word))

    lines = (Markup(" ").join(breakable(word) for word in line.split(" ")) for line in str(text).split("\n"))
    return Markup("<br>").join(lines)
