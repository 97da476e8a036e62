"""The process that copies checkpoints to the mirror: `python -m launcher.worker.sidecars.mirror_process PLAN ATTEMPT`.

The head node's agent starts it beside the ranks. It uploads committed checkpoints until a line or EOF on standard input
announces the end of the attempt, and then completes the uploads. A line with a time.monotonic() time sets a deadline. If you run
it by hand with `< /dev/null`, it uploads what the mirror lacks and exits.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from launcher import json_records
from launcher.checkpoint import store
from launcher.checkpoint.manifest import Checkpoint
from launcher.checkpoint.mirror.remote_folder import RemoteFolder, describe_error
from launcher.checkpoint.mirror.upload import CheckpointGone, Mirror, MirrorTaken, mirror_url
from launcher.errors import CheckpointError, LauncherError, Superseded
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_records import MirrorRecord
from launcher.shell_commands import launcher_command, module_command
from launcher.tracking.tracker import RateLimit
from launcher.worker.sidecars.sidecar import Sidecar, begin_sidecar, checkpoints_state, print_to_log, record_event

_MODULE = "launcher.worker.sidecars.mirror_process"
_LOOK_S = 2.0
# Seconds between a failure and the next try, unless a checkpoint is committed earlier.
_RETRY_S = 60.0
# The time that the process needs to report that it missed its deadline.
_REPORT_S = 5.0
# Seconds from the attempt's end to the first report on what the run waits for, and between further reports.
_FIRST_PROGRESS_S = 5.0
_PROGRESS_EVERY_S = 60.0


def main(plan_path: str, attempt: int) -> int:
    """Upload until the attempt has ended and the mirror is complete, or until the deadline; returns 0 if it is complete."""
    source = begin_sidecar()
    plan = LaunchPlan.load(plan_path)
    sender = Sender(RunDir(Path(plan.run_dir)), plan, attempt)
    end = _End()
    threading.Thread(target=end.listen, args=(source, sender), name="end", daemon=True).start()
    threading.Thread(target=sender.report_progress, args=(end.come,), name="waiting", daemon=True).start()
    sender.work(end.come)
    return sender.conclude()


@dataclass
class _End:
    """The end of the attempt, as the agent announces it."""

    come: threading.Event = field(default_factory=threading.Event)

    def listen(self, source: io.RawIOBase, sender: Sender) -> None:
        more = True
        while more:
            line = source.readline()
            self.come.set()
            if deadline := line.strip():
                time.sleep(max(0.0, float(deadline) - time.monotonic()))
                # The uploading thread may be in the middle of a file for minutes.
                os._exit(sender.conclude())
            more = bool(line)


class Sender:
    """Uploads committed checkpoints, and reports on them in events.jsonl and in the attempt's mirror.json."""

    def __init__(self, run: RunDir, plan: LaunchPlan, attempt: int) -> None:
        self._run, self._attempt = run, attempt
        self._url = mirror_url(plan)
        self._plan = plan
        self._mirror: Mirror | None = None
        self._taken = False
        self._last_error = ""
        self._unsendable: set[tuple[int, int]] = set()
        self._alerts = RateLimit()
        self._concluding = threading.Lock()

    def work(self, ended: threading.Event) -> None:
        """Upload until the attempt has ended, then upload the rest."""
        # Differs from every folder state, so that the first round starts at once.
        seen: object = self
        tried = time.monotonic()
        while not self._taken:
            # Read this first: a checkpoint that is committed in between belongs to the next round.
            last = ended.is_set()
            committed = checkpoints_state(self._run.checkpoints)
            failed = bool(self._last_error) and time.monotonic() - tried > _RETRY_S
            if last or committed != seen or failed:
                seen, tried = committed, time.monotonic()
                self._round()
            if last:
                return
            ended.wait(_LOOK_S)

    def report_progress(self, ended: threading.Event) -> None:
        """After the attempt's end, report upload progress at intervals, so that the user knows what the run waits for."""
        ended.wait()
        time.sleep(_FIRST_PROGRESS_S)
        while (missing := self._behind()) and not self._concluding.locked():
            done = self._mirror.num_arrived if self._mirror is not None else 0
            total = sum(entry.size for c in missing for entry in c.manifest.files.values())
            names = ", ".join(str(c.step) for c in missing)
            text = f"training has ended, and the run waits for the mirror: step {names} is not complete there"
            text += f", {done / 2**30:.2f} of {total / 2**30:.2f} GiB are there"
            self._event("mirror", f"{text}; cancel the run to end it without the upload", missing[0].step)
            time.sleep(_PROGRESS_EVERY_S)

    def conclude(self) -> int:
        """Report once what the mirror holds; returns 0 if it holds everything."""
        # Never released: a second caller has nothing to add, and this process ends.
        self._concluding.acquire()
        steps = self._mirror.steps if self._mirror is not None else []
        missing = self._behind()
        self._record(missing)
        if self._taken:
            return 1
        if missing:
            command = f"{module_command(_MODULE, self._run.plan, str(self._attempt))} < /dev/null"
            names = ", ".join(str(c.step) for c in missing)
            self._event("alert", f"not in the mirror: step {names}; send it with: {command}")
            return 1
        if steps:
            text = f"the mirror holds step {steps[-1]}; continue it anywhere with: {launcher_command('resume', self._url)}"
            self._event("mirror", text, steps[-1])
        return 0

    def _round(self) -> None:
        """Upload what the mirror lacks, oldest first; a failure ends the round, and its alerts are rate-limited."""
        try:
            if self._mirror is None:
                mirror = Mirror(RemoteFolder(self._url), self._run, self._plan, self._attempt)
                mirror.begin()
                self._mirror = mirror
                # Prune before hours of uploads: until then, a download of the run takes the highest step.
                mirror.prune()
            while waiting := self._behind():
                self._send(self._mirror, waiting[0])
            self._mirror.send_evaluations()
            self._mirror.prune()
            self._mirror.send_progress()
            self._last_error = ""
        except (MirrorTaken, Superseded) as error:
            self._taken = True
            self._event("alert", f"uploads to the mirror have stopped: {error.problems[0].message}")
        except Exception as error:
            message = error.problems[0].message if isinstance(error, LauncherError) else describe_error(error)
            # One outage causes many different errors; mirror.json has the last one.
            if self._alerts.admit("the mirror cannot be written"):
                text = f"the mirror cannot be written; training continues and the next checkpoint retries: {message}"
                self._event("alert", text)
            self._last_error = message
        self._record(self._behind())

    def _send(self, mirror: Mirror, checkpoint: Checkpoint) -> None:
        began = time.monotonic()
        try:
            num_bytes = mirror.send(checkpoint)
        except CheckpointGone:
            text = (
                f"step {checkpoint.step} was removed before it was in the mirror; "
                "raise checkpoint.keep_last or checkpoint.save_every if the mirror does not keep up"
            )
            self._event("mirror", text, checkpoint.step)
            return
        except CheckpointError as error:
            # Skip a checkpoint whose local copy is damaged, so that it does not block later ones.
            self._unsendable.add(_identity(checkpoint))
            kind = "alert" if self._alerts.admit("a checkpoint is not sent") else "mirror"
            self._event(kind, f"step {checkpoint.step} is not sent to the mirror: {error.problems[0].message}", checkpoint.step)
            return
        seconds = time.monotonic() - began
        text = f"step {checkpoint.step} is in the mirror: {num_bytes / 2**30:.2f} GiB in {seconds:.1f} s"
        self._event("mirror", text, checkpoint.step)
        mirror.prune()

    def _behind(self) -> list[Checkpoint]:
        if self._mirror is None:
            return store.list_checkpoints(self._run.checkpoints)
        return [c for c in self._mirror.behind() if _identity(c) not in self._unsendable]

    def _record(self, missing: list[Checkpoint]) -> None:
        steps = self._mirror.steps if self._mirror is not None else []
        record = MirrorRecord(
            url=self._url,
            steps=tuple(steps),
            missing_steps=tuple(c.step for c in missing),
            failure=self._last_error or None,
            at=time.time(),
        )
        try:
            json_records.write(self._run.attempt(self._attempt) / "mirror.json", record)
        except OSError as error:
            print_to_log(f"mirror.json cannot be written: {error}")

    def _event(self, kind: str, text: str, step: int | None = None) -> None:
        record_event(self._run, self._attempt, kind, text, step)


# After a failure the run soon restarts, and its next attempt continues the uploads.
AFTER_FAILURE_S = 30.0


class MirrorProcess(Sidecar):
    """The agent's handle for the process."""

    @classmethod
    def start(
        cls, plan: LaunchPlan, plan_path: str, run: RunDir, attempt: int, environment: Mapping[str, str] | None = None
    ) -> Self | None:
        """Start the process with `environment`, or None if the plan has no mirror."""
        if plan.config.checkpoint.mirror is None:
            return None
        return cls._start(_MODULE, plan_path, run, attempt, "mirror.log", environment)

    def finish(self, until: float, unwanted: Callable[[], bool]) -> None:
        """Wait until the process has completed its uploads; it names what the mirror lacks at `until`."""
        self._send("")
        self._wait(until - _REPORT_S, unwanted)
        self._end(f"{time.monotonic()}", min(_REPORT_S, max(0.0, until - time.monotonic())), unwanted)


def _identity(checkpoint: Checkpoint) -> tuple[int, int]:
    return checkpoint.step, checkpoint.manifest.attempt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
