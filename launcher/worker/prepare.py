"""Prepares model, tokenizer and data cache on CPU, before any GPU is requested: `python -m launcher.worker.prepare`.

Reads a RunConfig as JSON from standard input, fetches or converts model and tokenizer, compares the weight files with the model,
and builds the data cache. Writes progress to standard error, and one JSON object (with the report, if requested) to standard
output.

This module does not import torch at module level, because multiprocessing imports the main module again in each worker of the
data build.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

from launcher import atomic_files, locks, run_store
from launcher.config.schema import RunConfig
from launcher.config.sections.model import ModelSection, is_run
from launcher.data import build, hub_cache, report, sources
from launcher.data.cache_dir import cache_root, is_full, make_cache_error
from launcher.data.sources.eval_set import make_set_data, name_set
from launcher.data.tokenization.encoder import import_tokenizers_without_torch, load_tokenizer
from launcher.errors import EXIT_FAILED, CheckpointError, ConfigError, DataError, LauncherError, Problem, RunError
from launcher.export import model_card
from launcher.export.hf_folder import ExportTask, export, find_chat_template, verify_checkpoint
from launcher.models import parent_run
from launcher.models.found_model import converted_folder, find_model, locate
from launcher.plan.launch_plan import LaunchPlan
from launcher.security import folders
from launcher.security.printable_stream import printable_output
from launcher.security.redaction import redacted_command_line
from launcher.tracking.jsonl import read_metrics
from launcher.tracking.progress import show_documents, show_progress, show_waiting
from launcher.worker.checks.weight_check import require_weights
from launcher.worker.signals import exit_on_termination

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "README.md", "LICENSE*", "NOTICE*"]
# Longer than it takes to read and write the largest checkpoint.
_LOCK_TIMEOUT_S = 2 * 3600.0
# The argument that limits preparation to the caches of eval.sets.
EVAL_SETS_ALONE = "--eval-sets"
_QUOTED_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def prepare(config: RunConfig, show: int | None = None) -> dict[str, object]:
    """Prepare everything that the ranks read; returns the data report with `show` rows, or an empty dictionary if it is None."""
    names = [name for name in dict.fromkeys((config.model.path, config.model.tokenizer)) if name]
    if any(locate(name, config.model).folder is None for name in names):
        # Report unreadable rows before downloading a model.
        _require_readable_rows(config)
    for name in names:
        _fetch(name, config.model)
    found = find_model(config.model)
    require_weights(found, _say)
    tokenizer = found.tokenizer
    if tokenizer is None:
        raise ConfigError("the tokenizer is missing after its download", where="model.tokenizer")
    # Nothing after this needs torch.
    import_tokenizers_without_torch()
    with show_documents() as on_progress:
        num_embeddings = found.facts.vocab_size
        built = build.build(config.data, str(tokenizer), on_progress, num_embeddings)
        eval_sets = build.build_eval_sets(config.eval.sets_by_setting, config.data, str(tokenizer), on_progress, num_embeddings)
    if show is None:
        return {}
    loaded = load_tokenizer(str(tokenizer))

    def decode(ids: list[int]) -> str:
        return str(loaded.decode(ids, clean_up_tokenization_spaces=False))

    return {"report": report.report(built, config.data, decode, config.train, config.run.seed, found.stop_ids, show, eval_sets)}


def _require_readable_rows(config: RunConfig) -> None:
    problems = sources.RowProblems()
    for source in config.data.sources:
        if source.is_read:
            problems.merge(sources.find_row_problems(source))
    row_problems = problems.refused(config.data.checks).to_list()
    for setting, eval_set in config.eval.sets_by_setting.items():
        section = make_set_data(eval_set, config.data)
        of_set = sources.find_row_problems(section.sources[0]).refused(section.checks)
        row_problems += [name_set(problem, setting, eval_set) for problem in of_set.to_list()]
    if row_problems:
        raise DataError(row_problems)


def build_eval_sets(config: RunConfig) -> dict[str, object]:
    """Build only the caches of the evaluation sets, for a run whose other data exists."""
    found = find_model(config.model)
    tokenizer = found.tokenizer
    if tokenizer is None:
        raise ConfigError("the tokenizer is missing", where="model.tokenizer")
    import_tokenizers_without_torch()
    with show_documents() as on_progress:
        num_embeddings = found.facts.vocab_size
        build.build_eval_sets(config.eval.sets_by_setting, config.data, str(tokenizer), on_progress, num_embeddings)
    return {}


def convert_local(source: str, model: ModelSection) -> None:
    """Convert a package's GGUF file to a Hugging Face folder, unless it is already converted or `source` is something else."""
    located = locate(source, model)
    if located.folder is None and located.source is not None and not is_run(source):
        _fetch(source, model)


