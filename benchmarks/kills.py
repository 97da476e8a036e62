"""Kill the ranks of one run repeatedly at random moments; it must train exactly the same as an undisturbed run.

    python benchmarks/kills.py [--kills N] [--seed N] [overrides of the launcher]

Two ranks on this machine train a tiny model that saves every few steps. A random rank is killed while the ranks start and load,
while a checkpoint is written, and while they train; sometimes the other rank is also killed while it is being terminated. Then
the loss, gradient norm and rows of every trained step are compared with those of an undisturbed run with the same settings.
Writes a table into RESULTS.md. Exits with 1 and keeps the folder if the run failed or anything differs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

import psutil
import sides

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "e2e"))

import killed_runs
from e2e_tools import agent_of, kill_all_of, status
from killed_runs import Hit, Kill, Killer

REPO = Path(__file__).resolve().parents[1]
SAVE_EVERY = 4
RANKS = 2
# Restarts allowed beyond the kills; each one is reported.
SPARE_RESTARTS = 20
# Time allowed from the last kill to the end, and for the undisturbed run.
LOAD_S, STEP_S = 120.0, 2.0
SETTINGS = (
    *("model=tiny", "data=jsonl", "data.max_length=64", "data.eval_fraction=0", "data.packing=false"),
    *("train.global_batch_size=4", "train.micro_batch_size=1", "eval.sample=false", "export.enabled=false", "optim.lr=1e-3"),
    *("optim.schedule=constant", f"checkpoint.save_every={SAVE_EVERY}", "checkpoint.keep_last=2", "tracking=none"),
    f"cluster.ranks_per_node={RANKS}",
)


@dataclass(frozen=True)
class Killed:
    """Outcome of the run: the kills carried out, why they stopped early, and the command's exit code."""

    hits: list[Hit]
    stopped: str
    exit_code: int | None
    num_files: tuple[int, int]


