"""Certainty that a run has ended, for commands that start it again, change it or remove it."""

from __future__ import annotations

import sys

from launcher import run_store
from launcher.cli import formatting
from launcher.clusters import detached_process
from launcher.errors import SubmitError
from launcher.plan.run_dir import RunDir


def require_ended(run: RunDir) -> None:
    """Refuse a run that another machine still refreshes although its backend judges that it has ended.

    Raises:
        SubmitError: with the process that runs it.
    """
    if not detached_process.is_still_refreshed(run, _say):
        return
    raise SubmitError(
        "the run is still alive, although its last sign of life seems to be minutes old: the clocks of two machines differ",
        where=str(run.root),
        value=formatting.whereabouts(run, run_store.read_status(run), run_store.newest_attempt(run)),
        remedy="compare `date` on both machines, and correct the wrong clock; to stop the run, type cancel on its own machine",
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
