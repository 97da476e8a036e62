"""The progress of long operations: log lines at growing intervals, a live line on a terminal, events of a run."""

from __future__ import annotations

import itertools
import os
import pty
import subprocess
import sys
import threading
import time

import pytest

from launcher.tracking import progress
from launcher.tracking.progress import ByteProgress, Pace

GIB = 2**30


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_at_growing_intervals_and_not_for_short_work() -> None:
    clock, lines = Clock(), []
    counter = ByteProgress("loading", 3600 * GIB, lines.append, Pace(clock))
    written_at = []
    for _ in range(3600):
        clock.now += 1
        counter.advance(GIB)
        if len(lines) > len(written_at):
            written_at.append(clock.now - 100)
    assert written_at[:5] == [5, 10, 15, 20, 27]
    assert 20 <= len(lines) <= 35
    assert max(b - a for a, b in itertools.pairwise(written_at)) <= 300
    assert lines[0] == "loading: 5.00 GiB of 3,600.00 GiB (0%), 59m55s left"
    assert lines[3] == "loading: 20.00 GiB of 3,600.00 GiB (1%), 59m40s left"


def test_counted_items_are_shown_with_the_time_left() -> None:
    clock, lines = Clock(), []
    counter = progress.CountProgress("evaluating held-out", "micro-batches", lines.append, Pace(clock))
    for done in range(1, 31):
        clock.now += 1
        counter.show(done, 30)
    assert lines[1] == "evaluating held-out: 10 of 30 micro-batches, 20s left"


@pytest.mark.parametrize(
    ("done", "total", "elapsed_s", "text"),
    [
        (GIB, 4 * GIB, 10, "x: 1.00 GiB of 4.00 GiB (25%), 30s left"),
        (0, 4 * GIB, 10, "x: 0 bytes of 4.00 GiB (0%)"),
        (5 * GIB, 4 * GIB, 10, "x: 4.00 GiB of 4.00 GiB (100%)"),
        (3 * GIB, 0, 10, "x: 3.00 GiB"),
    ],
)
def test_the_text(done: int, total: int, elapsed_s: float, text: str) -> None:
    assert progress.describe("x", done, total, elapsed_s) == text


@pytest.mark.parametrize(("done", "total", "is_known"), [(1, 20_000, False), (10, 20_000, True), (1, 4, True)])
def test_the_first_of_many_items_do_not_predict_the_rest(done: int, total: int, is_known: bool) -> None:
    assert bool(progress.time_left(done, total, 10)) == is_known


def test_documents_have_a_time_left_that_counts_what_was_done_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, "Pace", lambda: Pace(clock))
    with progress.show_documents("rows") as show:
        show("pass 1 of 2", 50, 100)
        clock.now += 10
        show("pass 1 of 2", 60, 100)
        clock.now += 40
        show("pass 1 of 2", 100, 100)
    assert capsys.readouterr().err == "pass 1 of 2: 60 of 100 rows, 40s left\npass 1 of 2: 100 of 100 rows\n"


def test_something_that_does_not_tell_how_far_it_is_is_seen_to_work() -> None:
    said = threading.Event()
    lines: list[str] = []

    def say(text: str) -> None:
        lines.append(text)
        said.set()

    with progress.say_that_it_works("pushing 3 GiB", say, progress.Pace(first_s=0.0, longest_s=0.1)):
        assert said.wait(60)
    num_lines = len(lines)
    time.sleep(0.3)
    assert lines[0] == "pushing 3 GiB: 0s so far"
    assert len(lines) == num_lines, "nothing is said after the end"


def test_a_terminal_gets_one_live_line_that_disappears() -> None:
    code = (
        "from launcher.tracking.progress import show_progress\nimport time\n"
        "with show_progress() as make:\n    advance = make('exporting', 100)\n"
        "    for _ in range(4):\n        advance(25); time.sleep(0.3)\nprint('done')"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=environment())
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 4096):
            shown += block
    except OSError:
        pass  # a terminal that closes raises this
    os.close(ours)
    assert process.wait(timeout=60) == 0, shown
    assert b"exporting: 50 bytes of 100 bytes (50%)" in shown
    last = shown.split(b"\x1b[2K")[-1]
    assert b"done" in last, "the live line was erased"
    assert b"exporting" not in last


def test_a_log_gets_no_escape_sequences() -> None:
    code = (
        "from functools import partial\nfrom launcher.tracking import progress\n"
        "progress.Pace = partial(progress.Pace, longest_s=0.0)\n"
        "with progress.show_progress() as make:\n    advance = make('exporting', 100)\n    advance(25)\n    advance(75)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60)
    assert done.stderr == "exporting: 25 bytes of 100 bytes (25%)\nexporting: 100 bytes of 100 bytes (100%)\n"


def environment() -> dict[str, str]:
    return {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
