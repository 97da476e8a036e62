"""Run directories on disk: each is created once, its state is replaced atomically, its attempts are numbered.

A copy of the package is part of it: queued and resumed jobs run the code that was submitted.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from launcher import clock
from launcher.errors import DamagedRun, LauncherError, SubmitError, Superseded, UnreadableRun, did_you_mean
from launcher.plan.gpu_types import Price
from launcher.plan.run_dir import SCHEMA_VERSION, RunDir
from launcher.runs import atomic_files, journal, json_records, locks
from launcher.runs.journal import StatusChanged
from launcher.runs.run_records import Attempt, Status
from launcher.security import folders
from launcher.security.folders import make_own_folder
from launcher.security.redaction import redacted_command_line
from launcher.shell_commands import launcher_command, shell_command

if TYPE_CHECKING:
    from launcher.plan.launch_plan import LaunchPlan

_NUM_NAMES = 10
_FILES_OF_A_RUN = ("plan.json", "status.json", "plans", "checkpoints", "attempts")
# The package to copy.
_PACKAGE = Path(__file__).resolve().parents[1]
# In the code's folder: which plans this code reads.
_PLAN_SCHEMA = "plan_schema_version"


def create(plan: LaunchPlan) -> RunDir:
    """Create the run directory of a plan, with the plan and a snapshot of the code.

    Raises:
        SubmitError: if the directory already exists, cannot be created, or other users could change or replace it.
    """
    run = RunDir(Path(plan.run_dir))
    try:
        make_own_folder(run.root.parent)
        run.root.mkdir(mode=0o700)
    except OSError as error:
        if not run.root.exists():
            raise SubmitError(
                f"the run directory cannot be created: {error.strerror}",
                where=str(run.root),
                remedy="set run.root to a folder you can write to",
            ) from None
        require_new(run)
        raise
    try:
        if problem := folders.run_problem(run.root):
            raise SubmitError(
                replace(problem, remedy=f"set run.root to a folder that only you can write to; or {problem.remedy}")
            )
        atomic_files.fsync_path(run.root.parent)
        run.attempts.mkdir()
        copy_code(run.code)
        atomic_files.write_text(run.plan, plan.to_json())
        _archive_plan(run, plan)
        write_status(run, Status(state="pending", attempt=0, max_steps=plan.batch.max_steps, created_at=clock.now()))
    except BaseException as error:
        # An incomplete run would block its name.
        shutil.rmtree(run.root, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise SubmitError(
            f"the run directory cannot be written: {error.strerror or error}",
            where=str(run.root),
            remedy="free space there, or set run.root to a folder on another disk",
        ) from error
    return run


def require_new(run: RunDir) -> None:
    """Reject a run whose directory exists."""
    if run.root.exists():
        raise SubmitError(
            f"the run {run.root.name} exists already; nothing in it was touched",
            where=str(run.root),
            remedy=f"continue it with: {launcher_command('resume', run.root)}, or choose another run.name",
        )


def attempt_numbers(run: RunDir) -> list[int]:
    """Return the numbers of the attempts, oldest first, except one that is being created right now."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return sorted(int(name) for name in os.listdir(run.attempts) if name.isascii() and name.isdigit())
    return []


def newest_attempt(run: RunDir) -> int:
    """Return the number of the newest attempt, 0 if there is none."""
    return max(attempt_numbers(run), default=0)


def create_attempt(run: RunDir, attempt: Attempt) -> int:
    """Create the directory of the next attempt and return its number; it supersedes the previous attempt.

    If `attempts/` was deleted, it is recreated, and numbering continues after the last attempt in the status, because checkpoints
    and metrics contain its number.
    """
    adopt_clock(run)
    number = 1 + newest_attempt(run)
    if not run.attempts.is_dir():
        number = max(number, 1 + read_status(run).attempt)
    # Rename it into place when complete: a directory without attempt.json would block every later start of the run.
    unfinished = run.attempts / f".{number:03d}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700, parents=True)
    # On a full disk an existing folder may still take a file.
    (unfinished / "journal").mkdir()
    json_records.write(unfinished / "attempt.json", replace(attempt, submitted_at=clock.now(), clock=clock.reading()))
    atomic_files.rename(unfinished, run.attempt(number))
    return number


