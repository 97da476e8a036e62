"""The mirror of a run, a copy at another address: uploaded while the run trains, and downloaded to another machine.

    <checkpoint.mirror>/<run name>/
      run.json                 the owner of the mirror; sizes and digests of the files below, written after them
      plan.json                also attempts/NNN/plan.json, if a resume changed it, and attempts/NNN/attempt.json
      plans/                   every plan under the digest that checkpoints name
      code.zip                 the code as submitted
      model/ tokenizer/        config.json and the tokenizer's files; the weights are in the checkpoints
      status.json metrics.jsonl events.jsonl       as of the newest checkpoint
      checkpoints/step-00000100/    as in the run directory; the manifest comes last, and after it a loss that was computed later

Committed checkpoints are sent oldest first. A checkpoint without its manifest does not exist: its upload starts again.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import xxhash
from pydantic import Field, ValidationError

from launcher.checkpoint import store
from launcher.checkpoint.manifest import (
    FORMAT_VERSION,
    LATER_EVALUATION,
    MANIFEST,
    Checkpoint,
    LaterEvaluation,
    Manifest,
    parse_later_evaluation,
    read_manifest,
)
from launcher.checkpoint.remote_folder import RemoteFolder, convert_storage_errors, require_writable
from launcher.config.sections.fields import Name
from launcher.errors import CheckpointError, Problem, RunError, SubmitError, UnreadableCheckpoint
from launcher.plan.launch_plan import LaunchPlan, Record
from launcher.plan.quantities import format_count
from launcher.plan.run_dir import RunDir, parse_step
from launcher.runs import atomic_files, journal, run_store
from launcher.runs.atomic_files import FileEntry
from launcher.security.folders import make_own_folder
from launcher.shell_commands import launcher_command

Notify = Callable[[str], None]
MakeProgress = Callable[[str, int], Callable[[int], None]]

RUN = "run.json"
CHECKPOINTS = "checkpoints"
CODE = "code.zip"
# Parallel uploads: object storage is fast only in parallel. Each holds two blocks in memory.
PARALLEL = 4
# Files that transformers reads, besides weights.
_MODEL_FILES = (
    *("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "tokenizer*", "vocab.*", "chat_template*"),
    "additional_chat_templates/*",
)
# Marks a run directory whose download is incomplete; contains the mirror's address.
MARKER = ".fetching"
_UNFINISHED = ".fetching-"


class Owner(Record):
    """The attempt that writes to the mirror: W&B id of its run, run directory and host."""

    wandb_id: str
    attempt: int
    run_dir: str
    host: str


class MirroredRun(Record):
    """Content of run.json. `files` maps names in the mirror to the files that do not change while an attempt runs."""

    run_name: Name
    owner: Owner
    files: dict[str, FileEntry] = Field(default_factory=dict)


def read_run(remote: RemoteFolder) -> MirroredRun | None:
    """Read run.json; None if there is none."""
    content = remote.read(RUN)
    if content is None:
        return None
    try:
        return MirroredRun.model_validate_json(content)
    except ValidationError as error:
        message = "the mirror's run.json is damaged, or was written by an incompatible launcher"
        raise CheckpointError(message, where=f"{remote.url}/{RUN}", value=error.errors()[0]["msg"]) from None


def read_complete_checkpoints(remote: RemoteFolder) -> dict[int, Manifest]:
    """Read the manifests of the complete checkpoints in a run's mirror, by ascending step."""
    manifests = {}
    for name in remote.names(CHECKPOINTS):
        step = parse_step(name)
        content = remote.read(f"{CHECKPOINTS}/{name}/{MANIFEST}") if step is not None else None
        if step is None or content is None:
            continue
        try:
            manifest = Manifest.from_json(content)
        except ValueError:
            continue
        if manifest.step == step and manifest.format_version == FORMAT_VERSION:
            manifests[step] = manifest
    return dict(sorted(manifests.items()))


def _read_evaluation(remote: RemoteFolder, step: int) -> LaterEvaluation | None:
    """Read the loss that was computed after the save of a checkpoint in a run's mirror, or None if there is none."""
    content = remote.read(f"{_folder_name(step)}/{LATER_EVALUATION}")
    return None if content is None else parse_later_evaluation(content)


class MirrorTaken(RunError):
    """The mirror belongs to another run, or to a later attempt of this one."""


class CheckpointGone(RunError):
    """The checkpoint was removed from the run directory during its upload."""


