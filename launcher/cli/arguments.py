"""The parser of verbs that have flags of their own and compose no settings."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import Any, NoReturn


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
