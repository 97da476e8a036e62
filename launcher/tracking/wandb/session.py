"""One process of W&B's and what it has been sent: started, caught up from metrics.jsonl, finished.

metrics.jsonl is what a run has measured; W&B shows it. A session begins by sending what W&B lacks of it, so that steps that
a crash, a dead network or a killed process has kept from W&B come later, and none comes twice.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from launcher.errors import ConfigError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking import metrics as metrics_table
from launcher.tracking.jsonl import NON_METRIC_FIELDS, continued_lines, iter_lines, merge_steps
from launcher.tracking.metrics import STEP
from launcher.tracking.wandb.steps import offsets, returns

INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 45.0
# How much of a killed process's last metrics an offline file may lack.
FLUSH_INTERVAL_S = 2.0
_READ_DEADLINE_S = 60.0
# In the folder of a session that has sent everything.
_UPLOADED = "uploaded"
# How W&B's page tells the ends of a run apart; 255 is what W&B itself gives for Ctrl-C.
_EXIT_CODES = {"completed": 0, "cancelled": 255}

_SECRET_VARIABLE = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
# W&B takes titles of fewer than 64 characters.
_MOST_TITLE, _MOST_NAMED = 63, 30
# W&B drops an alert with the title of one before for so long, by default a minute. How often a thing is told is decided here
# (launcher.tracking.tracker.RateLimit), and two things may begin with the same words. It takes 0 for its default.
_WAIT = timedelta(milliseconds=1)
_URL_USER = re.compile(r"(?<=://)[^/\s@]+(?=@)")
# What wandb-core writes when it gives up on sending for good: the key was revoked, the run deleted.
_GIVEN_UP = re.compile(r"filestream: fatal error: (.{1,200}?)(?: url=|\"|$)")

# W&B's own no to a run, which has no type and mostly no code: of HTTP's 4xx those that do not ask to try again.
_NO = re.compile(
    r"returned error 4(?!08|25|29)\d\d\b|not logged in|not found during|permission denied|api.?key|created and deleted",
    re.IGNORECASE,
)


class Unreachable(ConfigError):
    """W&B's process or server does not answer: nothing is wrong with the settings, as far as is known."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint as W&B keeps it: by its path, with no file sent."""

    path: Path
    step: int
    eval_loss: float | None
    best: bool


