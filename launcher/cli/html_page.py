"""One self-contained HTML page from a template. No script, no font and no file from elsewhere."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from launcher.errors import ConfigError

if TYPE_CHECKING:
    from jinja2 import Environment

# Part of every page (templates/page.html.jinja), by which one is recognised: nothing is fetched and nothing runs,
# whatever a text on the page holds.
_POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""


def require_place(file: Path) -> Path:
    """Refuse a file that cannot be written, or that holds something other than such a page, which would be lost.

    Raises:
        ConfigError: about `--html`.
    """
    try:
        writable = not file.is_dir() and os.access(file if file.exists() else file.absolute().parent, os.W_OK)
        foreign = writable and file.exists() and file.stat().st_size > 0 and _POLICY not in _beginning(file)
    except OSError:
        writable = foreign = False
    if not writable:
        what, remedy = "the page cannot be written there", "name a file in a folder of yours"
        raise ConfigError(what, where="--html", value=str(file), remedy=remedy)
    if foreign:
        what = "the file is no page that the launcher wrote, and stays as it is"
        raise ConfigError(what, where="--html", value=str(file), remedy="name another file")
    return file


def write(file: Path, content: str) -> None:
    """Write a page where `require_place` has nothing against it.

    Raises:
        ConfigError: also where storage takes none.
    """
    try:
        # What UTF-8 has no place for, as half a surrogate pair of a file's name, is known before the page before is gone.
        require_place(file).write_bytes(content.encode(errors="xmlcharrefreplace"))
    except OSError as error:
        what = f"the page cannot be written: {error.strerror}"
        raise ConfigError(what, where="--html", value=str(file), remedy="name a file on another disk") from None


def render(template: str, **context: Any) -> str:
    """Return the page of a template of launcher/cli/templates; texts of `context` are escaped, Markup is not.

    Args:
        template: name without its ending, such as `report`.
        context: its variables; `title` and `subtitle` are those of every page.
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
    templates.filters["line_breaks"] = lambda text: Markup("<br>").join(str(text).split("\n"))
    return templates


def _beginning(file: Path) -> str:
    with open(file, encoding="utf-8", errors="replace") as opened:
        return opened.read(1000)
