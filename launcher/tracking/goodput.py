"""Where the time of a run has gone: steps that were kept, and everything else that machines or people waited for.

Goodput is the time spent on steps that were kept, divided by the time since submission.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from launcher import run_records, run_store
from launcher.errors import LauncherError
from launcher.plan.gpus import Price
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import read_events
from launcher.tracking.metrics_tail import lines_of_time

if TYPE_CHECKING:
    from launcher.plan.launch_plan import LaunchPlan

# Kinds of lost time, by what a person calls them.
LOST = {
    "queue_s": "waiting for machines",
    "start_s": "starting the ranks",
    "load_s": "loading the model",
    "save_s": "waiting for saves",
    "eval_s": "evaluation",
    "restart_s": "failures and restarts",
    "idle_s": "ended, not resumed",
    "replay_s": "steps that were lost",
    "other_s": "everything else",
}
# Fields of the messages by which rank 0 tells how far a start has come.
PHASE, JOINED, LOADED = "phase", "joined", "loaded"


@dataclass(frozen=True)
class Attempt:
    """When an attempt was asked for, when its machines were there, and when it ended; seconds since the epoch.

    `begun_at` None waits for machines, `ended_at` None goes on. `num_ranks` is what its plan says, `num_workers` those that Ray
    holds for it, 0 elsewhere, and `price` what each of them costs, None where that is not known. `automatic` where no person
    asked for it.
    """

    number: int
    submitted_at: float
    begun_at: float | None
    ended_at: float | None
    num_ranks: int
    automatic: bool = True
    num_workers: int = 0
    price: Price | None = None


@dataclass(frozen=True)
class Breakdown:
    """Seconds since submission, in parts that add up to `wall_s`: `kept_s`, and those of LOST.

    `held_s` are seconds in which the run had machines, `gpu_s` the same times the number of its ranks, or of its workers on Ray,
    where some may be idle: `num_workers` are those of the newest attempt. These have cost `usd` dollars, None where a price is
    not known; `assumed_usd` of them by prices that are assumed. `lost_steps` were trained and thrown away.
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
    num_workers: int = 0

    @property
    def goodput(self) -> float:
        """0 to 1."""
        return self.kept_s / self.wall_s if self.wall_s > 0 else 0.0

    def later(self, seconds: float, eval_s: float, save_s: float, num_ranks: int, price: Price | None) -> Breakdown:
        """After further `seconds` of training on `num_ranks` ranks, with so much of evaluation and waiting for saves in them."""
        return replace(
            self.paid(seconds * max(num_ranks, self.num_workers), price),
            wall_s=self.wall_s + seconds,
            kept_s=self.kept_s + max(0.0, seconds - eval_s - save_s),
            eval_s=self.eval_s + eval_s,
            save_s=self.save_s + save_s,
            held_s=self.held_s + seconds,
        )

    def paid(self, gpu_s: float, price: Price | None) -> Breakdown:
        """With so many more seconds of one GPU, at a price."""
        if not gpu_s:
            return self
        spent = replace(self, gpu_s=self.gpu_s + gpu_s)
        if price is None:
            return replace(spent, usd=None)
        usd = gpu_s / 3600 * price.usd_per_gpu_hour
        assumed = usd if price.assumption is not None else 0.0
        return replace(spent, usd=None if self.usd is None else self.usd + usd, assumed_usd=self.assumed_usd + assumed)

    def metrics(self) -> dict[str, float]:
        """Under the names of the design."""
        lost = {f"lost/{name}": getattr(self, name) for name in LOST}
        return {"perf/goodput": self.goodput, "time/kept_s": self.kept_s, **lost, "run/lost_steps": float(self.lost_steps)}


def of_metrics(line: dict[str, Any]) -> Breakdown | None:
    """What a line of metrics.jsonl tells; None where it tells nothing of this."""
    if "perf/goodput" not in line:
        return None
    lost = {name: line.get(f"lost/{name}", 0.0) for name in LOST}
    kept = line["time/kept_s"]
    return Breakdown(kept + sum(lost.values()), kept, **lost, lost_steps=int(line["run/lost_steps"]))


@dataclass(frozen=True)
class _Session:
    """What one start of the ranks has done: `lines` are its metrics; `limit` is the step from which a later one went on."""

    attempt: int
    joined_at: float
    num_ranks: int
    loaded_at: float | None
    from_step: int
    end: float
    limit: float
    lines: Sequence[dict[str, Any]]

    @property
    def trained(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "train/loss" in line]


