"""The parser of verbs that have flags of their own and compose no settings."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import NoReturn


class VerbParser(argparse.ArgumentParser):
    """A parser that suggests the closest flag for one that the verb does not have."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: .*?(--[\w-]+)", message)
        known = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        if unknown and (matches := difflib.get_close_matches(unknown[1], known, n=1)):
            message += f"; did you mean {matches[0]}?"
        super().error(message)