class Mirror:
    """Uploads one run to its mirror; use one process at a time."""

    def __init__(self, remote: RemoteFolder, run: RunDir, plan: LaunchPlan, attempt: int) -> None:
        self._remote = remote
        self._run = run
        self._plan = plan
        self._owner = Owner(wandb_id=plan.wandb_id, attempt=attempt, run_dir=str(run.root), host=os.uname().nodename)
        # The manifest of every checkpoint that is complete in the mirror.
        self._complete: dict[int, Manifest] = {}
        # The losses of checkpoints that were evaluated after their save.
        self._evaluations: dict[int, LaterEvaluation] = {}
        self._sent_sizes: dict[str, int] = {}
        # The bytes of the files that have arrived of the checkpoint in upload.
        self.num_arrived = 0

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints in the mirror, ascending."""
        return sorted(self._complete)

    def begin(self) -> None:
        """Claim the mirror for this attempt, upload the files that do not change, and list the complete checkpoints.

        Raises:
            MirrorTaken: if it belongs to another run, or to a later attempt of this one.
        """
        self._require_ours(is_begun=False)
        files = {name: self._remote.send(name, path) for name, path in _list_fixed_files(self._run, self._plan)}
        code = io.BytesIO()
        with zipfile.ZipFile(code, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
            for path in sorted(self._run.code.rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    archive.write(path, path.relative_to(self._run.code))
        files[CODE] = self._remote.write(CODE, code.getvalue())
        self.send_progress()
        mine = MirroredRun(run_name=self._plan.run_name, owner=self._owner, files=files)
        self._remote.write(RUN, mine.model_dump_json(indent=2).encode())
        self._complete = read_complete_checkpoints(self._remote)
        evaluations = {step: _read_evaluation(self._remote, step) for step in self._complete}
        self._evaluations = {step: one for step, one in evaluations.items() if one is not None}

    def list_missing_checkpoints(self) -> list[Checkpoint]:
        """Return the committed checkpoints that are missing in the mirror, oldest first."""
        return [c for c in store.list_checkpoints(self._run.checkpoints) if self._complete.get(c.step) != c.manifest]

    def send(self, checkpoint: Checkpoint) -> int:
        """Upload a checkpoint, its manifest last; return its bytes.

        Raises:
            CheckpointGone: if it was removed from the run directory meanwhile; it is then removed from the mirror too.
            CheckpointError: if a file differs from its manifest.
            MirrorTaken, Superseded: if another attempt has taken over.
        """
        folder = _folder_name(checkpoint.step)
        self._require_ours()
        # A crash must not leave files of two checkpoints, nor the loss of another.
        self._complete.pop(checkpoint.step, None)
        self._evaluations.pop(checkpoint.step, None)
        self._remote.remove_folder(folder, MANIFEST)
        self.num_arrived, files = 0, checkpoint.manifest.files

        def send_file(name: str) -> None:
            entry = self._remote.send(f"{folder}/{name}", checkpoint.path / name)
            if entry != files[name]:
                raise CheckpointError("a checkpoint file differs from its manifest", where=str(checkpoint.path / name))
            self.num_arrived += entry.size

        try:
            with ThreadPoolExecutor(PARALLEL, thread_name_prefix="send") as pool:
                # Large files first, so that a small one finishes last.
                list(pool.map(send_file, sorted(files, key=lambda name: -files[name].size)))
        except Exception:
            # Network file systems raise various errors for a file that is removed while it is read.
            if _is_unchanged_locally(checkpoint):
                raise
        if not _is_unchanged_locally(checkpoint):
            self._remote.remove_folder(folder, MANIFEST)
            raise CheckpointGone(checkpoint.path.name)
        # Metrics first: a complete checkpoint in the mirror has the metrics of its steps.
        self.send_progress()
        self._require_ours()
        self._remote.write(f"{folder}/{MANIFEST}", checkpoint.manifest.to_json().encode())
        self._complete[checkpoint.step] = checkpoint.manifest
        return sum(entry.size for entry in files.values())

    def send_progress(self) -> None:
        """Upload metrics and events if they have grown, and the status."""
        for source in (self._run.metrics, self._run.events):
            size = source.stat().st_size if source.is_file() else 0
            if size and self._sent_sizes.get(source.name) != size:
                self._remote.send(source.name, source)
                self._sent_sizes[source.name] = size
        status = run_store.read_status(self._run)
        outcome = journal.read_training(self._run, self._owner.attempt) if status.attempt == self._owner.attempt else None
        if outcome is not None:
            # The agent writes the final state only after the mirror process has ended.
            status = replace(status, state=outcome.state, step=outcome.step, message=outcome.message)
        self._remote.write(self._run.status.name, json.dumps(asdict(status), indent=2).encode())

    def send_evaluations(self) -> None:
        """Upload the losses that were computed after the saves of checkpoints that are complete in the mirror."""
        for checkpoint in store.list_checkpoints(self._run.checkpoints):
            evaluation, step = checkpoint.later_evaluation, checkpoint.step
            is_sent = self._complete.get(step) == checkpoint.manifest
            if is_sent and evaluation is not None and self._evaluations.get(step) != evaluation:
                self._require_ours()
                self._remote.write(f"{_folder_name(step)}/{LATER_EVALUATION}", evaluation.to_json().encode())
                self._evaluations[step] = evaluation

    def prune(self) -> list[int]:
        """Remove checkpoints that the run's settings do not keep or that a resume abandoned; returns their steps.

        The run directory may hold fewer: a resume from the mirror downloads one checkpoint, and the others exist only in the
        mirror. Steps that have a directory in the run directory stay, even damaged ones.
        """
        root = self._run.checkpoints
        local_steps = {step for path in root.glob("step-*") if (step := parse_step(path.name)) is not None}
        # A resume from a step that a person chose abandons the later steps of earlier attempts.
        attempts = {number: run_store.find_attempt(self._run, number) for number in run_store.attempt_numbers(self._run)}
        resume_steps = {number: attempt.resume_step or 0 for number, attempt in attempts.items() if attempt and attempt.pinned}
        continued = [
            Checkpoint(root / store.step_name(step), manifest, self._evaluations.get(step))
            for step, manifest in sorted(self._complete.items())
            if not any(step > start and manifest.attempt < number for number, start in resume_steps.items())
        ]
        outdated = store.select_outdated(continued, store.retention_of(self._run, self._plan))
        kept_steps = local_steps | ({c.step for c in continued} - {c.step for c in outdated})
        removed = []
        for name in self._remote.names(CHECKPOINTS):
            step = parse_step(name)
            if step is None or step in kept_steps:
                continue
            self._require_ours()
            self._complete.pop(step, None)
            self._evaluations.pop(step, None)
            self._remote.remove_folder(f"{CHECKPOINTS}/{name}", MANIFEST)
            removed.append(step)
        return removed

    def _require_ours(self, is_begun: bool = True) -> None:
        run_store.fence(self._run, self._owner.attempt)
        known = read_run(self._remote)
        owner = self._owner if known is None else known.owner
        if owner.wandb_id != self._owner.wandb_id:
            raise MirrorTaken(f"the mirror holds another run named {self._plan.run_name}, from {owner.run_dir} on {owner.host}")
        if owner.attempt > self._owner.attempt or (is_begun and owner != self._owner):
            raise MirrorTaken(f"attempt {owner.attempt} on {owner.host} writes to the mirror: {owner.run_dir}")


def mirror_url(plan: LaunchPlan) -> str:
    """Return the address of the run's mirror."""
    return f"{(plan.config.checkpoint.mirror or '').rstrip('/')}/{plan.run_name}"


