"""Flags of verbs: a parser for verbs that compose no settings, and the help of verbs that do."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import textwrap
from dataclasses import replace
from typing import Any, NoReturn

from launcher.errors import ConfigError, Problem, did_you_mean
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

    def _is_unknown_flag(self, word: str) -> bool:
        name = word.partition("=")[0]
        known = [option for action in self._actions for option in action.option_strings]
        return name.startswith("--") and len(name) > 2 and not any(option.startswith(name) for option in known)

    def error(self, message: str) -> NoReturn:
        """Reject the command line with the wrong word, the closest existing word, and the usage.

        Raises:
            ConfigError: always.
        """
        problem = self._problem(message)
        usage = " ".join(self.format_usage().split())
        raise ConfigError(replace(problem, where="command line", remedy=f"{problem.remedy} {usage}".strip()))

    def _problem(self, message: str) -> Problem:
        """Convert argparse's message to a problem."""
        if match := re.fullmatch(r"the following arguments are required: (.+)", message):
            if unknown := next((word for word in self._words if self._is_unknown_flag(word)), None):
                # The word that it stands for may be the missing one.
                return self._problem(f"unrecognized arguments: {unknown}")
            optional = [action.metavar or action.dest for action in self._actions if action.nargs in ("*", "?")]
            names = [name for name in match[1].split(", ") if name not in optional]
            return Problem(f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing")
        if match := re.fullmatch(r"unrecognized arguments: (.+)", message):
            flag = re.search(r"--[\w-]+", match[1])
            known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
            close = difflib.get_close_matches(flag[0], known, n=1, cutoff=_FLAG_CUTOFF) if flag else []
            kind = "flag" if match[1].startswith("-") else "argument"
            return Problem(
                f"there is no such {kind}", value=redact(match[1]), remedy=f"did you mean {close[0]}?" if close else ""
            )
        if match := re.fullmatch(r"argument (\S+?): invalid int value: '(.*)'", message):
            return Problem(f"{match[1]} takes a whole number", value=match[2])
        if match := re.fullmatch(r"argument (\S+?): invalid choice: '(.*)' \(choose from (.+)\)", message):
            choices = match[3].replace("'", "").split(", ")
            guess = f"{did_you_mean(match[2], choices)} choose one of: {', '.join(choices)};".strip()
            return Problem(f"{match[1]} cannot be {redact(match[2])}", value=redact(match[2]), remedy=guess)
        if match := re.fullmatch(r"argument (\S+?): (.+)", message):
            return Problem(f"{match[1]}: {redact(match[2])}")
        return Problem(redact(message))


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
