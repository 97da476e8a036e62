"""`python -m launcher.worker.mirror` with shorter waits."""

from __future__ import annotations

import sys

from launcher.worker import mirror

if __name__ == "__main__":
    mirror._LOOK_S, mirror._SAY_FIRST_S = 0.1, 0.5
    sys.exit(mirror.main(sys.argv[1], int(sys.argv[2])))
