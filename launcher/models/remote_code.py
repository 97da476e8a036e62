"""Python code that comes with a model: which of it transformers may run, and how it is pinned.

transformers runs the classes that `auto_map` in config.json names. A Hub model is pinned by its commit, a
folder by a digest of its code (`model.code_digest`).
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.config.schema import ModelSection, is_local_path, is_run
from launcher.errors import Problem
from launcher.security.owners import folder_problem

ADAPTER = "adapter_config.json"
# Keys of config.json with which transformers finds classes of a model that it does not load from a folder.
_NAMES_CODE = frozenset({"auto_map", "name_or_path", "_name_or_path"})


def code_digest(folder: Path) -> str | None:
    """Return the SHA-256 of the names and contents of all Python files below a folder; None if there are none."""
    files = sorted((str(path.relative_to(folder)), path) for path in python_files(folder))
    digest = hashlib.sha256()
    for name, path in files:
        with path.open("rb") as file:
            digest.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest() if files else None


def code_problems(model: ModelSection, folder: Path | None) -> Iterator[Problem]:
    """Yield why the code of a model may not run; `folder` is None if the model is not on this machine yet."""
    if not model.trust_remote_code:
        return
    if folder is not None and (model.code_digest is not None or is_local_path(model.path or "") or is_run(model.path)):
        yield from digest_problems(folder, model.code_digest, folder)
    elif folder is not None and (problem := owner_problem(folder)) is not None:
        yield problem


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config.json from which transformers builds a model without a folder: its own classes alone.

    It would take the classes of `auto_map` from the folder or repository that `name_or_path` names, at its newest commit.
    """
    return {key: value for key, value in config.items() if key not in _NAMES_CODE}


def owner_problem(folder: Path) -> Problem | None:
    """Return why other users could have changed the code in a model's folder, such as a snapshot of a commit; else None."""
    problem = folder_problem("the code of the model", folder)
    own = "set HF_HOME to a folder of your own, and download the model again"
    return problem and replace(problem, remedy=f"{own}; or {problem.remedy}")


def python_files(folder: Path) -> list[Path]:
    """Return all Python files below a folder, without following links to folders."""
    return sorted(path for path in folder.rglob("*.py") if path.is_file())


def adapter_problems(folder: Path) -> Iterator[Problem]:
    """Yield a problem if transformers would instead load an adapter's base model, which may be any repository."""
    if (folder / ADAPTER).is_file() and importlib.util.find_spec("peft") is not None:
        yield Problem(
            f"model.path: {ADAPTER} makes transformers load an adapter and another model, which it names",
            where=str(folder / ADAPTER),
            remedy="merge the adapter into its model and use that folder; if this is the whole model, delete the file",
        )


def digest_problems(folder: Path, digest: str | None, shown: Path) -> Iterator[Problem]:
    """Yield a problem if the Python files of a folder do not have the digest; it names the folder as `shown`."""
    actual = code_digest(folder)
    if actual == digest:
        return
    if actual is None:
        message, remedy = "the folder has no Python code", "remove model.code_digest and model.trust_remote_code"
    elif digest is None:
        message = "the code in the folder is not pinned: anyone who can write there chooses what runs"
        remedy = f"read the *.py files; if you trust them, set model.code_digest={actual}"
    else:
        message = "the code in the folder differs from the code that model.code_digest pins"
        remedy = f"find out who changed it; if you trust the files as they are, set model.code_digest={actual}"
    yield Problem(f"model.path: {message}", where=str(shown), value=digest or "", remedy=remedy)