def adopt_clock(run: RunDir) -> None:
    """Use the clock of a run: its newest attempt's, if that is of this machine and boot, or else the wall clock."""
    recorded = ""
    with suppress(LauncherError, OSError):
        recorded = read_attempt(run, newest_attempt(run)).clock
    clock.adopt(recorded)


def read_attempt(run: RunDir, number: int) -> Attempt:
    return json_records.read(Attempt, run.attempt(number) / "attempt.json", record_remedy(run))


def find_attempt(run: RunDir, number: int) -> Attempt | None:
    """Return what an attempt started from, None if its attempt.json is missing or damaged: only its own start depends on it."""
    try:
        return read_attempt(run, number)
    except UnreadableRun:
        raise
    except DamagedRun:
        return None


def write_attempt(run: RunDir, number: int, attempt: Attempt) -> None:
    json_records.write(run.attempt(number) / "attempt.json", replace(attempt, clock=clock.reading()))


def fence(run: RunDir, attempt: int, refresh: bool = False) -> None:
    """Raise for a superseded attempt: a node that was cut off may still be running and write late.

    A network file system may show a directory's state from up to a minute ago; `refresh` makes it read the directory again.

    Raises:
        Superseded: if a later attempt exists.
        OSError: if storage does not answer, with `refresh` only.
    """
    if refresh:
        atomic_files.refresh_directory(run.attempts)
    try:
        # Attempts are numbered without gaps, so one lookup suffices; it is cheap enough for every logged step.
        is_superseded = run.attempt(attempt + 1).exists()
    except OSError:
        # Without `refresh`, nothing depends on the answer, so a storage error is no reason to lose machines.
        if refresh:
            raise
        is_superseded = False
    if is_superseded:
        raise Superseded(
            f"attempt {attempt} is superseded: attempt {attempt + 1} has taken over; attempt {attempt} writes nothing more",
            where=str(run.attempt(attempt + 1)),
        )


def describe_storage_problem(run: RunDir) -> str:
    """If the run directory is not writable, return this as the second part of a message; otherwise return an empty string.

    This explains a run that could not record its end better than a missing record does.
    """
    try:
        atomic_files.refresh_directory(run.root)
    except OSError as error:
        return f"; the run directory cannot be written ({error.strerror or error}): check its storage, then resume the run"
    return ""


def read_status(run: RunDir) -> Status:
    """Read the run's status. status.json is a cache: without it, the attempts' journals hold the status at its last change."""
    try:
        return json_records.read(Status, run.status, record_remedy(run))
    except DamagedRun as error:
        if isinstance(error, UnreadableRun) or not run.plan.is_file():
            raise
    for number in reversed(attempt_numbers(run)):
        if (status := journal.fold(journal.read(run, number, "attempt")).status) is not None:
            return status
    max_steps = read_plan_values(run.plan)["batch"]["max_steps"]
    return Status("pending", 0, max_steps=max_steps, created_at=run.plan.stat().st_mtime)


def write_status(run: RunDir, status: Status) -> None:
    json_records.write(run.status, replace(status, updated_at=clock.now()))


def update_status(run: RunDir, **changes: Any) -> Status:
    """Change some fields. Only one process at a time may call this: the agent outside training, rank 0 during it."""
    before = read_status(run)
    status = replace(before, **changes)
    if _without_progress(status) != _without_progress(before) and (number := newest_attempt(run)):
        journal.append(run, number, StatusChanged(status=status))
    write_status(run, status)
    return status