def main() -> int:
    parser = sides.parser(__doc__, rounds=None)
    parser.add_argument("--kills", type=int, default=200, help="ranks to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and ranks")
    args, overrides = parser.parse_known_args()
    if args.kills < 1:
        parser.error("--kills must be at least 1")
    folder = Path(tempfile.mkdtemp(prefix="launcher-kills-"))
    kills = killed_runs.draw_kills(args.seed, args.kills, RANKS, SAVE_EVERY)
    num_steps = killed_runs.steps_for(kills, SAVE_EVERY)
    write_rows(folder / "rows.jsonl")
    settings = [*SETTINGS, f"data.path={folder / 'rows.jsonl'}", f"run.root={folder}", f"train.max_steps={num_steps}"]
    settings += [f"cluster.max_restarts={args.kills + SPARE_RESTARTS}", *overrides]
    deadline_s = LOAD_S + STEP_S * num_steps
    try:
        killed = kill_one_after_another(folder, settings, kills, deadline_s)
        problems = judge(folder, settings, killed, num_steps, deadline_s)
    finally:
        kill_all_of(folder)
    command = sides.typed("kills.py", "--kills", args.kills, "--seed", args.seed, *overrides)
    table = report(folder / "killed", killed, num_steps, problems)
    title = f"{len(killed.hits)} kills of ranks of one run"
    sides.record(args.results, "kills", title, "From one `python -m launcher train` (its metrics.jsonl).", command, table)
    if problems:
        print("\n".join(problems), f"\nlook into {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


def write_rows(file: Path) -> None:
    """Write 61 distinct rows, a number for which batches of four do not repeat between epochs."""
    words = ["north", "south", "east", "west", "spring", "summer", "autumn", "winter"]
    rows = [
        {"text": f"{row} " + " ".join(words[(row * step + step) % 8] for step in range(1, 30 + row % 5))} for row in range(61)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def start(folder: Path, name: str, settings: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a run whose ranks record the rows they receive in the folder NAME-rows."""
    (folder / f"{name}-rows").mkdir()
    path = f"{REPO / 'tests/e2e/rows_seen'}:{REPO}"
    environment = {**os.environ, "PYTHONPATH": path, "ROWS_SEEN": str(folder / f"{name}-rows"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launcher", *settings, f"run.name={name}"]
    with open(folder / f"{name}.log", "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=REPO, env=environment)


def kill_one_after_another(folder: Path, settings: Sequence[str], kills: Sequence[Kill], deadline_s: float) -> Killed:
    """Start the run, carry out the kills, and wait for its end."""
    run, hits, stopped = folder / "killed", list[Hit](), ""
    process = start(folder, "killed", settings)
    killer = Killer(run, lambda: process.poll() is not None)
    first = last = 0
    try:
        for kill in kills:
            hits.append(killer.carry_out(kill))
            with suppress(psutil.NoSuchProcess):
                last = agent_of(run).num_fds()
            first = first or last
            print(f"kill {len(hits)}: rank {kill.rank}, {kill.moment}, at step {hits[-1].step}", file=sys.stderr, flush=True)
        process.wait(deadline_s)
    except AssertionError as error:
        stopped = str(error)
    except subprocess.TimeoutExpired:
        stopped = f"the run did not end within {deadline_s:.0f} s of the last kill"
    finally:
        if process.poll() is None and stopped:
            process.terminate()
    return Killed(hits, stopped, process.poll(), (first, last))


def judge(folder: Path, settings: Sequence[str], killed: Killed, num_steps: int, deadline_s: float) -> list[str]:
    """Return the problems found; empty if the run trained the same as an undisturbed one."""
    run = folder / "killed"
    log = (folder / "killed.log").read_text(errors="replace")[-1500:]
    if killed.stopped:
        return [killed.stopped, log]
    if killed.exit_code or status(run)["state"] != "completed":
        return [f"the run ended with exit code {killed.exit_code}: {status(run)['message']}", log]
    if start(folder, "undisturbed", settings).wait(deadline_s):
        return ["the undisturbed run failed", (folder / "undisturbed.log").read_text(errors="replace")[-1500:]]
    problems = killed_runs.differences(run, folder / "undisturbed")
    rows = (folder / "killed-rows", folder / "undisturbed-rows")
    return problems + killed_runs.row_differences(*rows, RANKS, num_steps)


def report(run: Path, killed: Killed, num_steps: int, problems: Sequence[str]) -> list[str]:
    moments = Counter(hit.kill.moment for hit in killed.hits)
    reasons = killed_runs.restart_reasons(run)
    other = Counter(reason for reason in reasons if "killed by SIGKILL" not in reason)
    both = sum(hit.kill.other_after_s is not None for hit in killed.hits)
    parts = killed_runs.restart_parts(run, killed.hits)
    times = [time for time in parts["whole"] if time]
    rows = [
        f"| kills | {len(killed.hits)}: {', '.join(f'{moments[name]} {name}' for name in killed_runs.MOMENTS)} |",
        f"| of these, the other rank as well within 0.5 s | {both} |",
        f"| restarts | {len(reasons)} |",
        f"| restarts that name another cause | {sum(other.values())}{''.join(f'; {reason}' for reason in other)} |",
        f"| steps | {num_steps} |",
        f"| open files of the agent, after the first and the last kill | {killed.num_files[0]}, {killed.num_files[1]} |",
    ]
    if len(times) > 1:
        low, *_, high = quantiles(times, n=10)
        rows.append(f"| restarts that came to a step | {len(times)}, 80% of them in {low:.1f} to {high:.1f} s |")
    rows += [
        f"| s from the kill to the next step{', median' if name == 'whole' else f': {name}'} | {seconds:.2f} |"
        for name, seconds in killed_runs.median_parts(parts).items()
    ]
    rows.append(f"| loss, gradient norm and rows of every step | {'DIFFERENT or not there' if problems else 'the same'} |")
    return ["| what | |", "|---|---|", *rows]


if __name__ == "__main__":
    began = time.monotonic()
    code = main()
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    sys.exit(code)
