"""The W&B tracker, and its session with W&B's process: started, caught up from metrics.jsonl, finished.

Calls of the tracker only queue work for a thread, so that training never waits for W&B. metrics.jsonl is the record of a run: a
session begins by sending the steps that W&B lacks after a crash, a network failure or a killed process, so that each step is sent
exactly once.

`python -m launcher.tracking.wandb.tracker RUN_DIR STEP` sends the verdicts of an evaluation in a session of its own. It prints
one line on what it did, and exits with 0 whatever W&B answers: the verdicts are on disk.
"""

from __future__ import annotations

import json
import math
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import psutil

from launcher.errors import ConfigError, describe
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store
from launcher.runs.run_records import RUNNING_STATES
from launcher.security.redaction import environment_secrets, looks_secret
from launcher.shell_commands import launcher_command, shell_command
from launcher.tracking.jsonl import NON_METRIC_FIELDS, SUPERSEDED, append_event, iter_lines, merge_steps, read_metrics
from launcher.tracking.metrics import METRICS, STEP, wandb_names
from launcher.tracking.verdicts import TUNED, by_steps, read_verdicts

INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 45.0
# Time that finish() waits beyond W&B's own limits, which a hung wandb-core does not keep.
FINISH_GRACE_S = 10.0
# Metrics of up to this time may be missing in the offline file of a killed process.
FLUSH_INTERVAL_S = 2.0
_READ_DEADLINE_S = 60.0
# Marker file in the folder of a session that has sent everything.
_UPLOADED = "uploaded"
# Exit codes that W&B's page shows as different outcomes; W&B itself uses 255 for Ctrl-C.
_EXIT_CODES = {"completed": 0, "cancelled": 255}

# W&B accepts titles of fewer than 64 characters.
_MAX_TITLE, _MAX_RUN_NAME = 63, 30
# W&B drops an alert with the title of an earlier one for this long, by default a minute. launcher.tracking.tracker.RateLimit
# limits alerts, and different alerts may have the same title. W&B treats 0 as its default.
_ALERT_WAIT = timedelta(milliseconds=1)
_URL_USER = re.compile(r"(?<=://)[^/\s@]+(?=@)")