def breakdown(
    lines: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]], attempts: Sequence[Attempt], now: float
) -> Breakdown:
    """Tell from all lines of metrics.jsonl and events.jsonl, as they were written, where the time until `now` went. Pure."""
    if not attempts:
        return Breakdown()
    parts = dict.fromkeys(("kept_s", *LOST), 0.0)
    spent, held, lost_steps = Breakdown(), 0.0, 0
    before = attempts[0].submitted_at
    sessions = _sessions(lines, events, attempts, now)
    for i, attempt in enumerate(attempts):
        # The clocks of nodes differ: nothing ends before what came before it.
        end = max(_end(attempts, i, now), before)
        begun = end if attempt.begun_at is None else min(max(attempt.begun_at, before), end)
        # What goes on without a person waits for machines from the end before; it may be numbered only when they are there.
        asked = before if attempt.automatic else min(max(attempt.submitted_at, before), begun)
        parts["idle_s"] += asked - before
        parts["queue_s"] += begun - asked
        own = [session for session in sessions if session.attempt == attempt.number]
        # Machines that never came to train, at least not yet, cost the same.
        num_ranks = own[0].num_ranks if own else attempt.num_ranks
        held = held + end - begun
        spent = spent.paid((end - begun) * max(num_ranks, attempt.num_workers), attempt.price)
        parts["start_s"] += max(0.0, (own[0].joined_at if own else end) - begun)
        for session in own:
            lost_steps += _count(session, parts, is_last=session is sessions[-1] and attempt is attempts[-1])
        before = max(before, end)
    wall = before - attempts[0].submitted_at
    parts["other_s"] = max(0.0, wall - sum(parts.values()))
    return replace(spent, wall_s=wall, **parts, held_s=held, lost_steps=lost_steps, num_workers=attempts[-1].num_workers)


def _count(session: _Session, parts: dict[str, float], is_last: bool) -> int:
    """Add the parts of one start of the ranks; returns how many of its steps were lost."""
    if session.loaded_at is None:
        parts["load_s"] += session.end - session.joined_at
        return 0
    parts["load_s"] += session.loaded_at - session.joined_at
    trained = session.trained
    last = trained[-1] if trained else {"time": session.loaded_at, "trainer/step": session.from_step}
    evals = sum(line.get("time/eval_s", 0.0) for line in session.lines)
    stalls = sum(line.get("ckpt/stall_s", 0.0) for line in session.lines)
    inside = sum(
        line.get("time/eval_s", 0) + line.get("ckpt/stall_s", 0) for line in session.lines if line["time"] <= last["time"]
    )
    parts["eval_s"] += evals
    parts["save_s"] += stalls
    steps = last["trainer/step"] - session.from_step
    lost = min(steps, max(0, last["trainer/step"] - session.limit))
    worked = max(0.0, last["time"] - session.loaded_at - inside)
    replayed = worked * lost / steps if steps else 0.0
    parts["kept_s"] += worked - replayed
    parts["replay_s"] += replayed
    if not is_last:
        parts["restart_s"] += max(0.0, session.end - last["time"] - (evals + stalls - inside))
    return int(lost)


def _sessions(
    lines: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]], attempts: Sequence[Attempt], now: float
) -> list[_Session]:
    """All starts of the ranks, oldest first."""
    found: list[_Session] = []
    for i, attempt in enumerate(attempts):
        end = _end(attempts, i, now)
        told = [e for e in events if e["attempt"] == attempt.number and PHASE in e["fields"] and e["time"] <= end]
        joined = [e for e in told if e["fields"][PHASE] == JOINED]
        written = [line for line in lines if line["attempt"] == attempt.number and line["time"] <= end]
        begins = [*(event["time"] for event in joined), end]
        for event, at, until in zip(joined, begins, begins[1:], strict=False):
            loaded = next((e for e in told if e["fields"][PHASE] == LOADED and at <= e["time"] <= until), None)
            own = [line for line in written if at <= line["time"] <= until]
            loaded_at, from_step = (None, 0) if loaded is None else (loaded["time"], loaded["step"])
            ranks = event["fields"]["ranks"]
            found.append(_Session(attempt.number, at, ranks, loaded_at, from_step, until, math.inf, own))
    limit = math.inf
    for i in reversed(range(len(found))):
        found[i] = replace(found[i], limit=limit)
        if found[i].loaded_at is not None:
            limit = min(limit, found[i].from_step)
    return found


def _end(attempts: Sequence[Attempt], i: int, now: float) -> float:
    """When attempt number i ended: it holds no machines any more where the next one has begun."""
    following = next((a.begun_at for a in attempts[i + 1 :] if a.begun_at is not None), now)
    ended = attempts[i].ended_at
    return min(now, following, now if ended is None else ended)