def require_usable_mirror(plan: LaunchPlan) -> None:
    """Check the plan's mirror before anything is started.

    Raises:
        SubmitError: if it cannot be written, its package is missing, or it belongs to another run of this name.
    """
    url = plan.config.checkpoint.mirror
    if url is None:
        return
    require_writable(url)
    remote = RemoteFolder(mirror_url(plan))
    with convert_storage_errors(remote, "read"):
        known = read_run(remote)
    if known is not None and known.owner.wandb_id != plan.wandb_id:
        raise SubmitError(
            f"the mirror holds another run named {plan.run_name}",
            where=remote.url,
            value=f"from {known.owner.run_dir} on {known.owner.host}",
            remedy="choose another run.name or another checkpoint.mirror; or continue that run with: "
            f"{launcher_command('resume', remote.url)}",
        )


def _folder_name(step: int) -> str:
    return f"{CHECKPOINTS}/{store.step_name(step)}"


def _is_unchanged_locally(checkpoint: Checkpoint) -> bool:
    """Return whether the checkpoint is still in the run directory; another one of the same step does not count."""
    try:
        return read_manifest(checkpoint.path) == checkpoint.manifest
    except UnreadableCheckpoint:
        # Unknown right now; reading its next file will decide.
        return True
    except CheckpointError:
        return False


def _list_fixed_files(run: RunDir, plan: LaunchPlan) -> Iterator[tuple[str, Path]]:
    """Yield the names in the mirror and the local paths of the files of run, model and tokenizer that do not change."""
    records = [run.attempt(number) / "attempt.json" for number in run_store.attempt_numbers(run)]
    for path in (run.plan, *run_store.changed_plan_paths(run)[-1:], *records, *sorted(run.plans.glob("*.json"))):
        yield str(path.relative_to(run.root)), path
    patterns = (*_MODEL_FILES, *(["*.py"] if plan.config.model.trust_remote_code else []))
    folders = {"model": plan.model.path, "tokenizer": plan.model.tokenizer_path}
    if folders["tokenizer"] == folders["model"]:
        del folders["tokenizer"]
    for kind, folder in ((kind, Path(path)) for kind, path in folders.items() if path is not None):
        for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
            if not path.name.endswith(".index.json"):
                yield f"{kind}/{path.relative_to(folder)}", path


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
    """Download code, model and attempt files into the run directory; return the plans by name, without writing them."""
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
        problems = _fetch(remote, run.checkpoints, complete[candidate], notify, make_progress)
        if not problems:
            return candidate
        damaged += problems
        notify(f"step {candidate} is damaged in the mirror: {problems[0].message} ({problems[0].where})")
    raise CheckpointError(damaged)


def _fetch(remote: RemoteFolder, root: Path, manifest: Manifest, notify: Notify, make_progress: MakeProgress) -> list[Problem]:
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
    if (evaluation := _read_evaluation(remote, manifest.step)) is not None:
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