def _fetch(source: str, model: ModelSection) -> None:
    located = locate(source, model)
    if located.folder is not None:
        return
    if is_run(source):
        with folders.private_files():
            copy_parent_weights(parent_run.find_parent(source), model)
    elif located.source is not None:
        folder = _own_place(converted_folder(located.source))
        from launcher.train.model import convert_gguf

        _say(f"converting {located.source.name} to a Hugging Face folder (once)")
        with folders.private_files(), show_waiting("converting"):
            convert_gguf(located.source, folder)
    else:
        _download(source, model)


def copy_parent_weights(parent: parent_run.ParentCheckpoint, model: ModelSection) -> None:
    """Write the parent's weights to the launcher's cache as a Hugging Face folder, which appears only when it is complete."""
    folder = _own_place(parent_run.weights_folder(parent, model.dtype))
    try:
        with locks.hold(folder.with_name(f".{folder.name}.lock"), _LOCK_TIMEOUT_S, redacted_command_line(), mode=0o600):
            if (folder / "config.json").is_file():
                return
            _say(f"copying the weights of run {parent.plan.run_name} at step {parent.checkpoint.step} (once)")
            exported = parent_run.find_export(parent, model.dtype)
            if exported is not None:
                _link(exported, folder)
            else:
                _export(parent, model, folder)
    except locks.LockTimeout as error:
        raise _unusable(
            parent, "another process is preparing them and has not finished in time", "wait for it, or end it"
        ) from error
    except OSError as error:
        reason = f"{error.strerror or error} ({error.filename or folder})"
        raise _unusable(parent, reason, "check the free space and that the run still has this checkpoint") from error
    except CheckpointError as error:
        problem = error.problems[0]
        reason = f"{problem.message} ({problem.where})" if problem.where else problem.message
        raise _unusable(parent, reason, "use another checkpoint (model.path=run:NAME@STEP), and check the disk") from error


def _export(parent: parent_run.ParentCheckpoint, model: ModelSection, folder: Path) -> None:
    base = Path(parent.plan.model.path or "")
    manifest, metrics = parent.checkpoint.manifest, read_metrics(parent.run.metrics, model_card.METRICS)
    plans = run_store.load_plans_until(parent.run, manifest.attempt)
    plan = plans[-1] if plans else parent.plan
    task = ExportTask(
        checkpoint=parent.checkpoint.path,
        model=base if parent.plan.model.path and (base / "config.json").is_file() else parent.plan.model.config,
        tokenizer=tokenizer_of(parent.plan),
        out=folder,
        dtype=model.dtype,
        trust_remote_code=model.trust_remote_code,
        code_digest=model.code_digest,
        # A check would load the whole model, and this machine may lack the memory.
        check=False,
        chat_template=find_chat_template(plan),
        turn_end_ids=plan.data.turn_end_ids if plan.data else (),
    )
    with show_progress() as make_progress:
        verify_checkpoint(task, make_progress)
        # The next run's model card takes its license and base model from this one.
        export(task, lambda made: model_card.render_model_card(plan, manifest, metrics, made, plans), make_progress)


def tokenizer_of(plan: LaunchPlan) -> Path | None:
    """Return the folder of a run's tokenizer; fetch it again if the cache that held it was removed."""
    if plan.model.tokenizer_path and Path(plan.model.tokenizer_path).is_dir():
        return Path(plan.model.tokenizer_path)
    name = plan.config.model.tokenizer or plan.config.model.path or ""
    _fetch(name, plan.config.model)
    return locate(name, plan.config.model).folder