def recorded(run: RunDir, coming: LaunchPlan | None = None) -> list[Attempt]:
    """The attempts as they are written down, without an end where none has left word of it; `coming` is the plan of the next.

    Each costs what its own plan says. Where that plan knows no price, or a typical one and a later plan for the same type of GPU
    says what it is, the later one counts.
    """
    found, plan = [], run.plan
    prices: list[tuple[str | None, Price | None]] = []
    for number in run_store.attempt_numbers(run):
        own_plan = run.attempt(number) / "plan.json"
        plan = own_plan if own_plan.is_file() else plan
        known = run_store.read_attempt(run, number)
        if known.submitted_at is None:
            continue
        record = run_records.read_exit(run, number)
        ended = None if record is None else record.ended_at
        values = run_store.read_plan_values(plan)
        num_ranks = values["topology"]["world_size"]
        prices.append((values["config"]["cluster"].get("gpu_type"), Price.of_plan(values)))
        workers = known.num_workers or 0
        found.append(Attempt(number, known.submitted_at, known.begun_at, ended, num_ranks, known.automatic, workers))
    later_type, later = (None, None) if coming is None else (coming.config.cluster.gpu_type, coming.price)
    for i in reversed(range(len(found))):
        gpu_type, price = prices[i]
        is_known_later = later is not None and later.assumption is None and later_type == gpu_type
        if price is None or (price.assumption is not None and is_known_later):
            price = later
        found[i], later_type, later = replace(found[i], price=price), gpu_type, price
    return found


def settled(
    attempts: Sequence[Attempt], state: str, lines: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]
) -> list[Attempt]:
    """The recorded attempts of a run in this state, each with its end, and the one that the run waits to begin.

    One that has left no word of its end ended at its last sign of life. Only the newest may go on: in a run that is pending it
    waits for machines, or has lost its own.
    """
    found, runs = list(attempts), state in run_records.RUNNING_STATES
    for i, attempt in enumerate(found):
        goes_on = runs and i == len(found) - 1 and (state != "pending" or attempt.begun_at is None)
        if attempt.ended_at is None and not goes_on:
            seen = (line["time"] for line in (*lines, *events) if line["attempt"] == attempt.number)
            found[i] = replace(attempt, ended_at=max(seen, default=attempt.begun_at or attempt.submitted_at))
    if runs and found and (ended := found[-1].ended_at) is not None:
        waits = replace(found[-1], submitted_at=ended, begun_at=None, ended_at=None, automatic=True)
        found.append(replace(waits, number=waits.number + 1))
    return found


def read(run: RunDir, now: float, state: str = "running", coming: LaunchPlan | None = None) -> Breakdown:
    """Where the time of the run, which is in this state, went until `now`, in seconds since the epoch.

    `coming` is the plan of an attempt that is to follow. Of the metrics only those lines are read that are needed.
    """
    events, attempts = read_events(run.events), recorded(run, coming)
    joined = [event["time"] for event in events if event["fields"].get(PHASE) == JOINED]
    borders = [at for attempt in attempts for at in (attempt.begun_at, attempt.ended_at) if at is not None]
    lines = lines_of_time(run.metrics, [*joined, *borders])
    return breakdown(lines, events, settled(attempts, state, lines, events), now)


def cost(plan: LaunchPlan, spent: Breakdown, tokens: int) -> dict[str, float]:
    """GPU hours (on CPUs those of ranks) and dollars of the whole run, whose plan is now `plan`, in which `tokens` were trained.

    Nothing on CPUs without a price.
    """
    hours = spent.gpu_s / 3600
    if plan.price is None and plan.topology.device == "cpu":
        return {}
    if plan.price is None or spent.usd is None:
        return {"cost/gpu_hours": hours}
    return {"cost/gpu_hours": hours, "cost/usd": spent.usd, "cost/usd_per_million_tokens": spent.usd / max(tokens, 1) * 1e6}


def spent_limit(plan: LaunchPlan, spent: Breakdown) -> str:
    """Which limit of the run is reached, in words; empty where it may go on."""
    limits, config = plan.limits, plan.config.run
    if config.max_usd is not None and spent.usd is not None and spent.usd >= config.max_usd:
        return f"run.max_usd={config.max_usd:g} is reached after {spent.gpu_s / 3600:,.2f} GPU hours"
    if spent.held_s >= (limits.max_seconds or math.inf):
        return f"run.max_hours={config.max_hours:g} is reached"
    return ""


def reached_limit(run: RunDir, plan: LaunchPlan, now: float) -> str:
    """Which limit a run that does not train now has reached, in words; empty where it may go on, or where that cannot be told."""
    if plan.limits.max_seconds is None and plan.limits.max_gpu_seconds is None:
        return ""
    try:
        return spent_limit(plan, read(run, now, "pending"))
    except (OSError, LauncherError, KeyError, TypeError, ValueError):
        # The ranks look again, and tell that they cannot read it.
        return ""
