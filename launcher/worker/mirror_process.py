"""The process that copies checkpoints to the mirror: `python -m launcher.worker.mirror_process PLAN ATTEMPT`.

The head node's agent starts it beside the ranks. It looks for committed checkpoints until its standard input says that the
attempt has ended, by a line or by its end, and then takes the time that it needs. A line with a time in seconds since the epoch
says by when it must be done. By hand, with `< /dev/null`, it sends what is not in the mirror yet and ends.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import json_records
from launcher.checkpoint import store
from launcher.checkpoint.manifest import MANIFEST, Checkpoint
from launcher.checkpoint.mirror.remote_folder import RemoteFolder, describe_error
from launcher.checkpoint.mirror.upload import CheckpointGone, Mirror, MirrorTaken, mirror_url
from launcher.errors import CheckpointError, LauncherError, Superseded
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_records import MirrorRecord
from launcher.tracking.jsonl import append_event
from launcher.tracking.tracker import RateLimit
from launcher.worker.rank_env import die_with_parent

# The ranks need the processor more.
_NICE = 10
_LOOK_S = 2.0
# After a failure, without a checkpoint that would be a reason to look.
_TRY_AGAIN_S = 60.0
# What the process itself needs to say that it was not done in time.
_LAST_WORDS_S = 5.0
_POLL_S = 0.1
# After the attempt's end a person is told what the run waits for: not where that is done at once, then now and then.
_SAY_FIRST_S = 5.0
_SAY_AGAIN_S = 60.0


def main(plan_path: str, attempt: int) -> int:
    """Send until the attempt has ended and all is sent, or the time is over; 0 where the mirror holds everything."""
    die_with_parent()
    os.nice(_NICE)
    # The wish to save and stop is the ranks'; the agent tells this process the end in another way.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP})
    plan = LaunchPlan.load(plan_path)
    sender = Sender(RunDir(Path(plan.run_dir)), plan, attempt)
    end = _End()
    # Without a buffer, whose lock would still be held when the interpreter ends.
    source = open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)  # noqa: SIM115
    threading.Thread(target=end.listen, args=(source, sender), name="end", daemon=True).start()
    threading.Thread(target=sender.say_what_is_waited_for, args=(end.come,), name="waiting", daemon=True).start()
    sender.work(end.come)
    return sender.conclude()


@dataclass
class _End:
    """The end of the attempt, as the agent tells it."""

    come: threading.Event = field(default_factory=threading.Event)

    def listen(self, source: io.RawIOBase, sender: Sender) -> None:
        more = True
        while more:
            line = source.readline()
            self.come.set()
            if said := line.strip():
                time.sleep(max(0.0, float(said) - time.time()))
                # The thread that sends may be in the middle of a file, for minutes.
                os._exit(sender.conclude())
            more = bool(line)


class Sender:
    """Sends what is committed, and says what became of it in events.jsonl and in the attempt's mirror.json."""

    def __init__(self, run: RunDir, plan: LaunchPlan, attempt: int) -> None:
        self._run, self._attempt = run, attempt
        self._url = mirror_url(plan)
        self._plan = plan
        self._mirror: Mirror | None = None
        self._taken = False
        self._said = ""
        self._given_up: set[tuple[int, int]] = set()
        self._alerts = RateLimit()
        self._bytes = 0
        self._seconds = 0.0
        self._lag_s: float | None = None
        self._concluding = threading.Lock()

    def work(self, ended: threading.Event) -> None:
        """Send until the attempt has ended, and then what is left."""
        # Unlike all that can be seen: the first round is due at once.
        seen: object = self
        tried = time.monotonic()
        while not self._taken:
            # Read before the look: what is committed in between is for the next round.
            last = ended.is_set()
            there = _committed(self._run.checkpoints)
            failed = bool(self._said) and time.monotonic() - tried > _TRY_AGAIN_S
            if last or there != seen or failed:
                seen, tried = there, time.monotonic()
                self._round()
            if last:
                return
            ended.wait(_LOOK_S)

    def say_what_is_waited_for(self, ended: threading.Event) -> None:
        """From the attempt's end on, say from time to time how far the mirror is; a run that does not end needs a reason."""
        ended.wait()
        time.sleep(_SAY_FIRST_S)
        while (missing := self._behind()) and not self._concluding.locked():
            done, total = self._mirror.progress(missing) if self._mirror is not None else (0, 0)
            names = ", ".join(str(c.step) for c in missing)
            text = f"training has ended, and the run waits for the mirror: step {names} is not there yet"
            text += f", {done / 2**30:.2f} of {total / 2**30:.2f} GiB are" if total else ""
            self._event("mirror", f"{text}; cancel the run to end it without", missing[0].step, done=done, total=total)
            time.sleep(_SAY_AGAIN_S)

    def conclude(self) -> int:
        """Say what is in the mirror, once; 0 where it is everything."""
        # Never released: whoever comes second has nothing to add, and this process ends.
        self._concluding.acquire()
        steps = self._mirror.steps if self._mirror is not None else []
        missing = self._behind()
        self._record(missing)
        if self._taken:
            return 1
        if missing:
            command = f"python -m launcher.worker.mirror_process {self._run.plan} {self._attempt} < /dev/null"
            names = ", ".join(str(c.step) for c in missing)
            self._event("alert", f"not in the mirror: step {names}; send it with: {command}")
            return 1
        if steps:
            text = f"the mirror holds step {steps[-1]}; continue it anywhere with: python -m launcher resume {self._url}"
            self._event("mirror", text, steps[-1], mirror=self._url, steps=steps)
        return 0

    def _round(self) -> None:
        """Send what is behind, oldest first; a failure is said now and then, and ends the round."""
        try:
            if self._mirror is None:
                mirror = Mirror(RemoteFolder(self._url), self._run, self._plan, self._attempt)
                mirror.begin()
                self._mirror = mirror
                # Before hours of sending: whoever fetches the run meanwhile takes the highest step.
                mirror.prune()
            while waiting := self._behind():
                self._send(self._mirror, waiting[0])
            self._mirror.prune()
            self._mirror.send_progress()
            self._said = ""
        except (MirrorTaken, Superseded) as error:
            self._taken = True
            self._event("alert", f"the mirror is not written any more: {error.problems[0].what}")
        except Exception as error:
            what = error.problems[0].what if isinstance(error, LauncherError) else describe_error(error)
            # One outage has many words; mirror.json has the last. One that lasts is told again.
            if self._alerts.admit("the mirror cannot be written"):
                text = f"the mirror cannot be written; training continues and the next checkpoint retries: {what}"
                self._event("alert", text, mirror=self._url)
            self._said = what
        self._record(self._behind())

    def _send(self, mirror: Mirror, checkpoint: Checkpoint) -> None:
        began = time.time()
        committed_at = (checkpoint.path / MANIFEST).stat().st_mtime if checkpoint.path.is_dir() else began
        try:
            sent = mirror.send(checkpoint)
        except CheckpointGone:
            text = (
                f"step {checkpoint.step} was removed before it was in the mirror; "
                "raise checkpoint.keep_last or checkpoint.save_every where the mirror does not keep up"
            )
            self._event("mirror", text, checkpoint.step)
            return
        except CheckpointError as error:
            # Damaged here: it is left alone, so that it does not keep back those after it.
            self._given_up.add(_identity(checkpoint))
            kind = "alert" if self._alerts.admit("a checkpoint is not sent") else "mirror"
            self._event(kind, f"step {checkpoint.step} is not sent to the mirror: {error.problems[0].what}", checkpoint.step)
            return
        seconds, self._lag_s = time.time() - began, time.time() - committed_at
        self._bytes, self._seconds = self._bytes + sent.bytes, self._seconds + seconds
        text = f"step {sent.step} is in the mirror: {sent.bytes / 2**30:.2f} GiB in {seconds:.1f} s"
        self._event("mirror", text, sent.step, bytes=sent.bytes, seconds=seconds, lag_s=self._lag_s)
        mirror.prune()

    def _behind(self) -> list[Checkpoint]:
        if self._mirror is None:
            return store.list_checkpoints(self._run.checkpoints)
        return [c for c in self._mirror.behind() if _identity(c) not in self._given_up]

    def _record(self, missing: list[Checkpoint]) -> None:
        steps = self._mirror.steps if self._mirror is not None else []
        record = MirrorRecord(
            url=self._url,
            last_step=steps[-1] if steps else None,
            steps=tuple(steps),
            missing_steps=tuple(c.step for c in missing),
            bytes=self._bytes,
            seconds=self._seconds,
            lag_s=self._lag_s,
            failure=self._said or None,
            at=time.time(),
        )
        try:
            json_records.write(self._run.attempt(self._attempt) / "mirror.json", record)
        except OSError as error:
            print(f"mirror.json cannot be written: {error}", file=sys.stderr, flush=True)

    def _event(self, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
        print(text, file=sys.stderr, flush=True)
        try:
            append_event(self._run, self._attempt, kind, text, step, **fields)
        except OSError as error:
            print(f"events.jsonl cannot be written: {error}", file=sys.stderr, flush=True)


# A run whose ranks have failed is about to be started again, and its next attempt sends on.
AFTER_FAILURE_S = 30.0


class MirrorProcess:
    """The agent's hold on it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @classmethod
    def start(
        cls, plan: LaunchPlan, plan_path: str, run: RunDir, attempt: int, environment: Mapping[str, str] | None = None
    ) -> MirrorProcess | None:
        """Start it where the plan has a mirror, in this environment or another; it ends with the thread that starts it."""
        if plan.config.checkpoint.mirror is None:
            return None
        command = [sys.executable, "-m", "launcher.worker.mirror_process", plan_path, str(attempt)]
        with open(run.attempt(attempt) / "mirror.log", "ab") as log:
            return cls(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT))

    @property
    def pid(self) -> int:
        return self._process.pid

    def finish(self, until: float, unwanted: Callable[[], bool]) -> None:
        """Let it send what is committed until a time in seconds since the epoch, or until waiting is `unwanted`; then end it.

        `until` may be infinite.
        """
        self._tell("")
        while self._process.poll() is None and time.time() < until - _LAST_WORDS_S and not unwanted():
            time.sleep(_POLL_S)
        self._tell(f"{time.time()}")
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(min(_LAST_WORDS_S, max(0.0, until - time.time())))
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def _tell(self, line: str) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        # It may have ended already.
        with suppress(OSError):
            stdin.write(f"{line}\n".encode())
            stdin.flush()


def _identity(checkpoint: Checkpoint) -> tuple[int, int]:
    return checkpoint.step, checkpoint.manifest.attempt


def _committed(folder: Path) -> object:
    """What changes when a checkpoint comes or goes; cheap enough to be asked often on a network file system."""
    if not folder.is_dir():
        return None
    found = []
    for path in folder.glob("step-*"):
        try:
            found.append((path.name, (path / MANIFEST).stat().st_mtime_ns))
        except OSError:
            continue
    return sorted(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
