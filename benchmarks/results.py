"""The text of RESULTS.md: the current section of each benchmark, then former sections, newest first.

## Current
### KEY                     the benchmark; the same each time that it is run
**DATE: TITLE**
...
## History
### DATE: TITLE
...
"""

from __future__ import annotations

import re

CURRENT, HISTORY = "## Current", "## History"
EMPTY = f"# Results\n\n{CURRENT}\n\n{HISTORY}\n"


def with_section(text: str, key: str, title: str, body: str) -> str:
    """Return `text` with a new current section for `key`; the previous one moves to the top of the history.

    An empty `text` stands for a file that does not exist yet.

    Raises:
        ValueError: if `text` lacks one of its two headings.
    """
    introduction, current, history = _parts(text or EMPTY)
    section = f"### {key}\n\n**{title}**\n\n{body.strip()}\n\n"
    heading = f"### {key}\n"
    former = [other for other in current if other.startswith(heading)]
    kept = [section if other.startswith(heading) else other for other in current]
    current = kept if former else [*kept, section]
    history = [*map(_as_history, former), *history]
    return f"{introduction}{CURRENT}\n\n{''.join(current)}{HISTORY}\n\n{''.join(history)}".rstrip() + "\n"


def _parts(text: str) -> tuple[str, list[str], list[str]]:
    """Return the text before the first section, the current sections and the former ones."""
    match = re.search(rf"(?ms)^{CURRENT}$\s*(.*?)^{HISTORY}$\s*(.*)", text)
    if match is None:
        raise ValueError(f"the results need the headings '{CURRENT}' and '{HISTORY}', in this order")
    current, history = (_sections(part) for part in match.groups())
    return text[: match.start()], current, history


def _sections(text: str) -> list[str]:
    sections = re.split(r"(?m)^(?=### )", text)
    return [section.rstrip() + "\n\n" for section in sections if section.strip()]


def _as_history(section: str) -> str:
    """Return a current section with its title as heading instead of its key."""
    _, title, body = section.split("\n\n", 2)
    return f"### {title.strip('*')}\n\n{body}"
