"""Runs in a mirror: list them, and bring one to this machine."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from launcher import run_store
from launcher.checkpoint.mirror import download
from launcher.checkpoint.mirror.layout import MirroredRun, complete_checkpoints, read_run
from launcher.checkpoint.mirror.remote_folder import Remote, unreachable
from launcher.cli import formatting
from launcher.cli.launch import prepare
from launcher.config.fields import Url
from launcher.config.schema import ModelSection
from launcher.data import cache, sources
from launcher.errors import ConfigError, DataError, LauncherError, Problem, SubmitError
from launcher.plan.launch_plan import DataFacts, LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES
from launcher.tracking.metrics import format_duration


def run_from(url: str, root: Path, step: int | None) -> RunDir:
    """The run at `url` as a run directory under `root`, ready to be resumed from its newest complete checkpoint, or `step`.

    Raises:
        SubmitError: where it is no address for a mirror, there is no such run, or its directory is there already.
        CheckpointError: where no checkpoint is whole.
        ConfigError, DataError: where its data is not on this machine, or is other data.
    """
    _require_address(url)
    remote = Remote(url)
    with _reading(remote):
        mirrored = read_run(remote)
        if mirrored is None:
            raise _no_such_run(remote)
    run = RunDir((root / mirrored.run_name).absolute())
    download.claim(run, remote.url)
    with run_store.start_lock(run):
        with _reading(remote):
            plans = download.fixed_files(remote, mirrored, run)
            download.progress(remote, run)
            fetched = download.checkpoint(remote, run, step, _say)
        _settle_status(run, mirrored, remote.url, fetched)
        plan = _newest(plans)
        model = _small_model(plan, run)
        data = _data(plan, model)
        moved = {name: _moved(plan, run, model, data) for name, plan in plans.items()}
        download.write_plans(run, moved)
    print(f"fetched {mirrored.run_name} to {formatting.short(run.root)}", flush=True)
    return run


def ls(url: str, as_json: bool) -> int:
    """List the runs in a mirror; SubmitError where it is no address for one."""
    _require_address(url)
    remote = Remote(url)
    with _reading(remote):
        runs = [_summary(remote.under(name), name) for name in remote.names()]
    found = [run for run in runs if run is not None]
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    if not found:
        print(f"no runs in {remote.url}")
        return 0
    rows = [
        (run["name"], run["state"], f"{run['step']}/{run['max_steps'] or '?'}", ", ".join(map(str, run["checkpoints"])) or "-")
        for run in found
    ]
    print("\n".join(formatting.table(("run", "state", ">step", "checkpoints"), rows)))
    return 0


def _require_address(url: str) -> None:
    """Refuse what checkpoint.mirror refuses, unseen: a password in it would be written down, and shown in whatever goes wrong."""
    try:
        TypeAdapter(Url).validate_python(url)
    except ValidationError as error:
        what, _, remedy = str(error.errors()[0]["ctx"]["error"]).partition("; ")
        raise SubmitError(f"this {what}", where="URL", remedy=remedy) from None


def _summary(remote: Remote, name: str) -> dict[str, Any] | None:
    """What status.json in the mirror says of a run, and its complete checkpoints; None where `name` is no run."""
    content = remote.read("status.json") if read_run(remote) is not None else None
    if content is None:
        return None
    status = json.loads(content)
    shown = {key: status.get(key) for key in ("state", "step", "max_steps", "updated_at")}
    return {"name": name, "url": remote.url, **shown, "checkpoints": list(complete_checkpoints(remote))}


def _no_such_run(remote: Remote) -> SubmitError:
    above = Remote(remote.url.rpartition("/")[0]) if remote.url.rpartition("/")[0].count("/") > 2 else remote
    names = [name for folder in (remote, above) for name in folder.names() if read_run(folder.under(name)) is not None][:10]
    return SubmitError(
        "there is no run at this address",
        where=remote.url,
        remedy=f"write URL/NAME; there are: {', '.join(names)}" if names else "list a mirror with: python -m launcher ls URL",
    )


def _settle_status(run: RunDir, mirrored: MirroredRun, url: str, step: int) -> None:
    """No process of this machine has a part in what the status says of another one."""
    status = run_store.read_status(run)
    if status.state in RUNNING_STATES:
        ago = format_duration(max(0.0, time.time() - status.updated_at))
        _say(
            f"note: {ago} before now this run was {status.state} on {mirrored.owner.host}; "
            "if it still is, end it there: from now on the mirror takes what this machine sends"
        )
    state = "preempted" if status.state in RUNNING_STATES else status.state
    run_store.update_status(run, state=state, job=None, step=step, message=f"fetched from {url}")


def _newest(plans: dict[str, LaunchPlan]) -> LaunchPlan:
    return plans[max(plans, key=lambda name: name != "plan.json")]


def _small_model(plan: LaunchPlan, run: RunDir) -> ModelSection:
    """The model's settings with the files that came with the run: its weights are in the checkpoint."""
    here: dict[str, Any] = {"init": "random"}
    if plan.model.path is not None:
        here["path"] = str(run.root / "model")
        here["tokenizer"] = None
    if plan.model.tokenizer_path != plan.model.path:
        here["tokenizer"] = str(run.root / "tokenizer")
    return plan.config.model.model_copy(update=here)


def _data(plan: LaunchPlan, model: ModelSection) -> DataFacts:
    """The data cache on this machine: found by its content, else built again and compared.

    Raises:
        ConfigError, DataError: where the sources are not here, or are others.
    """
    trained = plan.data
    if trained is None:
        raise SubmitError("the plan in the mirror has no data", where=plan.run_name)
    if (here := cache.find(Path(trained.cache_dir).name)) is None:
        here = _built(plan, model)
    before, now = trained.contents(), here.contents()
    # Of a plan without a digest the counts tell.
    if differing := [name for name in before if before[name] != now[name] and before[name] != ""]:
        first = differing[0]
        raise DataError(
            Problem(
                "the data on this machine is not what the run was trained on",
                where="data.sources",
                value=f"{first}: {now[first]} here, {before[first]} there",
                remedy="put the same files here, and install the same versions of transformers and tokenizers",
            )
        )
    return here


def _built(plan: LaunchPlan, model: ModelSection) -> DataFacts:
    """The data cache of the run's sources as they are on this machine, built."""
    if problems := sources.check_sources(plan.config.data):
        remedy = "put the data where the run found it when it began; nothing else is missing here"
        raise ConfigError([Problem(p.what, p.where, p.value, remedy) for p in problems])
    prepare(plan.config.model_copy(update={"model": model}))
    built = cache.find(cache.cache_key(plan.config.data, model.tokenizer or model.path or ""))
    if built is None:
        raise DataError(Problem("the data cache is not there after it was built", where=str(cache.cache_root())))
    return built


def _moved(plan: LaunchPlan, run: RunDir, model: ModelSection, data: DataFacts) -> LaunchPlan:
    """The plan with the places of this machine."""
    places = {"path": model.path, "tokenizer_path": model.tokenizer or model.path, "has_weights": False}
    return plan.model_copy(
        update={
            "run_dir": str(run.root),
            "model": plan.model.model_copy(update=places),
            "data": data,
        }
    )


@contextmanager
def _reading(remote: Remote) -> Iterator[None]:
    try:
        yield
    except LauncherError:
        raise
    except Exception as error:
        raise unreachable(remote, "read", error) from error


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
