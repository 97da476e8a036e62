"""Whether this shell may fetch a gated Hub model, which only accounts that accepted its license get; uses no network."""

from __future__ import annotations

import os
from pathlib import Path

from launcher.config.sections.model import ModelSection
from launcher.errors import Problem
from launcher.export.hub import TOKEN_VARIABLE
from launcher.models.found_model import locate
from launcher.models.hub_licenses import find_license


def find_token() -> tuple[str | None, str]:
    """Return the token that huggingface_hub uses, and where it comes from."""
    if token := os.environ.get(TOKEN_VARIABLE):
        return token.strip(), TOKEN_VARIABLE
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = Path(os.environ.get("HF_TOKEN_PATH") or Path(os.environ.get("HF_HOME") or cache / "huggingface") / "token")
    try:
        return file.expanduser().read_text().strip() or None, str(file)
    except OSError:
        return None, ""


def is_gated(repo_id: str) -> bool:
    """Return whether a repository is known to be gated; an unknown one may be gated too."""
    known = find_license(repo_id)
    return known is not None and known.is_gated


def gated_problem(model: ModelSection) -> Problem | None:
    """Return why the model or tokenizer cannot be fetched (gated, no token, and not on this machine), or None."""
    if find_token()[0] is not None:
        return None
    fetched = {
        "model.tokenizer": model.tokenizer,
        "model.path": model.path if model.init == "pretrained" or not model.tokenizer else None,
    }
    for key, repo_id in fetched.items():
        if repo_id and is_gated(repo_id) and locate(repo_id, model).folder is None:
            message = f"{repo_id} is gated and not on this machine, and there is no {TOKEN_VARIABLE}"
            page = f"https://huggingface.co/{repo_id}"
            remedy = f"accept its license at {page}, and set {TOKEN_VARIABLE} to a token of that account"
            return Problem(message, key, repo_id, remedy)
    return None
