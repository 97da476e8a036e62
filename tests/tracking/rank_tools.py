"""Start `rank_in_small.py`, send it commands, and leave no process behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from fake_wandb import KEY, FakeWandb
from forked import ForkedProcess, preloaded
from hand_made import event_texts
from pace import wait_for

from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import run_records, run_store
from launcher.tracking.jsonl import read_events

REPO = Path(__file__).resolve().parents[2]
# The longest that a tracker call may block the training loop.
QUICK_S = 0.5
# W&B's variables for the waits after a failure. By default it sends collected data after 15 s and at its end.
AT_ONCE = {
    **{f"WANDB__{of}_RETRY_WAIT_MIN_SECONDS": "0.1" for of in ("FILE_STREAM", "FILE_TRANSFER", "GRAPHQL")},
    **{f"WANDB__{of}_RETRY_WAIT_MAX_SECONDS": "0.5" for of in ("FILE_STREAM", "FILE_TRANSFER", "GRAPHQL")},
}
# The modules whose import takes most of the start time.
IMPORTED = ("wandb", "wandb.sdk.wandb_run", "psutil", "launcher.tracking.tracker", "launcher.worker.wandb_closing")


class Rank:
    """`RANK.log(1, {...})` calls a tracker method; `slowest_s` is the slowest call, except for start and finish."""

    def __init__(self, process: subprocess.Popen[str] | ForkedProcess, output: Path) -> None:
        self.process, self.output, self.slowest_s = process, output, 0.0

    def order(self, method: str, *arguments: Any, deadline_s: float = 120, **fields: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([method, arguments, fields]) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self._line(deadline_s).removeprefix("answer:"))
        if method in ("log", "event", "summary"):
            self.slowest_s = max(self.slowest_s, answer["seconds"])
        return answer

    def __getattr__(self, method: str) -> Callable[..., dict[str, Any]]:
        return lambda *arguments, **fields: self.order(method, *arguments, **fields)

    def start_and_wait(self) -> dict[str, Any]:
        """Start the trackers, and wait until W&B accepts data."""
        run_dir = self.output.parent
        before, answer = times_begun(run_dir), self.order("start")
        wait_for("W&B to begin", lambda: self.order("event", "note", "still here") and times_begun(run_dir) > before)
        return answer

    def steps(self, first: int, last: int) -> None:
        """Log these steps, each with a loss that identifies the step."""
        for step in range(first, last + 1):
            self.order("log", step, {"trainer/step": float(step), "train/loss": 10.0 - step / 100, "trainer/tokens": 100 * step})

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=20)

    def _line(self, deadline_s: float) -> str:
        assert self.process.stdout is not None
        # A process that does not answer is killed; the line is then empty.
        timer = threading.Timer(deadline_s, self.process.kill)
        timer.start()
        try:
            for line in self.process.stdout:
                if line.startswith("answer:"):
                    return line
        finally:
            timer.cancel()
        raise AssertionError(f"the rank has ended or hung:\n{self.output.read_text()}")


@contextmanager
def rank(
    plan: LaunchPlan,
    attempt: int = 1,
    *,
    automatic: bool = False,
    key: str | None = KEY,
    base_url: str,
    imports: bool = False,
    sends_at_once: bool = True,
) -> Iterator[Rank]:
    """A rank in a separate process with its trackers not yet started; with `imports`, it imports W&B's package itself.

    With `sends_at_once`, W&B's process does not wait for seconds before it sends or retries.
    """
    run = RunDir(Path(plan.run_dir))
    if not run.attempt(attempt).exists():
        run.attempt(attempt).mkdir(parents=True)
        run_store.write_attempt(run, attempt, run_records.Attempt(None, automatic=automatic))
    run.plan.write_text(plan.to_json())
    environ = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environ |= {"WANDB_BASE_URL": base_url, "PYTHONPATH": str(REPO)}
    environ |= {"WANDB_API_KEY": key} if key else {}
    environ |= AT_ONCE if sends_at_once else {}
    output = run.root / "output"
    arguments = (str(run.plan), str(run.root), str(attempt))
    with open(output, "a") as file:
        if imports:
            command = [sys.executable, str(Path(__file__).with_name("rank_in_small.py")), *arguments]
            process: Any = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=file, text=True, env=environ)
        else:
            server = preloaded(*IMPORTED)
            process = server.popen("rank_in_small", *arguments, stdin=-1, stdout=-1, stderr=file.fileno(), text=True, env=environ)
    children: list[psutil.Process] = []
    try:
        yield Rank(process, output)
    finally:
        with suppress(psutil.Error):
            children = psutil.Process(process.pid).children(recursive=True)
        for each in [*children, process]:
            with suppress(psutil.Error):
                each.kill()
        process.wait(timeout=20)
        for stream in (process.stdin, process.stdout):
            with suppress(OSError):
                stream.close()


def wait_for_another_second(run_dir: Path) -> None:
    """Wait for the next second: W&B names its folders by the second, and uploads them in the order of their names."""

    def is_now(folder: Path) -> bool:
        return any(time.strftime("%Y%m%d_%H%M%S", to(time.time())) in folder.name for to in (time.localtime, time.gmtime))

    wait_for("another second", lambda: not any(map(is_now, run_dir.glob("wandb/*run-*"))))


def times_begun(run_dir: Path) -> int:
    """Return how often W&B has started for a rank; a tracker reports a start with its next call."""
    return sum(event["text"].startswith("Weights & Biases: ") for event in read_events(run_dir / "events.jsonl"))


def alerts(plan: LaunchPlan) -> list[str]:
    return event_texts(RunDir(Path(plan.run_dir)))


def infos(plan: LaunchPlan) -> list[str]:
    return event_texts(RunDir(Path(plan.run_dir)), "info")


def has_steps(server: FakeWandb, last: int) -> Callable[[], bool]:
    return lambda: "abcd1234" in server.runs and last in server.run().steps
