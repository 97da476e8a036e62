"""Write docs/settings.md from the schema and the files under conf/.

python docs/settings_page.py            write it
python docs/settings_page.py --check    exit 1 if it is outdated
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from launcher.config.command_line import GROUPS, conf_dir
from launcher.config.schema import RunConfig, Setting, sections_of, settings, settings_of

PAGE = Path(__file__).resolve().with_name("settings.md")
# A bar ends a cell of a Markdown table, even in code.
_BAR = r"\|"

_HEAD = """\
# Settings

Written by `make settings` from the descriptions in `launcher/config` and the files under `conf/`.

Set a setting with `key=value` (`train.max_steps=100`), and choose an option of a group with `group=option`
(`model=qwen3_8b`). The defaults below are the schema's; group options and `conf/config.yaml` override many of them, and
`python -m launcher config --json` prints the result. [A run's file](run-file.md) has the same keys. The command line wins over
the run's file, the file over an experiment, an experiment over the groups, the groups over `conf/config.yaml`. `null` unsets a
setting.

`python -m launcher plan` shows the plan of these settings and starts nothing.
"""


def render() -> str:
    """Return the whole page."""
    parts = [_HEAD]
    for name, field in RunConfig.model_fields.items():
        sections = sections_of(field.annotation)
        rows = [setting for setting in settings().values() if setting.key.startswith(f"{name}.")]
        parts += [f"## {name}\n\n{settings()[name].meaning}\n", _render_table(row for row in rows if not row.kinds)]
        for section in sections if len(sections) > 1 else ():
            kind = section.model_fields["kind"].default
            # Two sections may describe a setting of the same name differently.
            of_kind = [row for row in settings_of(section, f"{name}.") if row.key != f"{name}.kind"]
            if rows_of_kind := [row for row in of_kind if row != settings()[row.key]]:
                parts += [f"### {name}={kind}\n\n{section.__doc__}\n", _render_table(rows_of_kind)]
    parts.append(
        "# Options of the groups\n\nThe files under `conf/`; `--config-dir DIR` adds your own, laid out in the same way.\n"
    )
    for group in GROUPS:
        files = sorted((conf_dir() / group).glob("*.yaml"))
        abouts = [about_file(file) for file in files]
        parts.append(f"## {group}=\n")
        if group in ("model", "experiment"):
            parts.append(
                "[Presets](presets.md) has their sizes, licenses and hardware; each file says where its numbers come from.\n"
            )
            # The address of the weights, or the first sentence.
            abouts = [about.partition(" " if about.startswith("https:") else ". ")[0] for about in abouts]
        parts += [*(f"- `{file.stem}`: {about}" for file, about in zip(files, abouts, strict=True)), ""]
    return "\n".join(parts)


def _render_table(rows: Iterable[Setting]) -> str:
    lines = ["| key | type | default | meaning |\n|---|---|---|---|"]
    for row in rows:
        default = "required" if row.default is None else f"`{row.default}`"
        cells = (f"`{row.key}`", f"`{row.type}`", default, row.meaning)
        lines.append(f"| {' | '.join(cell.replace('|', _BAR) for cell in cells)} |")
    return "\n".join([*lines, ""])


def about_file(file: Path) -> str:
    """Return the comment at the top of a file, without Hydra's own line."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.lstrip("# "))
    return " ".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the page; return the exit code."""
    parser = argparse.ArgumentParser(description="Write or check docs/settings.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is outdated")
    checks = parser.parse_args(argv).check
    if not checks:
        PAGE.write_text(render(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != render():
        print(f"{PAGE.name}: not what the settings say; write it with: make settings", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