class WandbTracker:
    """Sends metrics, alerts and the summary to the W&B run with the plan's id.

    The metrics of a step are one row, queued when the next step begins: W&B accepts a step only once, and a rank may die between
    training and evaluation. A failed attempt does not send its last row: the next attempt repeats that step, or sends the row.

    No call waits for W&B or raises its errors. If W&B cannot be reached or refuses the run at the start, the attempt is tracked
    offline. If its process fails later, the steps that W&B lacks are sent from metrics.jsonl at the end. The first problem is an
    alert, later ones are information. They are sent through `send_event` (kind, text), also from the thread. Mode auto is online
    if W&B finds credentials, else offline. `on_stop` is called when a person presses Stop on the run's page.
    """

    def __init__(
        self, plan: LaunchPlan, run_dir: str | Path, *, send_event: Callable[..., None], on_stop: Callable[[], None]
    ) -> None:
        self._plan, self._run, self._send_event, self._on_stop = plan, RunDir(Path(run_dir)), send_event, on_stop
        self._offline = plan.config.tracking.mode == "offline"
        # None is the end.
        self._calls: queue.SimpleQueue[Callable[[Session], None] | None] = queue.SimpleQueue()
        self._session: Session | None = None
        self._end: Callable[[Session], None] = lambda session: None
        self._failure = ""
        self._last_step = -1
        # The metrics of the current step, until the next step begins.
        self._row: dict[str, float] = {}
        self._alerted = False
        # W&B's process, written in Go, spends a quarter of its time on keeping many processors busy.
        os.environ.setdefault("GOMAXPROCS", "1")
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step != self._last_step:
            self._send_row()
        self._last_step = step
        self._row |= metrics

    def event(self, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
        """Send an alert; ignore other kinds."""
        if kind == "alert":
            at = self._last_step if step is None and self._last_step >= 0 else step
            self._calls.put(lambda session: session.alert(text, at))

    def summary(self, values: Mapping[str, Any]) -> None:
        self._calls.put(lambda session: session.summary(values))

    def finish(self, state: str, *, everything: bool = False) -> None:
        """Upload what is pending, in at most FINISH_TIMEOUT_S + FINISH_GRACE_S seconds.

        With `everything`, also send all lines of metrics.jsonl that W&B lacks, even of discarded steps, and the last row of a
        failed attempt.

        If the upload fails or takes longer, the files stay, and an event has the command that uploads them.
        """
        if state == SUPERSEDED:
            # W&B's process would finish the run while the other attempt trains.
            kill_core()
            return
        end_step = math.inf if everything else self._last_step + (state != "failed")
        if state != "failed":
            self._send_row()
        has_sent_all = threading.Event()

        def end(session: Session) -> None:
            session.catch_up(end_step)
            has_sent_all.set()
            session.finish(state)

        self._end = end
        self._calls.put(None)
        limit = FINISH_TIMEOUT_S + FINISH_GRACE_S
        self._thread.join(limit)
        if self._thread.is_alive():
            # W&B also waits for its process at exit; without the process there is nothing to wait for.
            kill_core()
            has_sent_all.clear()
            self._failure = f"no answer in {limit:.0f} s"
        command = sync_command(self._run, self._plan.wandb_id, self._session)
        if self._failure:
            rest = "the data is on disk" if has_sent_all.is_set() else "metrics.jsonl has all data"
            rest += "; upload W&B's files with the command that `status` shows" if command else ""
            self._report(f"Weights & Biases does not have all data ({self._failure}); {rest}", sync_command=command)
        elif self._offline:
            text = "Weights & Biases was offline; upload the run with the command that `status` shows"
            self._send_event("info", text, sync_command=command, is_closing=True)

    def _send_row(self) -> None:
        if self._row:
            step, row, self._row = self._last_step, self._row, {}
            self._calls.put(lambda session: session.log(step, row))

    def _report(self, text: str, **fields: Any) -> None:
        # One alert about W&B is enough; the others are information.
        kind, self._alerted = "info" if self._alerted else "alert", True
        self._send_event(kind, text, **fields)

    # The code below runs in the thread.

    def _work(self) -> None:
        try:
            # The search for a login imports W&B's package, which takes a while.
            self._offline = not is_online(self._plan.config.tracking.mode)
            self._start_session()
            while (call := self._calls.get()) is not None:
                if self._session is None:
                    continue
                try:
                    call(self._session)
                except Exception as error:
                    self._report(f"W&B's process failed: {describe(error)}; what it lacks is sent at the end of the attempt")
                    kill_core()
                    leave_core()
                    self._session = None
            if self._session is None and not self._failure:
                self._start_session()
            if self._session is not None:
                self._end(self._session)
        except (Exception, SystemExit) as error:
            # SystemExit would end the thread without a message.
            self._failure = f"{type(error).__name__}: {error}"

    def _start_session(self) -> None:
        """Start a session: offline if W&B does not answer or refuses the run, none if it refuses even offline files."""
        try:
            self._session = Session(self._plan, self._run, offline=self._offline, on_stop=self._on_stop)
        except ConfigError as error:
            reason = error.problems[0].message
            if self._offline:
                self._failure = reason
                self._report(f"this attempt is not tracked in W&B, only in metrics.jsonl: {reason}")
            else:
                self._offline = True
                self._report(f"this attempt is tracked offline: {reason}")
                self._start_session()
            return
        command = sync_command(self._run, self._plan.wandb_id, self._session) if self._offline else None
        where = f"see it at {self._session.url}" if self._session.url else "offline"
        self._send_event("info", f"Weights & Biases: {where}", url=self._session.url, sync_command=command)


class Session:
    """A W&B run under the plan's id, which every session of the plan continues.

    The plan without secrets is the W&B config. `on_stop` is called in one of W&B's threads when a person presses Stop.

    Raises:
        ConfigError: if W&B is not installed, does not answer within INIT_TIMEOUT_S, or rejects the settings or the login.
    """

    def __init__(self, plan: LaunchPlan, run: RunDir, *, offline: bool, on_stop: Callable[[], None]) -> None:
        # Imported here: it takes 0.4 s, and most users of this package never track.
        try:
            import wandb
        except ImportError as error:
            remedy = "install it with: pip install wandb, or set tracking=none"
            raise ConfigError(f"Weights & Biases cannot start: {error}", where="tracking", remedy=remedy) from error

        self._run_dir = run
        config = plan.config.tracking
        before = session_folders(run, plan.wandb_id)
        _remove_slurm_credentials()
        try:
            self._run = wandb.init(
                id=plan.wandb_id,
                resume="allow",
                reinit="create_new",
                dir=run.root.absolute(),
                name=plan.run_name,
                project=config.project,
                entity=config.entity,
                group=config.group,
                tags=config.tags,
                mode="offline" if offline else "online",
                config=redact_data({**json.loads(plan.to_json()), "plan_digest": plan.digest()}, os.environ),
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    # The plan and code/ have code, git and packages; the address of a git remote may contain a token.
                    save_code=False,
                    disable_git=True,
                    x_save_requirements=False,
                    init_timeout=INIT_TIMEOUT_S,
                    finish_timeout=FINISH_TIMEOUT_S,
                    finish_timeout_raises=True,
                    x_transaction_log_flush_interval=FLUSH_INTERVAL_S,
                    # By default W&B interrupts the main thread, which would end rank 0 alone.
                    stop_fn=on_stop,
                ),
            )
        except Exception as error:  # W&B raises far more than wandb.Error here.
            # Its process keeps the id of a failed start, and another start in this process would find it in use.
            leave_core()
            # They are empty but would count as a session's files.
            for folder in session_folders(run, plan.wandb_id):
                if folder not in before:
                    shutil.rmtree(folder, ignore_errors=True)
            reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
            remedy = "check the login and tracking.*, or set tracking.mode=offline"
            raise ConfigError(f"Weights & Biases cannot start: {reason}", where="tracking", remedy=remedy) from error
        self.offline = bool(self._run.offline)
        self.url = None if self.offline else self._run.url
        self.folder = Path(self._run.dir).parent
        # W&B drops steps that it already has, each with a warning.
        if self.offline:
            self._last_sent_step = _read_last_step(before)
        else:
            self._last_sent_step = int(self._run.summary.get("_step", -1)) if self._run.resumed else -1
        self._caught_up = False
        # W&B's step minus the trainer's; known when metrics.jsonl has been read.
        self._offset = 0
        self._run.define_metric(STEP)
        # "*" is for what the table of metrics does not name, such as metrics of evaluation sets.
        for name in (*wandb_names(), "*"):
            self._run.define_metric(name, step_metric=STEP)
        # A resumed run's summary still has the previous attempt's state.
        self._run.summary.update({"state": "running"})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send all metrics of a step, after those of earlier steps that W&B lacks."""
        if not self._caught_up:
            self.catch_up(step)
        if step + self._offset > self._last_sent_step:
            self._log(step, metrics, self._offset)

    def catch_up(self, before: float) -> None:
        """Send the steps in metrics.jsonl before `before` that W&B lacks; those repeated after a person's resume come too."""
        self._caught_up = True
        # Read the file twice: all lines of a long run would take a lot of memory, and usually W&B lacks none.
        last_steps: dict[int, int] = {}
        for line in iter_lines(self._run_dir.metrics, ()):
            last_steps[line["attempt"]] = max(line["trainer/step"], last_steps.get(line["attempt"], 0))
        offset_of = step_offsets(self._run_dir, last_steps)
        self._offset = max(offset_of.values(), default=0)
        missing: dict[int, list[dict[str, Any]]] = {}
        for line in iter_lines(self._run_dir.metrics):
            step, offset = line["trainer/step"], offset_of.get(line["attempt"], self._offset)
            if step + offset > self._last_sent_step and (step < before or offset < self._offset):
                missing.setdefault(offset, []).append(line)
        for offset, lines in sorted(missing.items()):
            for line in merge_steps(lines):
                metrics = {name: value for name, value in line.items() if name not in NON_METRIC_FIELDS}
                self._log(line["trainer/step"], metrics, offset)

    def _log(self, step: int, metrics: Mapping[str, float], offset: int) -> None:
        # The step among the metrics is a float, which W&B does not accept as its own step.
        # Commit: W&B's process would otherwise hold the row until the next step.
        self._run.log({**metrics, "trainer/step": step}, step=int(step + offset), commit=True)
        self._last_sent_step = int(step + offset)

    def alert(self, text: str, step: int | None) -> None:
        at, text = "" if step is None else f" at step {step}", redact_data(text, os.environ)
        title = f"{str(self._run.name)[:_MAX_RUN_NAME]}{at}: {text.partition(':')[0]}"
        self._run.alert(title[:_MAX_TITLE], text, level="WARN", wait_duration=_ALERT_WAIT)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def log_table(self, name: str, header: list[str], rows: list[list[str]]) -> None:
        """Add a table of texts to the summary, where it needs no step."""
        import wandb

        self._run.summary.update({name: wandb.Table(columns=header, data=rows)})

    def finish(self, state: str) -> None:
        """Add the lowest losses with their steps to the summary, and upload what is pending."""
        names = {name: metric.lowest for name, metric in METRICS.items() if metric.lowest is not None}
        lines = read_metrics(self._run_dir.metrics, ("eval/", *names))
        for name, summary_name in names.items():
            values = [(line[name], line["trainer/step"]) for line in lines if name in line and not math.isnan(line[name])]
            if values:
                lowest, step = min(values)
                self._run.summary.update({summary_name: lowest, f"{summary_name}_step": step})
        self._run.summary.update({"state": state})
        if state == "preempted":
            self._run.mark_preempting()
        import wandb

        try:
            self._run.finish(exit_code=_EXIT_CODES.get(state, 1))
        finally:
            # Files are complete once its process has ended; the end of the job would kill it.
            try:
                wandb.teardown()
            except SystemExit as end:
                raise RuntimeError(f"W&B's process ended with exit code {end.code}") from None
        if not self.offline:
            (self.folder / _UPLOADED).touch()


