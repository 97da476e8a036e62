"""The processes of a run: they are started by other processes, as `python -m launcher.worker.NAME`."""

from launcher import collect_garbage_rarely

collect_garbage_rarely()
