"""Executes the command in its arguments, in the root directory; the kernel ends it with the process that started it.

The command gets no Python search path from the environment, because it may be another environment's interpreter. With a leading
`--launcher N`, the remaining arguments are for this Python, which keeps the search path, and N is added to its niceness.
"""

from __future__ import annotations

import os
import signal
import sys

from launcher.worker.ranks.rank_env import die_with_parent

LAUNCHER = "--launcher"

if __name__ == "__main__":
    die_with_parent(signal.SIGTERM)
    # Signals that the starter blocks are delivered to the command again.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    words = sys.argv[1:]
    if words[0] == LAUNCHER:
        os.nice(int(words[1]))
        words[:2] = [sys.executable]
    else:
        # Python imports modules from the working directory, which may contain another user's files.
        os.chdir("/")
        for name in ("PYTHONPATH", "PYTHONSAFEPATH"):
            os.environ.pop(name, None)
    # The parent-death signal survives exec.
    os.execv(words[0], words)  # noqa: S606
