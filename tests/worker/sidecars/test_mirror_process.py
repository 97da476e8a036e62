"""The mirror process: what it uploads and reports, which signals it ignores, and how it ends."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from forked import ForkedProcess, preloaded
from hand_made import event_texts
from mirror_tools import commit, make_run, tree
from pace import wait_for

from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import read_events
from launcher.worker.sidecars.sidecar import COMPLETE, END, Sidecar, record_event
from launcher.worker.signals import PREEMPT, Stopper

pytestmark = pytest.mark.rest


@contextmanager
def sending(run: RunDir, attempt: int = 1, module: str = "quick_mirror") -> Iterator[ForkedProcess]:
    """Fork the mirror process; `quick_mirror` polls more often than `launcher.worker.sidecars.mirror_process`."""
    with open(run.attempt(attempt) / "mirror.log", "ab") as log:
        process = preloaded("launcher.worker.sidecars.mirror_process", "fsspec.implementations.local").popen(
            module, str(run.plan), str(attempt), stdin=subprocess.PIPE, stdout=log.fileno(), stderr=log.fileno()
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=10)


def record(run: RunDir) -> dict[str, Any]:
    file = run.attempt(1) / "mirror.json"
    return json.loads(file.read_text()) if file.is_file() else {"steps": None}


def end(process: ForkedProcess, order: bytes = COMPLETE) -> int:
    process.communicate(order, timeout=60)
    return process.returncode


def test_committed_checkpoints_are_uploaded_and_reported(tmp_path: Path) -> None:
    _, run = make_run(tmp_path, f"file://{tmp_path}/mirror")
    commit(run, 5)
    with sending(run, module="launcher.worker.sidecars.mirror_process") as process:
        wait_for("step 5", lambda: record(run)["steps"] == [5])
        assert psutil.Process(process.pid).nice() == min(19, os.nice(0) + 10)
        # The agent sends these signals for ranks only, but Slurm sends its own to every process.
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP):
            process.send_signal(number)
        commit(run, 10)
        wait_for("step 10", lambda: record(run)["steps"] == [5, 10])
        commit(run, 15)
        assert end(process) == 0
    assert tree(tmp_path / "mirror/a/checkpoints") == tree(run.checkpoints)
    assert (record(run)["steps"], record(run)["missing_steps"], record(run)["failure"]) == ([5, 10, 15], [], None)
    assert [text.partition(":")[0] for text in event_texts(run, "mirror")] == [
        *(f"step {step} is in the mirror" for step in (5, 10, 15)),
        "the mirror holds step 15; continue it anywhere with",
    ]
    # The mirror also has its latest events, except the very last line.
    assert "step 15 is in the mirror" in (tmp_path / "mirror/a/events.jsonl").read_text()


def test_a_failed_upload_alerts_once_and_the_next_checkpoint_retries(tmp_path: Path) -> None:
    _, run = make_run(tmp_path, f"file://{tmp_path}/mirror")
    (tmp_path / "mirror").write_text("in the way")
    with sending(run) as process:
        wait_for("the alert", lambda: event_texts(run, "alert"))
        commit(run, 5)
        wait_for("another try", lambda: record(run).get("missing_steps") == [5])
        assert len(event_texts(run, "alert")) == 1
        assert "training continues" in event_texts(run, "alert")[0]
        (tmp_path / "mirror").unlink()
        commit(run, 10)
        wait_for("both", lambda: record(run)["steps"] == [5, 10])
        assert record(run)["failure"] is None
        # Storage that fails and recovers repeatedly must not alert each time.
        (tmp_path / "mirror").rename(tmp_path / "away")
        (tmp_path / "mirror").write_text("in the way again")
        commit(run, 15)
        wait_for("another failure", lambda: record(run)["failure"])
        (tmp_path / "mirror").unlink()
        (tmp_path / "away").rename(tmp_path / "mirror")
        commit(run, 20)
        wait_for("the last", lambda: record(run)["steps"] == [5, 10, 15, 20])
        assert end(process) == 0
    assert len(event_texts(run, "alert")) == 1


def test_a_disk_without_room_for_the_log_does_not_end_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = make_run(tmp_path, f"file://{tmp_path}/mirror")
    monkeypatch.setattr("builtins.print", no_room)
    record_event(run, 1, "alert", "no room")
    assert event_texts(run, "alert") == ["no room"]


def no_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_process_ends_when_told_and_names_the_missing_steps(tmp_path: Path) -> None:
    _, run = make_run(tmp_path, f"file://{tmp_path}/mirror")
    # With this pipe, quick_mirror hangs when it writes state.json.
    (tmp_path / "mirror/a").mkdir(parents=True)
    os.mkfifo(tmp_path / "mirror/a/never-read")
    commit(run, 5)
    with sending(run) as process:
        wait_for("the others", lambda: len(list((tmp_path / "mirror/a/checkpoints/step-00000005").glob("rank-*"))) == 3)
        began = time.monotonic()
        assert end(process, END) == 1
        assert time.monotonic() - began < 10
    (alert,) = event_texts(run, "alert")
    assert "not in the mirror: step 5" in alert
    assert record(run)["missing_steps"] == [5]
    # The command in the alert uploads the rest.
    (tmp_path / "mirror/a/never-read").unlink()
    with sending(run) as process:
        process.communicate(b"", timeout=60)
        assert process.returncode == 0
    assert tree(tmp_path / "mirror/a/checkpoints") == tree(run.checkpoints)


@pytest.mark.parametrize("late_wish", ["a person's", "the time is over"])
def test_without_a_stop_request_the_upload_has_no_deadline(tmp_path: Path, late_wish: str) -> None:
    _, run = make_run(tmp_path, f"file://{tmp_path}/mirror")
    folder = tmp_path / "mirror/a/checkpoints/step-00000005"
    # With this pipe, quick_mirror hangs when it writes state.json.
    (tmp_path / "mirror/a").mkdir(parents=True)
    os.mkfifo(tmp_path / "mirror/a/never-read")
    commit(run, 5)
    grace_s = 0.2
    stopper = Stopper(grace_s, {}, lambda number: None)
    with sending(run) as process:
        wait_for("the others", lambda: len(list(folder.glob("rank-*"))) == 3)
        if late_wish == "the time is over":
            # Leave time for the first report of what is pending and for the final report.
            stopper.kill_at = time.monotonic() + 4 + 2
        waiting = threading.Thread(target=stopper.finish, args=(Sidecar(process, 2.0),))
        waiting.start()
        wait_for("the reason", lambda: event_texts(run, "mirror"))
        assert waiting.is_alive(), "more than the grace has passed"
        # As the signal thread does.
        if late_wish == "a person's":
            stopper._num_cancels += 1
        waiting.join(timeout=25)
        assert not waiting.is_alive()
        assert process.poll() is not None
    (event,) = [e for e in read_events(run.events) if e["kind"] == "mirror"]
    assert "the run waits for the mirror: step 5 is not complete there" in event["text"]
    (alert,) = event_texts(run, "alert")
    assert "not in the mirror: step 5" in alert


def test_answers_do_not_use_the_grace_period_of_a_machine_that_is_taken_back() -> None:
    stopper = Stopper(60.0, {}, lambda number: None)
    stopper.disarm()
    wishes: list[bool] = []

    class Answers:
        def finish(self, until: float, unwanted: Callable[[], bool]) -> None:
            wishes.append(unwanted())
            stopper.request(PREEMPT)
            wishes.append(unwanted())

    stopper.finish(Answers(), uses_grace=False)  # type: ignore[arg-type]
    assert wishes == [False, True]


def test_a_damaged_checkpoint_does_not_block_the_upload_of_the_next(tmp_path: Path) -> None:
    _, run = make_run(tmp_path, f"file://{tmp_path}/mirror")
    for step in (5, 7):
        file = commit(run, step).path / "rank-00001.safetensors"
        file.write_bytes(file.read_bytes()[::-1])
    commit(run, 10)
    with sending(run) as process:
        wait_for("step 10", lambda: record(run)["steps"] == [10])
        assert end(process) == 0
    (alert,) = event_texts(run, "alert")
    assert alert.startswith("step 5 is not sent to the mirror")
    assert any(text.startswith("step 7 is not sent to the mirror") for text in event_texts(run, "mirror"))


def test_uploads_stop_where_another_attempt_owns_the_mirror(tmp_path: Path) -> None:
    _, run = make_run(tmp_path, f"file://{tmp_path}/mirror")
    commit(run, 5)
    with sending(run) as process:
        wait_for("step 5", lambda: record(run)["steps"] == [5])
        shutil.copytree(run.attempt(1), run.attempt(2))
        commit(run, 10)
        wait_for("its end", lambda: process.poll() is not None)
    assert process.returncode == 1
    assert any("uploads to the mirror have stopped" in text for text in event_texts(run, "alert"))
    assert not (tmp_path / "mirror/a/checkpoints/step-00000010/manifest.json").exists()
