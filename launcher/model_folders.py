"""Hugging Face folders of models: fetched from the Hub, converted from GGUF, or exported from a run's checkpoint."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from launcher.checkpoint import store
from launcher.config.sections.model import ModelSection, is_run
from launcher.data.cache_dir import download_cache, own_hub_cache
from launcher.errors import CheckpointError, ConfigError, LauncherError
from launcher.export import model_card
from launcher.export.hf_folder import ExportedFolder, ExportTask, export, verify_checkpoint
from launcher.hardware import is_full
from launcher.models import parent_run
from launcher.models.found_model import converted_folder, locate
from launcher.models.parent_run import ParentCheckpoint
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, locks, run_store
from launcher.security import folders
from launcher.security.redaction import redacted_command_line
from launcher.tracking.jsonl import read_metrics
from launcher.tracking.progress import show_progress, show_waiting

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "README.md", "LICENSE*", "NOTICE*"]
# Longer than it takes to read and write the largest checkpoint.
_LOCK_TIMEOUT_S = 2 * 3600.0


def fetch_model(source: str, model: ModelSection) -> None:
    """Make the folder of `source`, a value of model.path or model.tokenizer, exist on this machine."""
    located = locate(source, model)
    if located.folder is not None:
        return
    if is_run(source):
        with folders.private_files():
            copy_parent_weights(parent_run.find_parent(source), model)
    elif located.source is not None:
        folder = converted_folder(located.source)
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock, activity = folder.with_name(f".{folder.name}.lock"), f"converts {located.source.name}"
        with folders.private_files(), locks.wait_and_hold(lock, activity, redacted_command_line()):
            if folder.exists():
                return
            from launcher.train.model import convert_gguf

            _say(f"converting {located.source.name} to a Hugging Face folder (once)")
            with show_waiting("converting"):
                convert_gguf(located.source, folder)
    else:
        _download(source, model)


def convert_local(source: str, model: ModelSection) -> None:
    """Convert a package's GGUF file to a Hugging Face folder, unless it is already converted or `source` is something else."""
    located = locate(source, model)
    if located.folder is None and located.source is not None and not is_run(source):
        fetch_model(source, model)


def tokenizer_of(plan: LaunchPlan) -> Path | None:
    """Return the folder of a run's tokenizer; fetch it again if the cache that held it was removed."""
    if plan.model.tokenizer_path and Path(plan.model.tokenizer_path).is_dir():
        return Path(plan.model.tokenizer_path)
    name = plan.config.model.tokenizer or plan.config.model.path or ""
    fetch_model(name, plan.config.model)
    return locate(name, plan.config.model).folder


def copy_parent_weights(parent: ParentCheckpoint, model: ModelSection) -> None:
    """Write the parent's weights to the launcher's cache as a Hugging Face folder, which appears only when it is complete."""
    folder = parent_run.weights_folder(parent, model.dtype)
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with locks.hold(folder.with_name(f".{folder.name}.lock"), _LOCK_TIMEOUT_S, redacted_command_line(), mode=0o600):
            if (folder / "config.json").is_file():
                return
            _say(f"copying the weights of run {parent.plan.run_name} at step {parent.checkpoint.step} (once)")
            exported = parent_run.find_export(parent, model.dtype)
            if exported is not None:
                _link_export(exported, folder)
            else:
                # A check would load the whole model, and this machine may lack the memory.
                _export(parent, model, tokenizer_of(parent.plan), model.dtype, folder, check=False)
    except locks.LockTimeout as error:
        raise _make_parent_error(
            parent, "another process is preparing them and has not finished in time", "wait for it, or end it"
        ) from error
    except OSError as error:
        reason = f"{error.strerror or error} ({error.filename or folder})"
        raise _make_parent_error(parent, reason, "check the free space and that the run still has this checkpoint") from error
    except CheckpointError as error:
        problem = error.problems[0]
        reason = f"{problem.message} ({problem.where})" if problem.where else problem.message
        raise _make_parent_error(
            parent, reason, "use another checkpoint (model.path=run:NAME@STEP), and check the disk"
        ) from error


def export_run(plan_path: Path, *, step: int | None, dtype: str, out: Path | None, check: bool = True) -> ExportedFolder:
    """Verify and export one checkpoint of a run: by default the latest one, to the run's `export` folder.

    Raises CheckpointError if there is no such checkpoint or it is damaged, and as `export` does.
    """
    try:
        plan = LaunchPlan.load(plan_path)
    except ValueError as error:
        raise CheckpointError("this launch plan cannot be read", where=str(plan_path), value=str(error)) from error
    # Use plan.json's folder, because the run may have been moved.
    run = RunDir(plan_path.absolute().parent)
    checkpoint = store.get_latest(run.checkpoints) if step is None else store.get_at_step(run.checkpoints, step)
    # A resume may have changed settings; later automatic attempts keep the changes.
    plan = (run_store.load_plans_until(run, checkpoint.manifest.attempt) or [plan])[-1]
    tokenizer = None if plan.model.tokenizer_path is None else tokenizer_of(plan)
    parent = ParentCheckpoint(run, plan, checkpoint)
    return _export(parent, plan.config.model, tokenizer, dtype, (out or run.export).absolute(), check)


