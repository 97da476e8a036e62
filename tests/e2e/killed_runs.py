"""Kill ranks of a local run at random moments, and compare what it trained with an undisturbed run.

Used by tests and by benchmarks/kills.py.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from e2e_tools import agent_of, by_rank
from pace import slowness
from steps import start_of_process

from launcher.tracking.jsonl import Tail, iter_lines, read_events
from launcher.train.previous_failure import RESTART

# The moments at which a rank is killed, with their relative frequencies: while ranks load, just after they start, while a
# checkpoint is written, after some steps.
MOMENTS = {"loading": 15, "started": 15, "saving": 20, "training": 50}
# Values that must be bitwise identical in each step, however often it was trained.
COMPARED = ("train/loss", "train/grad_norm", "train/lr", "trainer/epoch", "trainer/tokens")
_POLL_S = 0.02
_LOADING_S = 8.0
_STARTED_S = 0.5
_SAVING_S = 0.2
# Steps that a fast run may make before a kill takes effect.
_REACTION_STEPS = {"training": 2, "saving": 6}
_MOST_SHOWN = 5


@dataclass(frozen=True)
class Kill:
    """A rank to kill: at its `moment`, after `steps` steps since the ranks last started (0: before the first step).

    `fraction` is how far into the moment. `other_after_s` seconds later the other ranks are killed too, if they still run.
    `signal` is the signal that kills the rank.
    """

    moment: str
    rank: int
    steps: int
    fraction: float
    other_after_s: float | None
    signal: signal.Signals = signal.SIGKILL


@dataclass(frozen=True)
class Hit:
    """A rank that was killed: `at` is in seconds since the epoch, `step` is the last step in the metrics."""

    kill: Kill
    at: float
    step: int


def draw_kills(seed: int, num_kills: int, num_ranks: int, save_every: int) -> list[Kill]:
    """Draw random kills; those that wait for steps usually leave the run time to save in between."""
    draw = random.Random(seed)
    kills = []
    for _ in range(num_kills):
        (moment,) = draw.choices([*MOMENTS], [*MOMENTS.values()])
        steps = draw.randint(1, 2 * save_every) if moment in ("saving", "training") else 0
        other = draw.uniform(0, 0.5) if draw.random() < 0.2 else None
        kills.append(Kill(moment, draw.randrange(num_ranks), steps, draw.random(), other))
    return kills


def steps_for(kills: Sequence[Kill], save_every: int) -> int:
    """The steps that the run needs to outlast all kills, with a margin; lost steps are trained again."""
    saved = reached = 0
    for kill in kills:
        reached = max(reached, saved + kill.steps + _REACTION_STEPS.get(kill.moment, 0))
        saved = max(saved, reached // save_every * save_every)
    return saved + 2 * save_every


class Killer:
    """Kills ranks of the run at `run`; `is_over` tells whether the run's command has ended."""

    def __init__(self, run: Path, is_over: Callable[[], bool], deadline_s: float = 180.0) -> None:
        self._run, self._is_over, self._deadline_s = run, is_over, deadline_s
        self._tail = Tail(run / "metrics.jsonl")
        self._lines: list[dict[str, Any]] = []
        self._ended: set[int] = set()
        self._loading_s = _LOADING_S

    def carry_out(self, kill: Kill) -> Hit:
        """Wait for the moment, then kill.

        Raises:
            AssertionError: If the run ends first, or the moment does not come.
        """
        ranks = self._await(f"ranks that start, to kill one while {kill.moment}", self._new_ranks)
        began = min(start_of_process(process.pid) for process in ranks.values())
        if kill.moment in ("started", "loading"):
            self._pass(kill.fraction * (_STARTED_S if kill.moment == "started" else self._loading_s))
        else:
            self._await(f"{kill.steps} steps", lambda: len(self._trained_since(began)) >= kill.steps)
            times = [line["time"] for line in self._trained_since(began)]
            self._loading_s = times[0] - began
            if kill.moment == "saving":
                self._await("a save", lambda: any((self._run / "checkpoints").glob(".saving-*")))
                self._pass(kill.fraction * _SAVING_S)
            else:
                self._pass(kill.fraction * (times[-1] - times[-2] if len(times) > 1 else 0.0))
        steps = [line["trainer/step"] for line in self._trained_since(0)]
        hit = Hit(kill, time.time(), steps[-1] if steps else 0)
        self._kill(ranks.pop(kill.rank), kill.signal)
        if kill.other_after_s is not None:
            self._pass(kill.other_after_s)
            for other in ranks.values():
                self._kill(other)
        self._ended |= {process.pid for process in ranks.values()}
        return hit

    def _kill(self, process: psutil.Process, number: signal.Signals = signal.SIGKILL) -> None:
        self._ended.add(process.pid)
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)

    def _new_ranks(self) -> dict[int, psutil.Process] | None:
        """All ranks of a new start; None if any of them has been killed."""
        with suppress(OSError, KeyError, TypeError, psutil.NoSuchProcess):
            ranks = by_rank(agent_of(self._run).children())
            if len(ranks) > 1 and not self._ended & {process.pid for process in ranks.values()}:
                return ranks
        return None

    def _trained_since(self, at: float) -> list[dict[str, Any]]:
        self._lines += [line for line in self._tail.poll() if "train/loss" in line]
        return [line for line in self._lines if line["time"] > at]

    def _pass(self, seconds: float) -> None:
        """Sleep, unless the run ends."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._is_over():
            time.sleep(min(_POLL_S, max(0.0, until - time.monotonic())))

    def _await(self, what: str, condition: Callable[[], Any]) -> Any:
        began = looked = time.monotonic()
        while not (value := condition()):
            assert not self._is_over(), f"the run ended before there were {what}"
            now = time.monotonic()
            assert now - began < self._deadline_s * slowness(), f"waited {now - began:.0f} s for {what}"
            # Looking at processes takes CPU time from the run.
            time.sleep(max(_POLL_S, 3 * (now - looked)))
            looked = time.monotonic()
        return value


def differences(run: Path, undisturbed: Path) -> list[str]:
    """Describe how the metrics of a run differ from those of an undisturbed run; every line ever written counts."""
    (expected, _), (trained, times) = (_trained(path) for path in (undisturbed, run))
    different = [
        f"step {step}: {name} was {value!r}, undisturbed {expected.get((step, name))!r}"
        for (step, name), values in sorted(trained.items())
        for value in values - expected.get((step, name), set())
    ]
    missing = sorted({step for step, _ in expected} - times.keys())
    return [*different[:_MOST_SHOWN], *([f"steps that were never trained: {missing[:_MOST_SHOWN]}"] if missing else [])]


def _trained(run: Path) -> tuple[dict[tuple[int, str], set[float]], dict[int, int]]:
    """All values of each step and metric, and how often each step was trained."""
    values: dict[tuple[int, str], set[float]] = {}
    times: dict[int, int] = {}
    for line in iter_lines(run / "metrics.jsonl"):
        if "train/loss" in line:
            step = line["trainer/step"]
            times[step] = times.get(step, 0) + 1
            for name in COMPARED:
                values.setdefault((step, name), set()).add(line[name])
    return values, times


def row_differences(rows: Path, undisturbed_rows: Path, num_ranks: int, num_steps: int) -> list[str]:
    """Describe how the rows that the ranks received differ, see rows_seen/; batches prepared but not trained count too."""
    seen, expected = (_rows(folder) for folder in (rows, undisturbed_rows))
    keys = [(step, rank) for step in range(1, num_steps + 1) for rank in range(num_ranks)]
    different = [
        f"step {step}, rank {rank}: rows {sorted(seen.get((step, rank), set()))}, undisturbed {sorted(expected[step, rank])}"
        for step, rank in keys
        if seen.get((step, rank)) != expected[step, rank]
    ]
    return different[:_MOST_SHOWN]


def _rows(folder: Path) -> dict[tuple[int, int], set[tuple[int, ...]]]:
    """All distinct rows of each step, by step and rank."""
    rows: dict[tuple[int, int], set[tuple[int, ...]]] = {}
    for file in folder.glob("*.jsonl"):
        rank = int(file.stem.rpartition("-")[2])
        for line in file.read_text().splitlines():
            # A rank that is killed while writing leaves an incomplete line.
            with suppress(json.JSONDecodeError):
                batch = json.loads(line)
                rows.setdefault((batch["step"], rank), set()).add((*batch["own"], -1, *batch["all"]))
    return rows


def restart_reasons(run: Path) -> list[str]:
    """Why the ranks were restarted, as the alerts say."""
    alerts = [event for event in read_events(run / "events.jsonl") if RESTART in event["fields"]]
    return [str(event["text"]).partition(": ")[2] for event in alerts]


def restart_parts(run: Path, hits: Sequence[Hit]) -> dict[str, list[float]]:
    """Seconds from the kill to the first step, for each restart that reached one, in total and by phase."""
    events = read_events(run / "events.jsonl")
    steps = [line["time"] for line in iter_lines(run / "metrics.jsonl") if "train/loss" in line]
    again = [event["time"] for event in events if RESTART in event["fields"]]
    phases = {
        phase: [event["time"] for event in events if event["fields"].get("phase") == phase] for phase in ("joined", "loaded")
    }
    names = ("the agent notices and ends the others", "ranks start and join", "model, checkpoint, engine", "first step")
    parts: dict[str, list[float]] = {name: [] for name in ("whole", *names)}
    for hit, following in zip(hits, [*(hit.at for hit in hits[1:]), float("inf")], strict=True):
        times = [hit.at]
        for moments in (again, phases["joined"], phases["loaded"], steps):
            times += [moment for moment in moments if times[-1] < moment < following][:1]
        if len(times) == len(names) + 1:
            for name, begin, end in zip(names, times, times[1:], strict=False):
                parts[name].append(end - begin)
            parts["whole"].append(times[-1] - times[0])
    return parts


def median_parts(parts: dict[str, list[float]]) -> dict[str, float]:
    return {name: median(seconds) for name, seconds in parts.items() if seconds}