def _without_progress(status: Status) -> Status:
    """Return a status without what changes during training: step, message, and whether a checkpoint is being saved."""
    status = replace(status, step=0, updated_at=0.0)
    return replace(status, state="running", message="") if status.state in ("running", "saving") else status


def write_plan(run: RunDir, attempt: int, plan: LaunchPlan) -> Path:
    """Write a plan for one attempt and return its path."""
    path = run.attempt(attempt) / "plan.json"
    atomic_files.write_text(path, plan.to_json())
    _archive_plan(run, plan)
    return path


def _archive_plan(run: RunDir, plan: LaunchPlan) -> None:
    """Keep a copy under the plan's digest, which checkpoints refer to; the copy outlives changes to plan.json."""
    run.plans.mkdir(exist_ok=True)
    atomic_files.write_text(run.plans / f"{plan.digest()}.json", plan.to_json())


def find_plan(run: RunDir, digest: str) -> LaunchPlan | None:
    """Return the plan with this digest, or None if no file of the run contains it unchanged."""
    from launcher.plan.launch_plan import LaunchPlan, digest_of

    for path in (run.plan, *changed_plan_paths(run), *sorted(run.plans.glob("*.json"))):
        try:
            text = json_records.read_bytes(path).decode()
            # Another version of the launcher may have written the file; the digest is of the text.
            if digest_of(text) == digest:
                return LaunchPlan.from_json(text)
        except (OSError, ValueError):
            continue
    return None


def changed_plan_paths(run: RunDir) -> list[Path]:
    """Return the paths of the plans of attempts whose settings a resume changed, oldest first."""
    paths = (run.attempt(number) / "plan.json" for number in attempt_numbers(run))
    return [path for path in paths if path.is_file()]


def newest_plan_path(run: RunDir) -> Path:
    """Return the path of the newest attempt's plan: its own if a resume changed settings, else the run's."""
    return [run.plan, *changed_plan_paths(run)][-1]


def load_plans_until(run: RunDir, attempt: int) -> list[LaunchPlan]:
    """Load the plans of the attempts up to `attempt`, oldest first, skipping unreadable ones."""
    from launcher.plan.launch_plan import LaunchPlan

    plans = []
    for path in (run.plan, *(p for p in changed_plan_paths(run) if int(p.parent.name) <= attempt)):
        with suppress(OSError, ValueError):
            plans.append(LaunchPlan.load(path))
    return plans


def load_plan(run: RunDir) -> LaunchPlan:
    """Load the plan of the newest attempt: its own if a resume changed settings, else the run's.

    Raises:
        RunError: if it is damaged or has an unknown schema version.
    """
    # Importing the plan models takes longer than everything else in commands on runs.
    from launcher.plan.launch_plan import LaunchPlan

    path = newest_plan_path(run)
    try:
        return LaunchPlan.load(path)
    except (OSError, ValueError) as error:
        raise unreadable_plan(path, str(error)) from None


def read_plan_values(path: Path) -> dict[str, Any]:
    """Read a plan's JSON object without importing the plan models.

    Raises:
        DamagedRun: if the file is missing or damaged, or its schema version is unknown.
    """
    try:
        values = json_records.read_json(path)
    except DamagedRun as error:
        raise DamagedRun(replace(problem, remedy=problem.remedy or plan_remedy(path)) for problem in error.problems) from None
    if (version := values.get("schema_version")) != SCHEMA_VERSION:
        raise unreadable_plan(path, f"schema_version is {version!r}, and this launcher reads {SCHEMA_VERSION}")
    return values


class Placement(NamedTuple):
    """A run's name, backend kind, number of ranks, device (cuda or cpu), price and limits.

    `price`, `max_usd` and `max_hours` are None if they are unknown or not set.
    """

    name: str
    kind: str
    num_ranks: int
    device: str
    price: Price | None
    max_usd: float | None
    max_hours: float | None


