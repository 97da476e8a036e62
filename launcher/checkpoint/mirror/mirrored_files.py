"""The files that a run's mirror gets besides checkpoints: plans, code, and the small files of the model and tokenizer."""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from launcher import run_store
from launcher.checkpoint.folder_links import link_problems
from launcher.errors import CheckpointError, Problem
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir

CODE = "code.zip"
# Files that transformers reads, besides weights.
_MODEL_FILES = (
    *("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "tokenizer*", "vocab.*", "chat_template*"),
    "additional_chat_templates/*",
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")


def list_run_files(run: RunDir, attempt: int) -> Iterator[tuple[str, Path]]:
    """Yield the names in the mirror and the local paths of the run's files that do not change."""
    yield "plan.json", run.plan
    changed = run_store.changed_plan_paths(run)
    newest = run.attempt(attempt) / "attempt.json"
    for path in (*changed[-1:], newest, *sorted(run.plans.glob("*.json"))):
        yield str(path.relative_to(run.root)), path


def list_model_files(plan: LaunchPlan) -> Iterator[tuple[str, Path, Path]]:
    """Yield the names in the mirror, the folders and the local paths of the small files of model and tokenizer."""
    model = plan.model
    for kind, folder in (("model", model.path), ("tokenizer", model.tokenizer_path)):
        if folder is not None and not (kind == "tokenizer" and folder == model.path):
            for path in _small_files(Path(folder), plan.config.model.trust_remote_code):
                yield f"{kind}/{path.relative_to(folder)}", Path(folder), path


def build_code_archive(folder: Path) -> bytes:
    """Return a zip file of a folder; equal content gives equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                archive.writestr(zipfile.ZipInfo(str(path.relative_to(folder))), path.read_bytes(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def report_unsent(problem: Problem | CheckpointError) -> None:
    """Print to standard error which file the mirror does not get, and why. Without room for the log, uploads continue."""
    with suppress(OSError):
        print(f"not sent to the mirror: {problem}", file=sys.stderr, flush=True)


def _small_files(folder: Path, with_code: bool) -> list[Path]:
    patterns = (*_MODEL_FILES, *(["*.py"] if with_code else []))
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    problems = {problem.where: problem for problem in link_problems(folder, paths)}
    for problem in problems.values():
        report_unsent(problem)
    return sorted(path for path in paths if not path.name.endswith(_WEIGHTS) and str(path) not in problems)