def step_offsets(run: RunDir, last_steps: Mapping[int, int]) -> dict[int, int]:
    """Return W&B's own step minus trainer/step by attempt; `last_steps` is the last logged step by attempt.

    W&B's step only grows. An attempt that the launcher starts repeats steps with the same results, so it has the offset of the
    attempt before. After a person's resume, repeated steps come after all steps that W&B has.
    """
    offset_of: dict[int, int] = {}
    offset = highest = 0
    for number in run_store.attempt_numbers(run):
        attempt = run_store.find_attempt(run, number)
        if attempt is not None and not attempt.automatic:
            offset = max(offset, highest - (attempt.resume_step or 0))
        offset_of[number] = offset
        highest = max(highest, last_steps.get(number, 0) + offset)
    return offset_of


def _remove_slurm_credentials() -> None:
    """Remove credentials among Slurm's variables: W&B's process uploads every variable whose name begins with SLURM_.

    With SLURM_JWT, whoever can see the W&B project could start jobs in this user's name.
    """
    named = environment_secrets(os.environ)
    for name, value in list(os.environ.items()):
        if name.startswith("SLURM_") and (name in named or looks_secret(name, value)):
            os.environ.pop(name, None)


def sync_command(run: RunDir, wandb_id: str, session: Session | None) -> str:
    """Return the command that uploads this session's files, and earlier sessions' if it was offline; empty without files."""
    missing: list[Path] = []
    for folder in session_folders(run, wandb_id):
        missing = [] if (folder / _UPLOADED).exists() else [*missing, folder]
    if session is not None and not session.offline:
        missing = [session.folder]
    # W&B skips online sessions by default.
    return shell_command("wandb", "sync", "--include-online", *missing) if missing else ""


