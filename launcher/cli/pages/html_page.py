"""One self-contained HTML page from a template, without scripts, fonts or external files."""

from __future__ import annotations

import errno
import functools
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from launcher import atomic_files
from launcher.errors import ConfigError
from launcher.security import ownership

if TYPE_CHECKING:
    from jinja2 import Environment

# Part of every page (templates/page.html.jinja), and used to recognize one: nothing is fetched and nothing runs, whatever a text
# on the page contains.
_POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""


# Longer words in tables may break after punctuation.
_LONG_WORD = 16


def require_writable_page(file: Path) -> Path:
    """Reject an unwritable path, another user's link, or a file that is not one of the launcher's pages.

    Raises:
        ConfigError: about `--html`.
    """
    _follow(file)
    try:
        is_writable = not file.is_dir() and os.access(file if file.exists() else file.absolute().parent, os.W_OK)
        is_foreign = is_writable and file.exists() and file.stat().st_size > 0 and _POLICY not in _beginning(file)
    except OSError:
        is_writable = is_foreign = False
    if not is_writable:
        what, remedy = "the page cannot be written to this path", "choose a file in a folder that you can write to"
        raise ConfigError(what, where="--html", value=str(file), remedy=remedy)
    if is_foreign:
        what = "the file is not a page of the launcher, so it is not overwritten"
        raise ConfigError(what, where="--html", value=str(file), remedy="name another file")
    return file


def write(file: Path, content: str) -> None:
    """Write a page to a path that `require_writable_page` accepts.

    Raises:
        ConfigError: if it does not, or if writing fails.
    """
    try:
        # UTF-8 cannot encode lone surrogates, which occur in some file names. Encode before the old page is removed.
        encoded = content.encode(errors="xmlcharrefreplace")
        if require_writable_page(file).exists() and not file.is_file():
            _write_to_device(file, encoded)
        else:
            # Only this user can read it, because pages show data rows. A link that another user creates now is replaced.
            atomic_files.write_bytes(_follow(file), encoded, mode=0o600)
    except OSError as error:
        what = f"the page cannot be written: {error.strerror}"
        raise ConfigError(what, where="--html", value=str(file), remedy="name a file on another disk") from None


def _follow(file: Path) -> Path:
    """Return the file that a path leads to; the file need not exist.

    Raises:
        ConfigError: if a link of another user, for example in their run's directory, chooses it.
    """
    try:
        return ownership.follow_own_links(file)
    except OSError as error:
        message, remedy = f"the page cannot be written: {error.strerror}", "name a file in a folder of your own with --html"
        raise ConfigError(message, where="--html", value=str(file), remedy=remedy) from None


def _write_to_device(file: Path, content: bytes) -> None:
    """Write to a pipe or a terminal, unless it is another user's."""
    # Opening a pipe waits for its reader.
    _require_own_device(file.stat())
    with open(os.open(file, os.O_WRONLY), "wb") as device:
        _require_own_device(os.fstat(device.fileno()))
        device.write(content)


def _require_own_device(status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode) or not ownership.accepts_owner(status.st_uid):
        raise PermissionError(errno.EPERM, "it is a pipe or a device of another user")


def render(template: str, **context: Any) -> str:
    """Render a template in launcher/cli/pages/templates; texts in `context` are escaped, Markup is not.

    Args:
        template: name without its ending, such as `report`.
        context: its variables; every page has `title` and `subtitle`.
    """
    return environment().get_template(f"{template}.html.jinja").render(**context)


@functools.cache
def environment() -> Environment:
    """Return Jinja's environment for pages."""
    # Imported here: most verbs write no page.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["cell"] = _cell
    return templates


def _cell(text: object) -> Markup:
    """Return a table cell's text with its line breaks, and with places where long words such as paths may break."""
    lines = (Markup(" ").join(_breakable(word) for word in line.split(" ")) for line in str(text).split("\n"))
    return Markup("<br>").join(lines)


def _breakable(word: str) -> Markup:
    return escape(word) if len(word) <= _LONG_WORD else Markup("<wbr>").join(re.split(r"(?<=[/.,:;=_&?-])", word))


def _beginning(file: Path) -> str:
    with open(file, encoding="utf-8", errors="replace") as opened:
        return opened.read(1000)
