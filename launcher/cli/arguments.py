"""Flags of verbs: a parser for those that compose no settings, and the help of those that compose them."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import Any, NoReturn

# Flags of every verb that composes settings, besides its own: they are suggested for mistyped ones.
COMMON_FLAGS = ("--help", "--debug", "--trust-owner")


class VerbParser(argparse.ArgumentParser):
    """A parser that suggests the closest flag for one that the verb does not have."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # launcher.cli.main takes it out of the command line, for every verb; here it is for --help alone.
        trust = "accept files of this user as well (repeatable); see docs/security.md"
        self.add_argument("--trust-owner", metavar="NAME|UID", action="append", help=trust)

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: .*?(--[\w-]+)", message)
        known = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        if unknown and (matches := difflib.get_close_matches(unknown[1], known, n=1)):
            message += f"; did you mean {matches[0]}?"
        super().error(message)


def composing_usage(usage: str) -> str:
    """Return the help of a verb that composes settings: `usage`, and the options of each config group."""
    from launcher.config.compose import conf_dir

    groups = sorted(path for path in conf_dir().iterdir() if path.is_dir())
    options = [f"  {group.name:<11}{', '.join(sorted(path.stem for path in group.glob('*.yaml')))}" for group in groups]
    return "\n".join(
        [
            f"{usage}\n\nOptions of each group (group=option):",
            *options,
            "\ndocs/settings.md lists every setting. Hydra's flags: --cfg job, --info, -m, --config-dir DIR.",
        ]
    )
