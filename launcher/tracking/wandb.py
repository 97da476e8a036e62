"""Weights & Biases: one W&B run for the whole life of a run, online or as files to upload later."""

from __future__ import annotations

import json
import os
import re
import shlex
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import psutil

from launcher.errors import ConfigError, RunError
from launcher.plan.launch_plan import LaunchPlan

INIT_TIMEOUT_S = 60.0
FINISH_TIMEOUT_S = 60.0
# What the guard around finish() waits beyond W&B's own limit, which a hung wandb-core does not keep.
FINISH_GRACE_S = 10.0
# How much of a killed run's last metrics an offline file may lack.
FLUSH_INTERVAL_S = 2.0

_SECRET_VARIABLE = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
# W&B takes titles of up to 63 characters.
_MOST_NAMED = 40
_URL_USER = re.compile(r"(?<=://)[^/\s@]+(?=@)")


class WandbTracker:
    """Sends metrics and the summary to W&B under the plan's id, so that every attempt continues one W&B run.

    Messages for people are not sent. The plan is the W&B config, without secrets. mode auto is online where
    W&B finds credentials (WANDB_API_KEY, an identity token, a login in netrc), else offline; `offline` overrules it.

    Raises:
        ConfigError: where W&B is not installed, refuses the settings or the login, or does not answer in time.
    """

    def __init__(self, plan: LaunchPlan, run_dir: str | Path, offline: bool = False) -> None:
        # Imported here: it takes 0.4 s, and most of the package's readers never track.
        try:
            import wandb
        except ImportError as error:
            raise _cannot_start(str(error), "install it with: pip install wandb, or set tracking=none") from error

        self._folder = Path(run_dir).absolute()
        self._id = plan.wandb_id
        self._config = plan.config.tracking
        try:
            self._run = wandb.init(
                id=plan.wandb_id,
                resume="allow",
                dir=self._folder,
                name=plan.run_name,
                project=self._config.project,
                entity=self._config.entity,
                group=self._config.group,
                tags=self._config.tags,
                mode="offline" if offline else self._mode(),
                config=redacted(json.loads(plan.to_json()), os.environ),
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
                ),
            )
        except Exception as error:  # W&B raises far more than wandb.Error here.
            # Its process holds the id of a start that failed, and another start in this process would find it in use.
            wandb.teardown(exit_code=1)
            raise _cannot_start(
                f"{type(error).__name__}: {error}", "check the login and tracking.*, or set tracking.mode=offline"
            ) from error
        self._last_step = int(self._run.summary.get("_step", -1)) if self._run.resumed else -1
        self._run.define_metric("trainer/step")
        self._run.define_metric("eval/*", step_metric="trainer/step", summary="min,last")
        self._run.define_metric("*", step_metric="trainer/step")

    @property
    def url(self) -> str | None:
        """The page of the run; None offline."""
        return None if self._run.offline else self._run.url

    @property
    def sync_command(self) -> str | None:
        """The command that uploads the local files, oldest attempt first; None online."""
        return self._sync_command() if self._run.offline else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        # A resumed run replays steps that W&B has; it would drop them with a warning each.
        if step > self._last_step:
            self._run.log({"trainer/step": step, **metrics}, step=step)

    def event(self, kind: str, text: str, step: int | None = None, **fields: Any) -> None:
        """W&B sends alerts to whoever has asked it to; other messages are in events.jsonl."""
        if kind == "alert":
            at = "" if step is None else f" at step {step}"
            self._run.alert(f"{str(self._run.name)[:_MOST_NAMED]}{at}", text, level="WARN")

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def finish(self, state: str) -> None:
        """Upload what is pending, in at most FINISH_TIMEOUT_S + FINISH_GRACE_S seconds.

        Raises:
            RunError: where it took longer or failed; the local files stay, and the message says how to upload them.
        """
        if state == "preempted":
            self._run.mark_preempting()
        failures: list[BaseException] = []

        def finish() -> None:
            try:
                self._run.finish(exit_code=0 if state == "completed" else 1)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=finish, name="wandb-finish", daemon=True)
        thread.start()
        thread.join(FINISH_TIMEOUT_S + FINISH_GRACE_S)
        if thread.is_alive():
            # W&B waits for its process at exit too; without it, nothing is left to wait for.
            for child in psutil.Process().children():
                if child.name().startswith("wandb-core"):
                    child.kill()
            failures.append(TimeoutError(f"no answer in {FINISH_TIMEOUT_S + FINISH_GRACE_S:.0f} s"))
        if failures:
            raise RunError(
                f"Weights & Biases did not finish ({type(failures[0]).__name__}: {failures[0]}); the data is on disk",
                remedy=f"upload it with: {self._sync_command()}",
            )

    def _mode(self) -> Literal["online", "offline", "disabled"]:
        if self._config.mode != "auto":
            return self._config.mode
        if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
            return "online"
        import wandb
        from wandb.sdk.lib.wbauth import read_netrc_auth

        # W&B's own reader: a login may stand under an older address than the server's present one.
        return "online" if read_netrc_auth(host=wandb.setup().settings.base_url) else "offline"

    def _sync_command(self) -> str:
        folders = sorted((self._folder / "wandb").glob(f"*run-*-{self._id}"))
        return shlex.join(["wandb", "sync", *map(str, folders)])


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


def _cannot_start(why: str, remedy: str) -> ConfigError:
    return ConfigError(f"Weights & Biases cannot start: {why}", where="tracking", remedy=remedy)
