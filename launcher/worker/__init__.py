"""The processes of a run: they are started by other processes, as `python -m launcher.worker.NAME`."""

from launcher import end_without_garbage_collection

end_without_garbage_collection()