def read_placement(run: RunDir) -> Placement:
    """Read the placement from the newest attempt's plan, without parsing the complete plan.

    Raises:
        RunError: if the plan is damaged.
    """
    path = newest_plan_path(run)
    values = read_plan_values(path)
    try:
        topology, price = values["topology"], Price.of_plan(values)
        config = values["config"]
        limits = config["run"].get("max_usd"), config["run"].get("max_hours")
        name, kind, num_ranks = values["run_name"], config["cluster"]["kind"], topology["world_size"]
        if type(num_ranks) is not int:
            raise TypeError("the number of ranks is not a number")
        return Placement(name, kind, num_ranks, topology["device"], price, *limits)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise unreadable_plan(path, "settings are missing") from None


@contextmanager
def start_lock(run: RunDir, wait_s: float = 0) -> Iterator[None]:
    """Hold the run's lock while an attempt is started or files of the run are removed.

    Raises:
        SubmitError: if another command holds it after `wait_s` seconds; names the process.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locks.hold(run.lock, wait_s, redacted_command_line()))
        except locks.LockTimeout:
            # It is unknown in the moment in which the holder writes it.
            holder = locks.read_holder(run.lock)
            raise SubmitError(
                "another command is starting this run right now",
                where=str(run.root),
                value=str(holder or ""),
                remedy="wait until it is done" + (f", or end it on {holder.host}: kill {holder.pid}" if holder else ""),
            ) from None
        except OSError as error:
            raise SubmitError(
                f"the run directory cannot be written: {error.strerror or error}",
                where=str(run.root),
                remedy="mount its storage for writing, free space, or ask the run's owner; the checkpoints are kept",
            ) from None
        yield


def find_run(name: str, root: Path, markers: Sequence[str] = ("plan.json",)) -> RunDir:
    """Find a run by its name under `root` or by the path of its directory, which must contain one of the files `markers`.

    Raises:
        SubmitError: if there is no such run or it cannot be read; names the runs that exist.
    """
    for candidate in (root / name, Path(name).expanduser()):
        try:
            if any((candidate / marker).is_file() for marker in markers):
                return RunDir(candidate.resolve())
        except OSError as error:
            remedy = "check the storage and your access to it, then try again"
            message = f"the run {name} cannot be read: {error.strerror}"
            raise SubmitError(message, where=str(candidate), remedy=remedy) from None
    for candidate in (root / name, Path(name).expanduser().absolute()):
        # Path.resolve raises for a link that points to itself.
        is_root = os.path.realpath(candidate) == os.path.realpath(root)
        if not is_root and any((candidate / file).exists() for file in _FILES_OF_A_RUN):
            run = RunDir(candidate.resolve())
            raise SubmitError(f"the run {name} has no plan.json", where=str(run.root), remedy=plan_remedy(run.plan))
        if candidate.is_dir():
            remedy = f"list runs with: {launcher_command('ls')}"
            raise SubmitError(f"{name} is a folder, but not a run: it has no plan.json", where=str(candidate), remedy=remedy)
    names = [run.root.name for run in list_runs(root)]
    remedy = f"start one with: {launcher_command('train')}"
    if names:
        remedy = f"{did_you_mean(name, names)} choose one of: {', '.join(names[:_NUM_NAMES])}".lstrip()
    raise SubmitError(f"there is no run named {name}", where=str(root), remedy=f"{remedy}; --root names another folder of runs")


def find_own_run(name: str, root: Path) -> RunDir:
    """Find a run as `find_run` does, and refuse one that other users could change or replace."""
    run = find_run(name, root)
    folders.require_run(run.root)
    return run


def list_runs(root: Path) -> Iterator[RunDir]:
    """Yield the runs under `root`, the most recent first."""
    planned_at: dict[Path, float] = {}
    for path in root.iterdir() if root.is_dir() else ():
        # Each file may be removed at any time, and another user's run may not be readable.
        with suppress(OSError):
            if not path.name.startswith(atomic_files.REMOVING_PREFIX) and (plan := path / "plan.json").is_file():
                planned_at[path] = plan.stat().st_mtime
    yield from (RunDir(path) for path in sorted(planned_at, key=planned_at.__getitem__, reverse=True))


# The code of a run


def copy_code(folder: Path) -> None:
    """Copy the package to a folder that does not exist yet, and make everything durable.

    The copy includes the bytecode, so that nodes need not compile the package again.
    """

    def list_left_out(parent: str, names: list[str]) -> set[str]:
        # Plans hold the settings; and files that are being written, and bytecode that this user may not read.
        bytecode = [name for name in names if name == "__pycache__" or name.endswith(".pyc")]
        unreadable = {name for name in bytecode if not os.access(f"{parent}/{name}", os.R_OK, effective_ids=True)}
        return {"conf", *fnmatch.filter(names, "*.pyc.*"), *unreadable}

    shutil.copytree(_PACKAGE, folder / "launcher", ignore=list_left_out)
    (folder / _PLAN_SCHEMA).write_text(f"{plan_schema()}\n", encoding="utf-8")
    # Without this, files may be empty after a power loss, and every later attempt runs them.
    atomic_files.fsync_tree(folder)


def is_code_current(run: RunDir) -> bool:
    """Return True if the code of the run reads the plans that this launcher writes."""
    try:
        return (run.code / _PLAN_SCHEMA).read_text(encoding="utf-8").strip() == plan_schema()
    except FileNotFoundError:
        return False


def plan_schema() -> str:
    """Return the schema version of plans with a digest of their keys: code rejects unknown settings."""
    from launcher.plan.launch_plan import LaunchPlan

    schema = LaunchPlan.model_json_schema()
    keys = {name: sorted(one.get("properties", ())) for name, one in {**schema.get("$defs", {}), "": schema}.items()}
    return f"{SCHEMA_VERSION} {xxhash.xxh3_64_hexdigest(json.dumps(keys, sort_keys=True).encode())}"


def replace_code(run: RunDir, newest_attempt: int) -> Path:
    """Replace the code that previous attempts ran with a copy of this package; returns the folder that keeps the earlier code."""
    earlier = run.earlier_code(newest_attempt)
    copy = run.root / ".code"
    shutil.rmtree(copy, ignore_errors=True)
    copy_code(copy)
    if run.code.is_dir() and not earlier.exists():
        run.code.rename(earlier)
    shutil.rmtree(run.code, ignore_errors=True)
    atomic_files.rename(copy, run.code)
    return earlier


# Missing and damaged files, with the commands to copy


def record_remedy(run: RunDir) -> str:
    """Return how to continue without a record such as status.json."""
    weights = launcher_command(f"model.path=run:{run.root}")
    return f"restore the file from a backup, or start another run from this run's newest checkpoint: {weights} ..."


def plan_remedy(path: Path) -> str:
    """Return how to restore a plan: plans/ keeps a copy of each, under its digest."""
    from launcher.plan.launch_plan import digest_of

    run = RunDir(path.parent if path.parent.parent.name != "attempts" else path.parents[2])
    copies = []
    with suppress(OSError):
        copies = sorted(run.plans.glob("*.json"), key=lambda copy: copy.stat().st_mtime)
    # The run's own plan was stored first; an attempt's plan may be any of the others.
    for copy in copies if path == run.plan else reversed(copies):
        with suppress(OSError, ValueError):
            if digest_of(json_records.read_bytes(copy).decode()) == copy.stem:
                return f"restore it with: {shell_command('cp', copy, path)}"
    return "restore the file from a backup"


def unreadable_plan(path: Path, value: str) -> DamagedRun:
    """Return the error of a plan that is damaged or of an unknown schema; `value` is the reason."""
    message = "the plan of this run cannot be read by this launcher"
    return DamagedRun(message, where=str(path), value=value, remedy=plan_remedy(path))
