"""Becomes the command of its arguments, in the root directory; the kernel ends it with the process that started it.

The command gets no search path of Python from the environment: it may be the interpreter of another environment.
"""

from __future__ import annotations

import os
import signal
import sys

from launcher.worker.ranks.rank_env import die_with_parent

if __name__ == "__main__":
    die_with_parent(signal.SIGTERM)
    # Python imports modules from the working directory, where another user's may lie.
    os.chdir("/")
    for name in ("PYTHONPATH", "PYTHONSAFEPATH"):
        os.environ.pop(name, None)
    # The wish to be told of the parent's death outlives exec.
    os.execv(sys.argv[1], sys.argv[1:])  # noqa: S606
