"""The process that copies checkpoints to the mirror: `python -m launcher.worker.sidecars.mirror_process PLAN ATTEMPT`.

At the order COMPLETE or EOF it completes the uploads; at END, it reports what the mirror lacks. By hand, add `< /dev/null`.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from pathlib import Path

from launcher import clock
from launcher.checkpoint import store
from launcher.checkpoint.manifest import Checkpoint, Manifest
from launcher.checkpoint.mirror import CheckpointGone, Mirror, MirrorTaken, mirror_url
from launcher.checkpoint.remote_folder import RemoteFolder
from launcher.errors import CheckpointError, Superseded, describe
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import json_records
from launcher.runs.run_records import MirrorRecord
from launcher.shell_commands import launcher_command, module_command
from launcher.tracking.tracker import RateLimit
from launcher.worker.sidecars.sidecar import END, begin_sidecar, checkpoints_state, print_to_log, record_event

_MODULE = "launcher.worker.sidecars.mirror_process"
_LOOK_S = 2.0
# Seconds between a failure and the next try, unless a checkpoint is committed earlier.
_RETRY_S = 60.0
# Seconds from the attempt's end to the first report on what the run waits for, and between further reports.
_FIRST_PROGRESS_S = 5.0
_PROGRESS_EVERY_S = 60.0


def main(plan_path: str, attempt: int) -> int:
    """Upload until the attempt has ended and the mirror is complete, or until the deadline; returns 0 if it is complete."""
    source = begin_sidecar()
    plan = LaunchPlan.load(plan_path)
    sender = Sender(RunDir(Path(plan.run_dir)), plan, attempt)
    threading.Thread(target=sender.listen, args=(source,), name="orders", daemon=True).start()
    threading.Thread(target=sender.report_progress, name="waiting", daemon=True).start()
    sender.work()
    return sender.conclude()


class Sender:
    """Uploads committed checkpoints, and reports on them in events.jsonl and in the attempt's mirror.json."""

    def __init__(self, run: RunDir, plan: LaunchPlan, attempt: int) -> None:
        self._run, self._attempt = run, attempt
        self._url = mirror_url(plan)
        self._plan = plan
        self._mirror: Mirror | None = None
        self._taken = False
        self._last_error = ""
        self._unsendable: list[Manifest] = []
        self._alerts = RateLimit()
        self._has_ended = threading.Event()
        self._concluding = threading.Lock()

    def listen(self, orders: io.RawIOBase) -> None:
        """Follow the agent's orders until EOF."""
        order = None
        while order != b"":
            order = orders.readline()
            self._has_ended.set()
            if order == END:
                # The uploading thread may be in the middle of a file for minutes.
                os._exit(self.conclude())

    def work(self) -> None:
        """Upload until the attempt has ended, then upload the rest."""
        # Differs from every folder state, so that the first round starts at once.
        seen: object = self
        tried = time.monotonic()
        while not self._taken:
            # Read this first: a checkpoint that is committed in between belongs to the next round.
            last = self._has_ended.is_set()
            committed = checkpoints_state(self._run.checkpoints)
            failed = bool(self._last_error) and time.monotonic() - tried > _RETRY_S
            if last or committed != seen or failed:
                seen, tried = committed, time.monotonic()
                self._upload_missing()
            if last:
                return
            self._has_ended.wait(_LOOK_S)

    def report_progress(self) -> None:
        """After the attempt's end, report upload progress at intervals, so that the user knows what the run waits for."""
        self._has_ended.wait()
        time.sleep(_FIRST_PROGRESS_S)
        while (missing := self._list_missing()) and not self._concluding.locked():
            done = self._mirror.num_arrived if self._mirror is not None else 0
            total = sum(entry.size for c in missing for entry in c.manifest.files.values())
            names = ", ".join(str(c.step) for c in missing)
            text = f"training has ended, and the run waits for the mirror: step {names} is not complete there"
            text += f", {done / 2**30:.2f} of {total / 2**30:.2f} GiB are there"
            self._report("mirror", f"{text}; cancel the run to end it without the upload", missing[0].step)
            time.sleep(_PROGRESS_EVERY_S)

    def conclude(self) -> int:
        """Report once what the mirror holds; returns 0 if it holds everything."""
        # Never released: a second caller has nothing to add, and this process ends.
        self._concluding.acquire()
        steps = self._mirror.steps if self._mirror is not None else []
        missing = self._list_missing()
        self._write_record(missing)
        if self._taken:
            return 1
        if missing:
            command = f"{module_command(_MODULE, self._run.plan, str(self._attempt))} < /dev/null"
            names = ", ".join(str(c.step) for c in missing)
            self._report("alert", f"not in the mirror: step {names}; send it with: {command}")
            return 1
        if steps:
            text = f"the mirror holds step {steps[-1]}; continue it anywhere with: {launcher_command('resume', self._url)}"
            self._report("mirror", text, steps[-1])
        return 0

    def _upload_missing(self) -> None:
        """Upload what the mirror lacks, oldest first; a failure ends the round, and its alerts are rate-limited."""
        try:
            if self._mirror is None:
                mirror = Mirror(RemoteFolder(self._url), self._run, self._plan, self._attempt)
                mirror.begin()
                self._mirror = mirror
                # Prune before hours of uploads: until then, a download of the run takes the highest step.
                mirror.prune()
            while waiting := self._list_missing():
                self._send_checkpoint(self._mirror, waiting[0])
            self._mirror.send_evaluations()
            self._mirror.prune()
            self._mirror.send_progress()
            self._last_error = ""
        except (MirrorTaken, Superseded) as error:
            self._taken = True
            self._report("alert", f"uploads to the mirror have stopped: {error.problems[0].message}")
        except Exception as error:
            self._last_error = describe(error).partition("\n")[0]
            # One outage causes many different errors; mirror.json has the last one.
            if self._alerts.admit("the mirror cannot be written"):
                text = "the mirror cannot be written; training continues and the next checkpoint retries"
                self._report("alert", f"{text}: {self._last_error}")
        self._write_record(self._list_missing())

    def _send_checkpoint(self, mirror: Mirror, checkpoint: Checkpoint) -> None:
        began = time.monotonic()
        try:
            num_bytes = mirror.send(checkpoint)
        except CheckpointGone:
            text = (
                f"step {checkpoint.step} was removed before it was in the mirror; "
                "raise checkpoint.keep_last or checkpoint.save_every if the mirror does not keep up"
            )
            self._report("mirror", text, checkpoint.step)
            return
        except CheckpointError as error:
            # Skip a checkpoint whose local copy is damaged, so that it does not block later ones.
            self._unsendable.append(checkpoint.manifest)
            kind = "alert" if self._alerts.admit("a checkpoint is not sent") else "mirror"
            self._report(kind, f"step {checkpoint.step} is not sent to the mirror: {error.problems[0].message}", checkpoint.step)
            return
        seconds = time.monotonic() - began
        text = f"step {checkpoint.step} is in the mirror: {num_bytes / 2**30:.2f} GiB in {seconds:.1f} s"
        self._report("mirror", text, checkpoint.step)
        mirror.prune()

    def _list_missing(self) -> list[Checkpoint]:
        if self._mirror is None:
            return store.list_checkpoints(self._run.checkpoints)
        return [c for c in self._mirror.list_missing_checkpoints() if c.manifest not in self._unsendable]

    def _write_record(self, missing: list[Checkpoint]) -> None:
        steps = self._mirror.steps if self._mirror is not None else []
        record = MirrorRecord(
            url=self._url,
            steps=tuple(steps),
            missing_steps=tuple(c.step for c in missing),
            failure=self._last_error or None,
            at=clock.now(),
        )
        try:
            json_records.write(self._run.attempt(self._attempt) / "mirror.json", record)
        except OSError as error:
            print_to_log(f"mirror.json cannot be written: {error}")

    def _report(self, kind: str, text: str, step: int | None = None) -> None:
        record_event(self._run, self._attempt, kind, text, step)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
