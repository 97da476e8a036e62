"""`python -m launcher.worker.mirror_process` with shorter waits."""

from __future__ import annotations

import sys

from launcher.worker import mirror_process

if __name__ == "__main__":
    mirror_process._LOOK_S, mirror_process._FIRST_PROGRESS_S = 0.1, 0.5
    sys.exit(mirror_process.main(sys.argv[1], int(sys.argv[2])))