class LowestValues:
    """The lowest training and held-out loss of a run, each with its step, for the summary."""

    def __init__(self) -> None:
        self.summary: dict[str, float] = {}

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in the metrics of a step. NaN is never the lowest."""
        for name, summary_name in metrics_table.lowest_names().items():
            if name in metrics and metrics[name] < self.summary.get(summary_name, math.inf):
                self.summary |= {summary_name: metrics[name], f"{summary_name}_step": step}


class Session:
    """W&B's run of a plan, under the plan's id, so that every session continues the same one.

    The plan is the W&B config, without secrets. `on_stop` is called in a thread of W&B's when a person presses Stop in the page.

    Raises:
        Unreachable: where W&B does not answer in INIT_TIMEOUT_S, or does not start for any reason that may pass.
        ConfigError: where W&B is not installed, or refuses the settings or the login.
    """

    def __init__(self, plan: LaunchPlan, run: RunDir, *, offline: bool, on_stop: Callable[[], None]) -> None:
        # Imported here: it takes 0.4 s, and most of the package's readers never track.
        try:
            import wandb
        except ImportError as error:
            raise _cannot_start(str(error), "install it with: pip install wandb, or set tracking=none") from error

        self._plan, self._run_dir = plan, run
        config = plan.config.tracking
        before = folders(run, plan.wandb_id)
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
                config=redacted({**json.loads(plan.to_json()), "plan_digest": plan.digest()}, os.environ),
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    # Code, git (a remote's address may hold a token) and packages: the plan and code/ have them.
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
            # Its process holds the id of a start that failed, and another start in this process would find it in use.
            with suppress(Exception):
                wandb.teardown(exit_code=1)
            # They hold nothing, and would be taken for a session's.
            for folder in folders(run, plan.wandb_id):
                if folder not in before:
                    shutil.rmtree(folder, ignore_errors=True)
            reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
            kind = ConfigError if _is_refusal(error) else Unreachable
            raise _cannot_start(reason, "check the login and tracking.*, or set tracking.mode=offline", kind) from error
        self.offline = bool(self._run.offline)
        self.url = None if self.offline else self._run.url
        self.folder = Path(self._run.dir).parent
        # What W&B has is never sent again: it would drop it with a warning for each step.
        if self.offline:
            self._known = _last_step_in(before)
        else:
            self._known = int(self._run.summary.get("_step", -1)) if self._run.resumed else -1
        self._internal_log = self.folder / "logs" / "debug-internal.log"
        self._lowest = LowestValues()
        self._caught_up = False
        # Of W&B's step to the trainer's; known when metrics.jsonl has been read.
        self._offset = 0
        self._run.define_metric(STEP)
        # "*" is for what the table of metrics does not name, such as metrics of evaluation sets.
        for name in (*metrics_table.wandb_names(), "*"):
            self._run.define_metric(name, step_metric=STEP)
        # Of a run that is resumed it still says how the attempt before has ended.
        self._run.summary.update({"state": "running"})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send all metrics of a step, after those of all steps before it that W&B lacks."""
        self.catch_up(step)
        self._lowest.add(step, metrics)
        if step + self._offset > self._known:
            self._log(step, metrics, self._offset)
        if any(name.startswith("eval/") for name in metrics):
            self._run.summary.update(self._lowest.summary)

    def catch_up(self, before: float) -> None:
        """Send the lines of metrics.jsonl of the steps before `before` that W&B lacks; once for each session.

        Steps that a person has gone back over, or that are trained anew with other settings, are shown beside those that were
        trained before. Of all lines, those of a last step whose evaluation is missing stay out: W&B takes nothing more for a step
        that it has, and a person may resume the run.
        """
        if self._caught_up:
            return
        self._caught_up = True
        # Read twice, as all lines of a long run at once are a burden where W&B lacks none.
        last_steps: dict[int, int] = {}
        losses = []
        for line in iter_lines(self._run_dir.metrics, tuple(metrics_table.lowest_names())):
            last_steps[line["attempt"]] = max(line["trainer/step"], last_steps.get(line["attempt"], 0))
            losses.append(line)
        for line in merge_steps(continued_lines(losses)):
            if line["trainer/step"] < before:
                self._lowest.add(line["trainer/step"], line)
        offset_of = offsets(last_steps, returns(self._run_dir))
        self._offset = max(offset_of.values(), default=0)
        lacking: dict[int, list[dict[str, Any]]] = {}
        for line in iter_lines(self._run_dir.metrics):
            step, offset = line["trainer/step"], offset_of.get(line["attempt"], self._offset)
            if step + offset > self._known and (step < before or offset < self._offset):
                lacking.setdefault(offset, []).append(line)
        for offset, lines in sorted(lacking.items()):
            rows = merge_steps(lines)
            if before == math.inf and offset == self._offset and self._lacks_evaluation(rows[-1]):
                rows.pop()
            for line in rows:
                metrics = {name: value for name, value in line.items() if name not in NON_METRIC_FIELDS}
                self._log(line["trainer/step"], metrics, offset)

    def _lacks_evaluation(self, row: Mapping[str, Any]) -> bool:
        return self._plan.evaluates_at(row["trainer/step"]) and not any(name.startswith("eval/") for name in row)

    def _log(self, step: int, metrics: Mapping[str, float], offset: int) -> None:
        # A step among the metrics is a float, as all of them, which W&B does not take for its own step.
        # Committed: W&B's process would hold it back until the next step.
        self._run.log({**metrics, "trainer/step": step}, step=int(step + offset), commit=True)
        self._known = int(step + offset)

    def fall_behind(self) -> None:
        """Something was left out: look at metrics.jsonl again before the next step."""
        self._caught_up = False

    def alert(self, text: str, step: int | None) -> None:
        at, text = "" if step is None else f" at step {step}", redacted(text, os.environ)
        title = f"{str(self._run.name)[:_MOST_NAMED]}{at}: {text.partition(':')[0]}"
        self._run.alert(title[:_MOST_TITLE], text, level="WARN", wait_duration=_WAIT)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def log_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Log a checkpoint as a version of the run's artifact that refers to its folder; skip one that has been deleted."""
        import wandb

        metadata = {"step": checkpoint.step, "eval_loss": checkpoint.eval_loss}
        artifact = wandb.Artifact(f"checkpoint-{self._run.id}", "checkpoint", metadata=metadata)
        try:
            # Without the checksum no file is read.
            artifact.add_reference(checkpoint.path.as_uri(), checksum=False)
        except (OSError, ValueError):
            if checkpoint.path.is_dir():
                raise
            # keep_last deletes checkpoints, and W&B may be far behind. Deletion begins with a rename.
            return
        aliases = ["latest", f"step-{checkpoint.step}", *(["best"] if checkpoint.best else [])]
        self._run.log_artifact(artifact, aliases=aliases)

    def log_export(self, folder: Path, limit_s: float) -> None:
        """Upload the exported model, and wait until W&B has it.

        Raises:
            Exception: of W&B's, where that takes longer than `limit_s`.
        """
        import wandb

        artifact = wandb.Artifact(f"model-{self._run.id}", "model", metadata={"folder": str(folder)})
        artifact.add_dir(str(folder), policy="immutable", skip_cache=True)
        logged = self._run.log_artifact(artifact, aliases=["latest", "final"])
        if not self.offline:
            logged.wait(timeout=int(limit_s))

    def finish(self, state: str) -> None:
        """Upload what is pending.

        Raises:
            TimeoutError: where that takes longer than FINISH_TIMEOUT_S.
            RuntimeError: where W&B has given up on sending.
        """
        self._run.summary.update({**self._lowest.summary, "state": state})
        if state == "preempted":
            self._run.mark_preempting()
        import wandb

        try:
            self._run.finish(exit_code=_EXIT_CODES.get(state, 1))
        finally:
            # Files are whole when its process has ended, and whoever ends the job kills that.
            wandb.teardown()
        if reason := self.given_up():
            raise RuntimeError(reason)
        if not self.offline:
            (self.folder / _UPLOADED).touch()

    def given_up(self) -> str:
        """Why W&B has stopped sending for good; empty while it has not."""
        try:
            found = _GIVEN_UP.search(self._internal_log.read_text(errors="replace"))
        except OSError:
            return ""
        return found[1] if found else ""


