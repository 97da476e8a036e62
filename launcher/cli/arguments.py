"""Flags of verbs: a parser for verbs that compose no settings, and the help of verbs that do."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
import textwrap
from contextlib import suppress
from typing import Any, NoReturn

from launcher.errors import ConfigError
from launcher.security.redaction import redact

# Flags, besides its own, of every verb that composes settings; they are suggested for mistyped flags.
COMMON_FLAGS = ("--help", "--debug", "--trust-owner", "--version")
# The folder in which runs are looked up by name.
DEFAULT_ROOT = "runs"
_FLAG_CUTOFF = 0.7


class VerbParser(argparse.ArgumentParser):
    """A parser whose errors are launcher errors that suggest the closest existing word."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._words: list[str] = []
        # launcher.cli.main removes it from every verb's command line; here it is only for --help.
        trust = "accept files of this user too: NAME, UID, group:NAME or anyone (repeatable); see docs/security.md"
        self.add_argument("--trust-owner", metavar="OWNER", action="append", help=trust)

    def add_root(self) -> None:
        """Add the option for the folder in which runs are looked up by name."""
        self.add_argument("--root", default=DEFAULT_ROOT, help=f"folder of the runs (default: {DEFAULT_ROOT})")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse like argparse; keeps the words for messages."""
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Reject the command line with argparse's reason, the closest flag for an unknown one, and the usage.

        Raises:
            ConfigError: always.
        """
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        # A mistyped flag may also be why an argument is missing.
        flags = [word.partition("=")[0] for word in self._words if word.startswith("--") and len(word) > 2]
        unknown = next((flag for flag in flags if not any(option.startswith(flag) for option in known)), "")
        close = difflib.get_close_matches(unknown, known, n=1, cutoff=_FLAG_CUTOFF)
        if unknown:
            message = f"unrecognized arguments: {unknown}"
        guess = f"did you mean {close[0]}? " if close else ""
        remedy = f"{guess}{' '.join(self.format_usage().split())}"
        raise ConfigError(redact(message), where="command line", remedy=remedy)


def minutes(value: str) -> float:
    """Parse a number of minutes above 0."""
    with suppress(ValueError):
        if 0 < (number := float(value)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"{value} is not a number of minutes above 0")


def composing_usage(usage: str) -> str:
    """Return the help of a verb that composes settings: `usage`, and the options of each config group."""
    from launcher.config.compose import conf_dir

    groups = sorted(path for path in conf_dir().iterdir() if path.is_dir())
    options = []
    for group in groups:
        names = ", ".join(sorted(path.stem for path in group.glob("*.yaml")))
        options += textwrap.wrap(f"  {group.name:<11}{names}", 100, subsequent_indent=" " * 13)
    return "\n".join(
        [
            f"{usage}\n\nOptions of each group (group=option):",
            *options,
            "\ndocs/settings.md lists every setting. Hydra's flags: --cfg job, --info, -m, --config-dir DIR.",
        ]
    )