def _link(exported: Path, folder: Path) -> None:
    """Link an export's files into a separate folder: the run may replace its export while they are in use."""
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        shutil.copytree(exported, partial, copy_function=_link_or_copy, dirs_exist_ok=True)
        atomic_files.replace_directory(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        # A different file system, or one without hard links.
        shutil.copyfile(source, target)


def _unusable(parent: parent_run.ParentCheckpoint, reason: str, remedy: str) -> ConfigError:
    what = f"model.path: the weights of run {parent.plan.run_name} at step {parent.checkpoint.step} cannot be used: {reason}"
    return ConfigError(Problem(what, where="model.path", value=parent.path, remedy=remedy))


def _own_place(folder: Path) -> Path:
    """Return a folder that will be written in the launcher's cache, unless others could put a link in its place meanwhile."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _download(repo_id: str, model: ModelSection) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    # model.revision pins code, and only in the model's own repository.
    with_code = model.trust_remote_code and repo_id == model.path
    patterns = [*_HUB_FILES, *(["*.bin"] if model.allow_pickled_weights else []), *(["*.py"] if with_code else [])]
    revision = model.revision if repo_id == model.path else None
    cache = hub_cache.download_cache(repo_id)
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
            variable = "LAUNCHER_CACHE" if cache == hub_cache.own_folder() else "HF_HOME"
            raise ConfigError(
                f"{repo_id} cannot be fetched from the hub: {error.strerror}",
                where=str(error.filename or "the cache of the hub"),
                remedy=f"free space there, or set {variable} to a folder on another disk",
            ) from error
        if isinstance(error, GatedRepoError):
            raise ConfigError(
                f"{repo_id} is gated: the Hub gives it only to accounts that accepted its license",
                where="model.path",
                value=repo_id,
                remedy=f"accept it at https://huggingface.co/{repo_id}, and set HF_TOKEN to a token of that account",
            ) from error
        raise ConfigError(
            Problem(
                f"{repo_id} cannot be fetched from the hub: {hub_reason(error)}",
                where="model.path",
                value=repo_id,
                remedy="check the name, the network and, for a gated model, HF_TOKEN in the environment; or use a local folder",
            )
        ) from error


def hub_reason(error: Exception) -> str:
    """Return why the Hub client could not fetch a file."""
    from huggingface_hub import errors

    if isinstance(error, LauncherError):
        return error.problems[0].message
    if isinstance(error, errors.GatedRepoError):
        return "the Hub gives it only to users who have accepted its terms (HF_TOKEN)"
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


def _find_storage_error(error: Exception) -> LauncherError | None:
    """Return the user-facing error if the system refused to write or read a file, or None for another exception."""
    if not isinstance(error, OSError):
        # tokenizers and safetensors raise their own exceptions, which quote the system's error.
        quoted = _QUOTED_OS_ERROR.search(str(error))
        if quoted is None:
            return None
        error = OSError(int(quoted[1]), os.strerror(int(quoted[1])))
    if error.errno is None:
        return None
    path = None if error.filename is None else Path(os.fsdecode(error.filename))
    # The cache's parent folders are created with it.
    if path is None or path.is_relative_to(cache_root()) or cache_root().is_relative_to(path):
        return make_cache_error(error, cache_root() / "models")
    remedy = "check its permissions and the disk"
    return DataError(Problem(f"a file cannot be used: {error.strerror}", where=str(path), remedy=remedy))


def main(argv: list[str]) -> int:
    # Here the tokenizer may use all threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Libraries' progress bars and warnings would break up the plain lines.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    config = RunConfig.model_validate_json(sys.stdin.read())
    report_rows = [argument.removeprefix("--report=") for argument in argv if argument.startswith("--report=")]
    try:
        only_sets = EVAL_SETS_ALONE in argv
        print(json.dumps(build_eval_sets(config) if only_sets else prepare(config, int(report_rows[0]) if report_rows else None)))
    except LauncherError as error:
        print(json.dumps(error.to_report()))
        return error.exit_code
    except Exception as error:
        if (storage_error := _find_storage_error(error)) is not None:
            print(json.dumps(storage_error.to_report()))
            return storage_error.exit_code
        traceback.print_exc()
        print(json.dumps(RunError(f"preparing the data failed: {type(error).__name__}: {error}").to_report()))
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    exit_on_termination()
    # Libraries log names from other users' files to the command's terminal.
    with printable_output():
        code = main(sys.argv[1:])
    sys.exit(code)
