"""Goodput, the time of the steps that a run kept divided by the time since submission: where the rest went, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from launcher.errors import LauncherError
from launcher.plan.gpu_types import Price
from launcher.plan.run_dir import RunDir
from launcher.runs import journal, run_store
from launcher.runs.journal import StatusChanged
from launcher.runs.run_records import RUNNING_STATES, Attempt
from launcher.tracking.jsonl import Line, read_events
from launcher.tracking.run_metrics import read_time_lines

if TYPE_CHECKING:
    from launcher.plan.launch_plan import LaunchPlan
    from launcher.plan.throughput import SpeedEstimate

# Kinds of lost time and their labels.
LOST = {
    "queue_s": "waiting for machines",
    "start_s": "starting the ranks",
    "load_s": "loading the model",
    "save_s": "waiting for saves",
    "eval_s": "evaluation",
    "restart_s": "failures and restarts",
    "idle_s": "stopped until resumed",
    "replay_s": "lost steps",
    "other_s": "everything else",
}
# The field of rank 0's events that marks the phases of a start, and its values.
PHASE, JOINED, LOADED = "phase", "joined", "loaded"


@dataclass(frozen=True)
class AttemptTimes:
    """Times and size of an attempt; times are seconds since the epoch.

    `begun_at` is when its machines were allocated, None while it waits for them. `ended_at` is None while it runs. `automatic`:
    the launcher, not a person, started it. `price` is that of a rank, None if unknown.
    """

    number: int
    submitted_at: float
    begun_at: float | None
    ended_at: float | None
    num_ranks: int
    automatic: bool = True
    price: Price | None = None


@dataclass(frozen=True)
class Breakdown:
    """Seconds since submission, in parts that add up to `wall_s`: `kept_s`, and those of LOST.

    Attributes:
        held_s: seconds in which the run had machines.
        gpu_s: the same times the number of ranks, or of Ray's workers, of which some may be idle.
        usd: cost of `gpu_s` in US dollars; None if a price is unknown.
        assumed_usd: the part of `usd` at typical prices.
        lost_steps: steps that were trained and discarded.
    """

    wall_s: float = 0.0
    kept_s: float = 0.0
    queue_s: float = 0.0
    start_s: float = 0.0
    load_s: float = 0.0
    save_s: float = 0.0
    eval_s: float = 0.0
    restart_s: float = 0.0
    idle_s: float = 0.0
    replay_s: float = 0.0
    other_s: float = 0.0
    held_s: float = 0.0
    gpu_s: float = 0.0
    usd: float | None = 0.0
    assumed_usd: float = 0.0
    lost_steps: int = 0

    @property
    def goodput(self) -> float:
        """Time of kept steps as a fraction (0 to 1) of the time since submission."""
        return self.kept_s / self.wall_s if self.wall_s > 0 else 0.0

    def add_training(self, seconds: float, eval_s: float, save_s: float, num_ranks: int, price: Price | None) -> Breakdown:
        """Return the breakdown after further `seconds` of training on `num_ranks` ranks, `eval_s` and `save_s` of them lost."""
        return replace(
            self.add_gpu_time(seconds * num_ranks, price),
            wall_s=self.wall_s + seconds,
            kept_s=self.kept_s + max(0.0, seconds - eval_s - save_s),
            eval_s=self.eval_s + eval_s,
            save_s=self.save_s + save_s,
            held_s=self.held_s + seconds,
        )

    def add_gpu_time(self, gpu_s: float, price: Price | None) -> Breakdown:
        """Return the breakdown with the cost of `gpu_s` more GPU seconds."""
        if not gpu_s:
            return self
        spent = replace(self, gpu_s=self.gpu_s + gpu_s)
        if price is None:
            return replace(spent, usd=None)
        usd = gpu_s / 3600 * price.usd_per_gpu_hour
        assumed = usd if price.assumption is not None else 0.0
        return replace(spent, usd=None if self.usd is None else self.usd + usd, assumed_usd=self.assumed_usd + assumed)

    def metrics(self) -> dict[str, float]:
        """Return the breakdown as metrics."""
        lost = {f"lost/{name}": getattr(self, name) for name in LOST}
        return {"perf/goodput": self.goodput, "time/kept_s": self.kept_s, **lost, "run/lost_steps": float(self.lost_steps)}


@dataclass(frozen=True)
class _RankStart:
    """One start of the ranks: `lines` are its metrics; `limit` is the step from which a later start continued."""

    attempt: int
    joined_at: float
    num_ranks: int
    loaded_at: float | None
    from_step: int
    end: float
    limit: float
    lines: Sequence[Line]

    def add_to(self, parts: dict[str, float], is_last: bool) -> int:
        """Add the parts of its time to `parts`; return the number of its steps that were lost."""
        if self.loaded_at is None:
            parts["load_s"] += self.end - self.joined_at
            return 0
        parts["load_s"] += self.loaded_at - self.joined_at
        last: Line = {"time": self.loaded_at, "trainer/step": self.from_step}
        last = next((line for line in reversed(self.lines) if "train/loss" in line), last)
        evals = sum(line.get("time/eval_s", 0.0) for line in self.lines)
        stalls = sum(line.get("ckpt/stall_s", 0.0) for line in self.lines)
        inside = sum(
            line.get("time/eval_s", 0) + line.get("ckpt/stall_s", 0) for line in self.lines if line["time"] <= last["time"]
        )
        parts["eval_s"] += evals
        parts["save_s"] += stalls
        steps = last["trainer/step"] - self.from_step
        lost = min(steps, max(0, last["trainer/step"] - self.limit))
        worked = max(0.0, last["time"] - self.loaded_at - inside)
        replayed = worked * lost / steps if steps else 0.0
        parts["kept_s"] += worked - replayed
        parts["replay_s"] += replayed
        if not is_last:
            parts["restart_s"] += max(0.0, self.end - last["time"] - (evals + stalls - inside))
        return int(lost)


def break_down(lines: Sequence[Line], events: Sequence[Line], attempts: Sequence[AttemptTimes], now: float) -> Breakdown:
    """Return where the time until `now` went, from all lines of metrics.jsonl and events.jsonl as written. Pure."""
    if not attempts:
        return Breakdown()
    parts = dict.fromkeys(("kept_s", *LOST), 0.0)
    spent, held, lost_steps = Breakdown(), 0.0, 0
    before = attempts[0].submitted_at
    starts = _find_starts(lines, events, attempts, now)
    for i, attempt in enumerate(attempts):
        # Node clocks differ: an attempt never ends before its predecessor.
        end = max(_end(attempts, i, now), before)
        started_at = end if attempt.begun_at is None else min(max(attempt.begun_at, before), end)
        # An automatic attempt queues from its predecessor's end; it may get its number only when it has machines.
        queued_at = before if attempt.automatic else min(max(attempt.submitted_at, before), started_at)
        parts["idle_s"] += queued_at - before
        parts["queue_s"] += started_at - queued_at
        own = [start for start in starts if start.attempt == attempt.number]
        # Machines cost the same before the ranks have joined.
        num_ranks = own[0].num_ranks if own else attempt.num_ranks
        held = held + end - started_at
        spent = spent.add_gpu_time((end - started_at) * num_ranks, attempt.price)
        parts["start_s"] += max(0.0, (own[0].joined_at if own else end) - started_at)
        for start in own:
            lost_steps += start.add_to(parts, is_last=start is starts[-1] and attempt is attempts[-1])
        before = max(before, end)
    wall = before - attempts[0].submitted_at
    parts["other_s"] = max(0.0, wall - sum(parts.values()))
    return replace(spent, wall_s=wall, **parts, held_s=held, lost_steps=lost_steps)


def _find_starts(lines: Sequence[Line], events: Sequence[Line], attempts: Sequence[AttemptTimes], now: float) -> list[_RankStart]:
    """Return all starts of the ranks, oldest first."""
    starts: list[_RankStart] = []
    for i, attempt in enumerate(attempts):
        end = _end(attempts, i, now)
        phases = [e for e in events if e["attempt"] == attempt.number and PHASE in e["fields"] and e["time"] <= end]
        joined = [e for e in phases if e["fields"][PHASE] == JOINED]
        own_lines = [line for line in lines if line["attempt"] == attempt.number and line["time"] <= end]
        begins = [*(event["time"] for event in joined), end]
        for event, at, until in zip(joined, begins, begins[1:], strict=False):
            loaded = next((e for e in phases if e["fields"][PHASE] == LOADED and at <= e["time"] <= until), None)
            own = [line for line in own_lines if at <= line["time"] <= until]
            loaded_at, from_step = (None, 0) if loaded is None else (loaded["time"], loaded["step"])
            ranks = event["fields"]["ranks"]
            starts.append(_RankStart(attempt.number, at, ranks, loaded_at, from_step, until, math.inf, own))
    limit = math.inf
    for i in reversed(range(len(starts))):
        starts[i] = replace(starts[i], limit=limit)
        if starts[i].loaded_at is not None:
            limit = min(limit, starts[i].from_step)
    return starts


def _end(attempts: Sequence[AttemptTimes], i: int, now: float) -> float:
    """Return when attempt i released its machines: at its end, or when the next attempt began."""
    following = next((a.begun_at for a in attempts[i + 1 :] if a.begun_at is not None), now)
    ended_at = attempts[i].ended_at
    return min(now, following, now if ended_at is None else ended_at)


def read_attempt_times(run: RunDir, next_plan: LaunchPlan | None = None) -> list[AttemptTimes]:
    """Return the attempts as recorded, without an end if none was recorded; `next_plan` is the plan of the next attempt.

    Each attempt is priced by its own plan. A later plan for the same GPU type replaces an unknown price, and the plan's own price
    replaces a typical one.
    """
    attempts: list[AttemptTimes] = []
    plan = run_store.read_plan_values(run.plan)
    prices: list[tuple[str | None, Price | None]] = []
    for number in run_store.attempt_numbers(run):
        if (own_plan := run.attempt(number) / "plan.json").is_file():
            plan = run_store.read_plan_values(own_plan)
        if (record := run_store.find_attempt(run, number)) is None:
            # Without attempt.json, the attempt is paid for from when its journal says that it ran.
            states = journal.read_kind(StatusChanged, run, number, "attempt")
            began_at = next((event.at for event in states if event.status.state == "running"), None)
            record = Attempt(None, submitted_at=began_at, begun_at=began_at)
        if record.submitted_at is None:
            continue
        exit_record = journal.read_end(run, number)
        ended_at = None if exit_record is None else exit_record.ended_at
        num_ranks = plan["topology"]["world_size"]
        prices.append((plan["config"]["cluster"].get("gpu_type"), Price.of_plan(plan)))
        times = (record.submitted_at, record.begun_at, ended_at)
        attempts.append(AttemptTimes(number, *times, num_ranks, record.automatic))
    later_type, later_price = (None, None) if next_plan is None else (next_plan.config.cluster.gpu_type, next_plan.price)
    for i in reversed(range(len(attempts))):
        gpu_type, price = prices[i]
        is_known_later = later_price is not None and later_price.assumption is None and later_type == gpu_type
        if price is None or (price.assumption is not None and is_known_later):
            price = later_price
        attempts[i], later_type, later_price = replace(attempts[i], price=price), gpu_type, price
    return attempts


def complete_attempts(
    attempts: Sequence[AttemptTimes], state: str, lines: Sequence[Line], events: Sequence[Line]
) -> list[AttemptTimes]:
    """Return the recorded attempts of a run in `state`, each with its end, plus the next attempt if the run is queued for it.

    An attempt without a recorded end ended with its last line in the files. Only the newest attempt may still be running; in a
    pending run, it waits for machines or has lost them.
    """
    completed, is_running = list(attempts), state in RUNNING_STATES
    for i, attempt in enumerate(completed):
        goes_on = is_running and i == len(completed) - 1 and (state != "pending" or attempt.begun_at is None)
        if attempt.ended_at is None and not goes_on:
            times = (line["time"] for line in (*lines, *events) if line["attempt"] == attempt.number)
            completed[i] = replace(attempt, ended_at=max(times, default=attempt.begun_at or attempt.submitted_at))
    if is_running and completed and (ended_at := completed[-1].ended_at) is not None:
        queued = replace(completed[-1], submitted_at=ended_at, begun_at=None, ended_at=None, automatic=True)
        completed.append(replace(queued, number=queued.number + 1))
    return completed


def read(
    run: RunDir, now: float, state: str = "running", next_plan: LaunchPlan | None = None, *, only_cost: bool = False
) -> Breakdown:
    """Return where the time of a run in `state` went until `now` (see launcher.clock), from its files.

    `next_plan` is the plan of an attempt that will follow. Only the lines of metrics.jsonl that matter are decoded; none of them
    with `only_cost`, if the ends of all attempts are recorded: only `wall_s`, `held_s`, `gpu_s` and the dollars are then right.
    """
    attempts = read_attempt_times(run, next_plan)
    # An attempt without a recorded end ended with its last event.
    needs_all = any(attempt.ended_at is None for attempt in attempts)
    events = read_events(run.events, "" if needs_all else PHASE)
    joined = [event["time"] for event in events if event["fields"].get(PHASE) == JOINED]
    boundaries = [at for attempt in attempts for at in (attempt.begun_at, attempt.ended_at) if at is not None]
    lines = read_time_lines(run.metrics, [*joined, *boundaries]) if needs_all or not only_cost else []
    # The clock of the machine that reads them may be behind.
    now = max([now, *boundaries, *(line["time"] for line in (*lines, *events))])
    return break_down(lines, events, complete_attempts(attempts, state, lines, events), now)


# Money: spent, expected, and for requests


def compute_cost(plan: LaunchPlan, spent: Breakdown, tokens: int) -> dict[str, float]:
    """Return GPU hours (rank hours on CPUs) and US dollars of the whole run, in which `tokens` were trained, as metrics.

    `plan` is the newest plan. Empty on CPUs without a price.
    """
    hours = spent.gpu_s / 3600
    if plan.price is None and plan.topology.device == "cpu":
        return {}
    if plan.price is None or spent.usd is None:
        return {"cost/gpu_hours": hours}
    return {"cost/gpu_hours": hours, "cost/usd": spent.usd, "cost/usd_per_million_tokens": spent.usd / max(tokens, 1) * 1e6}


def spent_limit(plan: LaunchPlan, spent: Breakdown) -> str:
    """Return which limit of the run is reached; empty if none is."""
    limits, config = plan.limits, plan.config.run
    if config.max_usd is not None and spent.usd is not None and spent.usd >= config.max_usd:
        return f"run.max_usd={config.max_usd:g} is reached after {spent.gpu_s / 3600:,.2f} GPU hours"
    if spent.held_s >= (limits.max_seconds or math.inf):
        return f"run.max_hours={config.max_hours:g} is reached"
    return ""


def reached_limit(run: RunDir, plan: LaunchPlan, now: float) -> str:
    """Return which limit a run that is not training has reached; empty if none, or if its files are unreadable."""
    if plan.limits.max_seconds is None and plan.limits.max_gpu_seconds is None:
        return ""
    try:
        return spent_limit(plan, read(run, now, "pending"))
    except (OSError, LauncherError, KeyError, TypeError, ValueError):
        # The ranks check again, and send an alert if they cannot read it.
        return ""


def largest_usd(plan: LaunchPlan, speed: SpeedEstimate) -> float | None:
    """Return the maximum cost that is expected for a run, or that it is limited to, or None if unknown."""
    limits = [plan.config.run.max_usd, None if speed.usd is None else speed.usd[1]]
    if plan.price is not None and plan.config.run.max_hours is not None:
        limits.append(plan.config.run.max_hours * plan.price.usd_per_gpu_hour * plan.topology.world_size)
    return min((usd for usd in limits if usd is not None), default=None)
