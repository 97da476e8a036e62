"""A process that works for a command: it prints one JSON object, a result or problems."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from launcher.errors import LauncherError
from launcher.models.remote_code import remove_copies
from launcher.security.printable_stream import printable_output
from launcher.worker.ranks.rank_env import die_with_parent, exit_without_shutdown
from launcher.worker.signals import exit_on_termination


def run_process(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run `main` with this process's arguments and exit with its code; the process ends with the command that started it."""
    exit_on_termination()
    die_with_parent(signal.SIGTERM)
    exit_without_shutdown(main(sys.argv[1:]))


def answer(work: Callable[[], dict[str, Any]]) -> int:
    """Print the result of `work`, or its problems, as one JSON line; returns the exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Libraries also print to standard output.
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        # Libraries log names from other users' files to the command's terminal.
        with printable_output():
            result, code = work(), 0
    except LauncherError as error:
        result, code = error.to_report(), error.exit_code
    finally:
        remove_copies()
    os.write(output, (json.dumps(result) + "\n").encode())
    return code