def _export(
    parent: ParentCheckpoint, model: ModelSection, tokenizer: Path | None, dtype: str, out: Path, check: bool
) -> ExportedFolder:
    """Verify and export a checkpoint with its model card; `model` says which code may run."""
    base, metrics = Path(parent.plan.model.path or ""), read_metrics(parent.run.metrics, model_card.METRICS)
    plans = run_store.load_plans_until(parent.run, parent.checkpoint.manifest.attempt)
    plan = plans[-1] if plans else parent.plan
    task = ExportTask(
        checkpoint=parent.checkpoint.path,
        # Files in the cache may have been removed since.
        model=base if parent.plan.model.path and (base / "config.json").is_file() else parent.plan.model.config,
        tokenizer=tokenizer,
        out=out,
        dtype=dtype,
        trust_remote_code=model.trust_remote_code,
        code_digest=model.code_digest,
        check=check,
        chat_template=plan.data.chat_template if plan.data else None,
        turn_end_ids=plan.data.turn_end_ids if plan.data else (),
    )
    with show_progress() as make_progress:
        verify_checkpoint(task, make_progress)
        # A run that starts from this folder takes license and base model from its model card.
        return export(
            task,
            lambda made: model_card.render_model_card(plan, parent.checkpoint.manifest, metrics, made, plans),
            make_progress,
        )


def _link_export(exported: Path, folder: Path) -> None:
    """Link an export's files into a separate folder: the run may replace its export while they are in use."""

    def link_or_copy(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            # A different file system, or one without hard links.
            shutil.copyfile(source, target)

    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        shutil.copytree(exported, partial, copy_function=link_or_copy, dirs_exist_ok=True)
        atomic_files.replace_directory(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _make_parent_error(parent: ParentCheckpoint, reason: str, remedy: str) -> ConfigError:
    what = f"model.path: the weights of run {parent.plan.run_name} at step {parent.checkpoint.step} cannot be used: {reason}"
    return ConfigError(what, where="model.path", value=parent.path, remedy=remedy)


def _download(repo_id: str, model: ModelSection) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    # model.revision pins code, and only in the model's own repository.
    with_code = model.trust_remote_code and repo_id == model.path
    patterns = [*_HUB_FILES, *(["*.bin"] if model.allow_pickled_weights else []), *(["*.py"] if with_code else [])]
    revision = model.revision if repo_id == model.path else None
    cache = download_cache()
    _say(f"fetching {repo_id} from the hub")
    try:
        # Some repositories also hold the weights in their original format.
        with show_waiting(f"fetching {repo_id}"):
            snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=cache,
                allow_patterns=patterns,
                ignore_patterns=["consolidated*", "original/*"],
            )
    except LauncherError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and is_full(error):
            variable = "LAUNCHER_CACHE" if cache == own_hub_cache() else "HF_HOME"
            raise ConfigError(
                f"{repo_id} cannot be fetched from the hub: {error.strerror}",
                where=str(error.filename or "the cache of the hub"),
                remedy=f"free space there, or set {variable} to a folder on another disk",
            ) from error
        remedy = "check the name, the network and, for a gated model, HF_TOKEN in the environment; or use a local folder"
        if isinstance(error, GatedRepoError):
            remedy = f"accept them at https://huggingface.co/{repo_id}, and set HF_TOKEN to a token of that account"
        message = f"{repo_id} cannot be fetched from the hub: {hub_reason(error)}"
        raise ConfigError(message, where="model.path", value=repo_id, remedy=remedy) from error


def hub_reason(error: Exception) -> str:
    """Return why the Hub client could not fetch a file."""
    from huggingface_hub import errors

    if isinstance(error, LauncherError):
        return error.problems[0].message
    if isinstance(error, errors.GatedRepoError):
        return "the Hub gives it only to accounts that have accepted its terms"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the Hub has no model of this name, or it is private (HF_TOKEN)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the Hub does not have this revision"
    is_offline = isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | ConnectionError | TimeoutError)
    if is_offline or type(error).__module__.startswith("httpx"):
        return "the Hub cannot be reached"
    return f"the Hub's client failed ({type(error).__name__})"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