def sync_command(run: RunDir, wandb_id: str, session: Session | None) -> str:
    """The command that uploads what the server lacks: the session's files, where it was offline those before as well.

    Empty where there are no files.
    """
    online = session is not None and not session.offline
    lacking = [session.folder] if session is not None and online else _not_uploaded(run, wandb_id)
    # W&B passes over what was online unless told not to.
    return shlex.join(["wandb", "sync", "--include-online", *map(str, lacking)]) if lacking else ""


def _last_step_in(folders: list[Path]) -> int:
    """The last step that the newest of these folders with any steps holds, in W&B's own reading; -1 where none has."""
    for folder in reversed(folders):
        for file in folder.glob("*.wandb"):
            command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(file)]
            with suppress(ValueError, KeyError, OSError, subprocess.SubprocessError):
                read = subprocess.run(command, capture_output=True, timeout=_READ_DEADLINE_S)
                return int(json.loads(read.stdout)["summary"]["_step"])
    return -1


def folders(run: RunDir, wandb_id: str) -> list[Path]:
    """The folders of all sessions, oldest first."""
    found = (run.root / "wandb").absolute().glob(f"*run-*-{wandb_id}*")
    return sorted(found, key=lambda folder: folder.name.removeprefix("offline-"))


def _not_uploaded(run: RunDir, wandb_id: str) -> list[Path]:
    """The folders since the last session that has sent everything, what those before lacked included."""
    left: list[Path] = []
    for folder in folders(run, wandb_id):
        left = [] if (folder / _UPLOADED).exists() else [*left, folder]
    return left


def is_online(mode: Literal["auto", "online", "offline", "disabled"]) -> bool:
    """Whether W&B is to be reached; auto is where it finds credentials: WANDB_API_KEY, an identity token, a login in netrc."""
    if mode != "auto":
        return mode == "online"
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        from wandb.sdk import wandb_setup
        from wandb.sdk.lib.wbauth import read_netrc_auth

        # W&B's own reader: a login may stand under an older address than the server's present one. wandb.setup() would start
        # W&B's process, and wait for it.
        return bool(read_netrc_auth(host=wandb_setup.singleton().settings.base_url))
    except Exception:
        # What stands there is no key, or the package or its settings are broken, which the start of a session tells.
        return False


def redacted(value: Any, environ: Mapping[str, str]) -> Any:
    """JSON data without the values of secret environment variables and the user part of URLs."""
    secrets = [v for name, v in environ.items() if _SECRET_VARIABLE.search(name) and len(v) >= 8]

    def clean(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: clean(inner) for key, inner in item.items()}
        if isinstance(item, list):
            return [clean(inner) for inner in item]
        if isinstance(item, str):
            for secret in secrets:
                item = item.replace(secret, "<redacted>")
            return _URL_USER.sub("<redacted>", item)
        return item

    return clean(value)


def _is_refusal(error: Exception) -> bool:
    """Whether W&B would say the same at the next try: processes and networks fail in more ways than it has types for."""
    from pydantic import ValidationError
    from wandb.errors import AuthenticationError, CommError, UsageError

    if isinstance(error, AuthenticationError | UsageError | ValidationError | ImportError):
        return True
    return isinstance(error, CommError) and _NO.search(str(error)) is not None


def _cannot_start(why: str, remedy: str, kind: type[ConfigError] = ConfigError) -> ConfigError:
    return kind(f"Weights & Biases cannot start: {why}", where="tracking", remedy=remedy)
