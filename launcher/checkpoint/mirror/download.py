"""Download a run from its mirror into a run directory on another machine."""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import xxhash

from launcher import atomic_files
from launcher.atomic_files import FileEntry
from launcher.checkpoint import store
from launcher.checkpoint.manifest import LATER_EVALUATION, MANIFEST, Manifest
from launcher.checkpoint.mirror.layout import CHECKPOINTS, CODE, MirroredRun, read_complete_checkpoints, read_later_evaluation
from launcher.checkpoint.mirror.remote_folder import RemoteFolder
from launcher.checkpoint.mirror.upload import PARALLEL
from launcher.errors import CheckpointError, Problem, SubmitError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.quantities import format_count
from launcher.plan.run_dir import RunDir
from launcher.security.folders import make_own_folder
from launcher.shell_commands import launcher_command

Notify = Callable[[str], None]
MakeProgress = Callable[[str, int], Callable[[int], None]]

# Marks a run directory whose download is incomplete; contains the mirror's address.
MARKER = ".fetching"
_UNFINISHED = ".fetching-"


def claim_run_dir(run: RunDir, url: str) -> None:
    """Create the run directory, or continue an interrupted download from the same address.

    Raises:
        SubmitError: if it belongs to another run (which is not changed) or to another user, or cannot be created.
    """
    marker = run.root / MARKER
    try:
        make_own_folder(run.root.parent)
        run.root.mkdir(mode=0o700)
    except FileExistsError:
        if marker.is_file() and marker.read_text() == url:
            return
        raise SubmitError(
            f"the run directory {run.root.name} exists already; nothing in it was touched",
            where=str(run.root),
            remedy=f"continue that run with: {launcher_command('resume', run.root)}, or choose another --root",
        ) from None
    except OSError as error:
        raise SubmitError(f"the run directory cannot be created: {error.strerror}", where=str(run.root)) from None
    atomic_files.write_text(marker, url)


def download_fixed_files(remote: RemoteFolder, mirrored: MirroredRun, run: RunDir) -> dict[str, LaunchPlan]:
    """Download code, model and attempt files into the run directory; return the plans by name, without writing them.

    Raises:
        CheckpointError: if a file is missing or damaged.
    """
    plans: dict[str, LaunchPlan] = {}
    for name, entry in mirrored.files.items():
        content, target = remote.read(name), run.root / name
        if content is None or FileEntry(size=len(content), xxh3_128=xxhash.xxh3_128_hexdigest(content)) != entry:
            message = "a file of the mirror is missing" if content is None else "a file of the mirror is damaged"
            raise CheckpointError(message, where=f"{remote.url}/{name}")
        if target.name == run.plan.name:
            try:
                plans[name] = LaunchPlan.from_json(content)
            except ValueError as error:
                message = "the plan in the mirror cannot be read by this launcher"
                raise CheckpointError(message, where=f"{remote.url}/{name}", value=str(error)) from None
        elif name == CODE:
            unpacked = run.code.with_name(f"{_UNFINISHED}{run.code.name}")
            # extractall() strips `..` and leading slashes from names.
            zipfile.ZipFile(io.BytesIO(content)).extractall(unpacked)
            atomic_files.replace_directory(unpacked, run.code)
        else:
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            atomic_files.write_bytes(target, content)
    run.attempts.mkdir(exist_ok=True)
    return plans


def download_progress(remote: RemoteFolder, run: RunDir) -> None:
    """Download metrics, events and status."""
    for path in (run.metrics, run.events, run.status):
        with suppress(FileNotFoundError):
            remote.receive(path.name, path)


def download_checkpoint(remote: RemoteFolder, run: RunDir, step: int | None, notify: Notify, make_progress: MakeProgress) -> int:
    """Download the newest complete checkpoint, or the one at `step`, verify its digests, and return its step.

    If it is damaged, report this and fetch the previous one, unless `step` requests it.

    Raises:
        CheckpointError: if there is none, or if none is intact.
    """
    complete = read_complete_checkpoints(remote)
    steps = ", ".join(map(str, complete)) or "none"
    wanted = [step] if step is not None else sorted(complete, reverse=True)
    if not wanted or any(w not in complete for w in wanted):
        message = "the mirror has no complete checkpoint" + ("" if step is None else f" of step {step}")
        raise CheckpointError(message, where=remote.url, value=f"complete: {steps}")
    damaged: list[Problem] = []
    for candidate in wanted:
        problems = _download(remote, run.checkpoints, complete[candidate], notify, make_progress)
        if not problems:
            return candidate
        damaged += problems
        notify(f"step {candidate} is damaged in the mirror: {problems[0].message} ({problems[0].where})")
    raise CheckpointError(damaged)


def _download(remote: RemoteFolder, root: Path, manifest: Manifest, notify: Notify, make_progress: MakeProgress) -> list[Problem]:
    """Download one checkpoint; return its problems, none if it is intact."""
    target = root / store.step_name(manifest.step)
    if target.is_dir() and not store.verify(target):
        return []
    num_bytes = sum(entry.size for entry in manifest.files.values())
    unfinished = root / f"{_UNFINISHED}{target.name}"
    unfinished.mkdir(mode=0o700, parents=True, exist_ok=True)
    store.require_free_bytes(root, num_bytes - sum(path.stat().st_size for path in unfinished.iterdir()))
    notify(f"fetching step {manifest.step}: {num_bytes / 2**30:.2f} GiB in {format_count(len(manifest.files), 'file')}")
    advance = make_progress(f"fetching step {manifest.step}", num_bytes)

    def receive(name: str) -> Problem | None:
        path = unfinished / name
        if path.is_file() and atomic_files.digest_file(path) == manifest.files[name]:
            advance(manifest.files[name].size)
            return None
        source = f"{CHECKPOINTS}/{target.name}/{name}"
        where = f"{remote.url}/{source}"
        try:
            entry = remote.receive(source, path, advance)
        except FileNotFoundError:
            return Problem("a file of the checkpoint is missing in the mirror", where=where)
        return None if entry == manifest.files[name] else Problem("a file differs from the manifest's digest", where=where)

    with ThreadPoolExecutor(PARALLEL) as pool:
        problems = [problem for problem in pool.map(receive, manifest.files) if problem is not None]
    if problems:
        shutil.rmtree(unfinished, ignore_errors=True)
        return problems
    if (evaluation := read_later_evaluation(remote, manifest.step)) is not None:
        atomic_files.write_text(unfinished / LATER_EVALUATION, evaluation.to_json())
    atomic_files.write_text(unfinished / MANIFEST, manifest.to_json())
    atomic_files.replace_directory(unfinished, target)
    return []


def write_plans(run: RunDir, plans: Mapping[str, LaunchPlan]) -> None:
    """Write the plans, the run's own plan last: it turns the directory into a run."""
    for name in sorted(plans, key=lambda name: name == run.plan.name):
        path = run.root / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        atomic_files.write_text(path, plans[name].to_json())
    (run.root / MARKER).unlink()