def _read_last_step(folders: list[Path]) -> int:
    """Return the last step in the newest of these folders that has steps, read with W&B's own program; -1 if there is none."""
    for folder in reversed(folders):
        for file in folder.glob("*.wandb"):
            command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(file)]
            with suppress(ValueError, KeyError, OSError, subprocess.SubprocessError):
                read = subprocess.run(command, capture_output=True, timeout=_READ_DEADLINE_S)
                return int(json.loads(read.stdout)["summary"]["_step"])
    return -1


def session_folders(run: RunDir, wandb_id: str) -> list[Path]:
    """Return the folders of all sessions, oldest first."""
    paths = (run.root / "wandb").absolute().glob(f"*run-*-{wandb_id}*")
    return sorted(paths, key=lambda folder: folder.name.removeprefix("offline-"))


def is_online(mode: Literal["auto", "online", "offline", "disabled"]) -> bool:
    """Return whether to use W&B online; in mode auto, if it finds WANDB_API_KEY, an identity token or a login in netrc."""
    if mode != "auto":
        return mode == "online"
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        from wandb.sdk import wandb_setup
        from wandb.sdk.lib.wbauth import read_netrc_auth

        # W&B's own reader: a login may be under an older address of the server. wandb.setup() would start
        # W&B's process, and wait for it.
        return bool(read_netrc_auth(host=wandb_setup.singleton().settings.base_url))
    except Exception:
        # The entry is not a key, or the package or its settings are broken: the start of a session reports that.
        return False


