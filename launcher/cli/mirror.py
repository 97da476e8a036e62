"""Runs in a mirror: lists them, and downloads one to this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from launcher.checkpoint.mirror import (
    claim_run_dir,
    download_checkpoint,
    download_fixed_files,
    download_progress,
    read_complete_checkpoints,
    read_run,
    write_plans,
)
from launcher.checkpoint.remote_folder import RemoteFolder, convert_storage_errors
from launcher.cli.render import terminal
from launcher.cli.render.sections import Table
from launcher.cli.worker_process import prepare, prepare_eval_sets
from launcher.config.schema import RunConfig
from launcher.config.sections.fields import Url
from launcher.data import cache_store
from launcher.data.cache_dir import cache_root
from launcher.data.sources.reading import check_sources
from launcher.errors import ConfigError, DataError, LauncherError, Problem, SubmitError, printable
from launcher.plan.launch_plan import DataFacts, LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import json_records, run_store
from launcher.runs.run_records import RUNNING_STATES, Status
from launcher.security import folders
from launcher.shell_commands import launcher_command, short_path
from launcher.tracking.metrics import format_age
from launcher.tracking.progress import show_progress

# Where the user wrote the address.
_ORIGIN = "command line"


def download_run(url: str, root: Path, step: int | None) -> RunDir:
    """Download the run at `url` to a run directory under `root`, with its newest complete checkpoint or the one at `step`."""
    _require_address(url)
    remote = RemoteFolder(url, origin=_ORIGIN)
    with convert_storage_errors(remote, "read"):
        mirrored = read_run(remote)
        if mirrored is None:
            remedy = f"list the runs in a mirror with: {launcher_command('ls', remote.url.rpartition('/')[0])}"
            raise SubmitError("there is no run at this address", where=remote.url, remedy=remedy)
        remote.require_trusted()
    run = RunDir((root / mirrored.run_name).absolute())
    claim_run_dir(run, remote.url)
    # Check this before fetching bytes that would not be used.
    folders.require_run(run.root)
    with run_store.start_lock(run):
        with convert_storage_errors(remote, "read"):
            plans = download_fixed_files(remote, mirrored, run)
            download_progress(remote, run)
            with show_progress() as make_progress:
                step = download_checkpoint(remote, run, step, _print_note, make_progress)
        # No process on this machine runs it.
        status = run_store.read_status(run)
        state = "preempted" if status.state in RUNNING_STATES else status.state
        if state != status.state:
            age = format_age(status.updated_at)
            _print_note(
                f"note: {age} ago this run was {status.state} on {mirrored.owner.host}; if it still runs, cancel it there: "
                "the mirror accepts uploads only from this machine once the run is resumed here"
            )
        run_store.update_status(run, state=state, job=None, step=step, message=f"downloaded from {remote.url}")
        write_plans(run, {name: _make_local(plan, run) for name, plan in plans.items()})
    print(f"downloaded {mirrored.run_name} to {short_path(run.root)}", flush=True)
    return run


def list_runs(url: str, as_json: bool) -> int:
    """Print the runs in a mirror; returns the exit code."""
    _require_address(url)
    remote = RemoteFolder(url, origin=_ORIGIN)
    summaries: list[dict[str, Any]] = []
    with convert_storage_errors(remote, "read"):
        for name in remote.names():
            try:
                folder = RemoteFolder(f"{remote.url}/{name}", origin=_ORIGIN)
                content = folder.read("status.json") if read_run(folder) is not None else None
                if content is not None:
                    status = json_records.loads(Status, content, f"{folder.url}/status.json")
                    state = {key: getattr(status, key) for key in ("state", "step", "max_steps", "updated_at")}
                    checkpoints = list(read_complete_checkpoints(folder))
                    summaries.append({"name": name, "url": folder.url, **state, "checkpoints": checkpoints})
            except LauncherError as error:
                # Other users may share the mirror.
                print(printable(f"{name}: {error.problems[0].message}"), file=sys.stderr)
    if as_json:
        print(json.dumps(summaries, indent=2))
        return 0
    if not summaries:
        print(f"no runs in {remote.url}")
        return 0
    rows = [
        (run["name"], run["state"], f"{run['step']}/{run['max_steps'] or '?'}", ", ".join(map(str, run["checkpoints"])) or "-")
        for run in summaries
    ]
    terminal.show(Table(("run", "state", "step", "checkpoints"), rows, numbers=(2,)))
    return 0


def _require_address(url: str) -> None:
    """Reject an address that checkpoint.mirror rejects, without showing it: it may contain a password."""
    try:
        TypeAdapter(Url).validate_python(url)
    except ValidationError as error:
        what, _, remedy = str(error.errors()[0]["ctx"]["error"]).partition("; ")
        raise SubmitError(f"this {what}", where=_ORIGIN, remedy=remedy) from None


def _make_local(plan: LaunchPlan, run: RunDir) -> LaunchPlan:
    """Return the plan with this machine's paths and data caches; missing caches are built."""
    # The weights are in the checkpoint.
    changes: dict[str, Any] = {"init": "random"}
    if plan.model.path is not None:
        changes |= {"path": str(run.root / "model"), "tokenizer": None}
    if plan.model.tokenizer_path != plan.model.path:
        changes["tokenizer"] = str(run.root / "tokenizer")
    model = plan.config.model.model_copy(update=changes)
    # On this machine, a group of the same name may have other members.
    data = plan.config.data.model_copy(update={"cache_group": None})
    config = plan.config.model_copy(update={"data": data})
    on_this_machine = config.model_copy(update={"model": model})
    kept = {name: one for name, trained in plan.eval_sets.items() if (one := _find_cache(trained)) is not None}
    tokenizer = model.tokenizer or model.path
    facts = {"path": model.path, "tokenizer_path": tokenizer, "has_weights": False}
    return plan.model_copy(
        update={
            "run_dir": str(run.root),
            "config": config,
            "model": plan.model.model_copy(update=facts),
            "data": _find_or_build_data(plan, on_this_machine),
            "eval_sets": prepare_eval_sets(on_this_machine, kept, tokenizer),
        }
    )


def _find_cache(trained: DataFacts) -> DataFacts | None:
    return cache_store.find(Path(trained.cache_dir).name)


def _find_or_build_data(plan: LaunchPlan, config: RunConfig) -> DataFacts:
    """Find the data cache on this machine by its key, or build it with `config`, and compare its content with the plan."""
    trained = plan.data
    if trained is None:
        raise SubmitError("the plan in the mirror has no data", where=plan.run_name)
    if (local := _find_cache(trained)) is None:
        if problems := check_sources(config.data):
            remedy = "copy the data to this path; nothing else is missing on this machine"
            raise ConfigError([Problem(problem.message, problem.where, problem.value, remedy) for problem in problems])
        prepare(config)
        local = cache_store.find_built(config.data, config.model.tokenizer or config.model.path or "")
    if local is None:
        raise DataError(Problem("the data cache is missing or damaged right after it was built", where=str(cache_root())))
    expected, actual = trained.contents(), local.contents()
    if differing := [name for name in expected if expected[name] != actual[name]]:
        first = differing[0]
        raise DataError(
            Problem(
                "the data on this machine differs from the data that the run was trained on",
                where="data.sources",
                value=f"{first}: {actual[first]} on this machine, {expected[first]} in the run",
                remedy="copy the same files to this machine, and install the same versions of transformers and tokenizers",
            )
        )
    return local


def _print_note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
