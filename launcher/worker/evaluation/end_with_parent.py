"""Becomes the command of its arguments, in the root directory; the kernel ends it with the process that started it.

The command gets no search path of Python from the environment: it may be the interpreter of another environment. With
`--launcher N` in front, the others are those of this Python, which keeps the search path, with N added to its niceness.
"""

from __future__ import annotations

import os
import signal
import sys

from launcher.worker.ranks.rank_env import die_with_parent

LAUNCHER = "--launcher"

if __name__ == "__main__":
    die_with_parent(signal.SIGTERM)
    # Signals that the starter leaves to others are for the command again.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    words = sys.argv[1:]
    if words[0] == LAUNCHER:
        os.nice(int(words[1]))
        words[:2] = [sys.executable]
    else:
        # Python imports modules from the working directory, where another user's may lie.
        os.chdir("/")
        for name in ("PYTHONPATH", "PYTHONSAFEPATH"):
            os.environ.pop(name, None)
    # The wish to be told of the parent's death outlives exec.
    os.execv(words[0], words)  # noqa: S606