def redact_data(value: Any, environ: Mapping[str, str]) -> Any:
    """Return JSON data without the values of secret environment variables and the user part of URLs."""
    secrets = environment_secrets(environ).values()

    def clean(item: Any) -> Any:
        if isinstance(item, dict):
            return {clean(key): clean(inner) for key, inner in item.items()}
        if isinstance(item, list):
            return [clean(inner) for inner in item]
        if isinstance(item, str):
            for secret in secrets:
                item = item.replace(secret, "<redacted>")
            return _URL_USER.sub("<redacted>", item)
        return item

    return clean(value)


def running_cores() -> list[psutil.Process]:
    """Return the running children of this process that are W&B's: the programs named wandb-core."""
    processes = list[psutil.Process]()
    for child in psutil.Process().children():
        # Other children may end at any time.
        with suppress(psutil.NoSuchProcess):
            # A zombie is a process whose exit code W&B has not read yet.
            if child.status() != psutil.STATUS_ZOMBIE and child.name().startswith("wandb-core"):
                processes.append(child)
    return processes


def kill_core() -> None:
    """Kill W&B's process."""
    for process in running_cores():
        process.kill()


def leave_core() -> None:
    """Disconnect from W&B's process, which may have ended, so that the next session starts another."""
    import wandb

    # If the process ended with an error, W&B calls sys.exit(), which would end this thread without a message.
    with suppress(Exception, SystemExit):
        wandb.teardown(exit_code=1)


def upload_verdicts(run: RunDir, step: int) -> str:
    """Add a step's verdicts to the W&B run's summary, each with a table of answers; returns a line for the user.

    Nothing is sent during training: the run has its own session, which this one would disturb.
    """
    plan = run_store.load_plan(run)
    tracking = plan.config.tracking
    all_verdicts = read_verdicts(run)
    verdicts = [one for one in all_verdicts if one.step == step]
    if tracking.kind != "wandb" or tracking.mode == "disabled" or not verdicts:
        return ""
    status = run_store.read_status(run)
    if (state := status.state) in RUNNING_STATES:
        return f"W&B: the verdict is not sent because the run is {state}; evaluate again after it ends: existing answers are used"
    session = Session(plan, run, offline=not is_online(tracking.mode), on_stop=lambda: None)
    try:
        for one in verdicts:
            name, verdict = one.set_name or "prompts", one.verdict
            scores = {
                f"eval/{name}/{metric}" + (f"/{side}" if side != TUNED else ""): mean
                for metric, means in verdict.means.items()
                for side, mean in means.items()
            }
            texts = {f"verdict/{name}": verdict.sentence, f"verdict/{name}/outcome": verdict.outcome.value}
            session.summary({**texts, "verdict/step": one.step, **scores})
            if verdict.examples:
                # Wins, losses and ties on the primary metric.
                rows = [
                    [f"{example.kind}, {example.baseline}", example.prompt, example.reference]
                    + [example.answers.get(side, "") for side in verdict.sides]
                    for example in verdict.examples
                ]
                session.log_table(f"verdict/{name}/answers", ["comparison", "prompt", "reference", *verdict.sides], rows)
        for several in by_steps(all_verdicts):
            session.log_table(f"verdict/{several.set_name or 'prompts'}/steps", *several.table)
    finally:
        session.finish(state)
    line = f"W&B: the verdict is in the summary of {session.url or f'the files in {session.folder}'}"
    upload_command = sync_command(run, plan.wandb_id, session) if session.offline else ""
    if not upload_command:
        return line
    # The command names the files of each evaluation. `status` shows the one of the last event.
    append_event(run, status.attempt, "info", "the verdict is in offline files of W&B", step, sync_command=upload_command)
    return f"{line}; {launcher_command('status', run.root)} shows the command that uploads them"


def main(run_dir: str, step: str) -> int:
    try:
        if line := upload_verdicts(RunDir(Path(run_dir).absolute()), int(step)):
            print(line)
    except Exception as error:  # W&B raises far more than wandb.Error.
        print(f"W&B: the verdict is not sent: {describe(error)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
