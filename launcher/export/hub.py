"""Push an exported folder to a repository of the Hugging Face Hub. The token comes from the environment and is never stored."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from launcher.errors import Problem, PushError
from launcher.security.redaction import redact
from launcher.shell_commands import shell_command

TOKEN_VARIABLE = "HF_TOKEN"  # noqa: S105

# How long a command waits for the Hub before a run is started.
_QUERY_TIMEOUT_S = 10.0
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("spiece.model", "sentencepiece*.model", "tekken.json"),
)
# Files of an earlier export that the push removes from the repository unless it replaces them.
_REPLACED = [
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "adapter_*", "generation_config.json"),
    *(*TOKENIZER_FILES, "chat_template*", "additional_chat_templates/*"),
]


def token_problem(where: str, repo_id: str, environ: Mapping[str, str] = os.environ) -> Problem | None:
    """Return the problem with the token for a push to `repo_id`, requested by the setting or flag `where`; None if it is set."""
    if environ.get(TOKEN_VARIABLE):
        return None
    return Problem(
        f"a push to the Hub needs {TOKEN_VARIABLE} in the environment, and it is not set",
        where=where,
        value=repo_id,
        remedy=f"set {TOKEN_VARIABLE} to a token that may write to {repo_id}, or do not push",
    )


@functools.cache
def is_public(repo_id: str) -> bool | None:
    """Return whether anyone can read a repository; None if the Hub cannot be reached, False if `push` will create it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = HfApi(token=os.environ.get(TOKEN_VARIABLE)).model_info(repo_id, timeout=_QUERY_TIMEOUT_S)
    except RepositoryNotFoundError:
        return False
    except Exception:  # offline, no network, a proxy, an outage: the push asks again
        return None
    return not info.private


def push(folder: Path, repo_id: str, *, again: str) -> str:
    """Upload an exported folder in one commit and return its address; a repository created for it is private.

    `again` is the command that repeats the push. Raises PushError if the token is missing, the repository is public, a link
    leaves the folder, or the upload fails; the folder stays as it is.
    """
    if problem := token_problem("the environment", repo_id):
        raise PushError(replace(problem, remedy=f"set it, then: {again}"))
    from launcher.models.found_model import link_problems

    if problems := list(link_problems(folder, folder.iterdir())):
        raise PushError(problems)
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi(token=os.environ[TOKEN_VARIABLE])
    try:
        # `exist_ok` does not tell who can read an existing repository.
        address = api.create_repo(repo_id, private=True, exist_ok=True)
        if not api.model_info(repo_id).private:
            raise PushError(public_problem(str(api.endpoint), repo_id, folder))
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Upload an exported checkpoint", delete_patterns=_REPLACED
        )
    except PushError:
        raise
    except Exception as error:  # the Hub, the network or the disk: none of them affects the folder
        raise PushError(
            "the exported folder could not be pushed to the Hub; it is complete on this machine",
            where=str(folder),
            value=redact(f"{repo_id}: {type(error).__name__}: {' '.join(str(error).split())}"),
            remedy=f"check the network and the token's rights, then: {again}",
        ) from error
    return str(address)


def public_problem(where: str, repo_id: str, folder: Path) -> Problem:
    """Return the problem with a push of `folder` to a repository that everyone can read."""
    return Problem(
        "the repository is public, so everyone could download the model; nothing was uploaded",
        where=where,
        value=repo_id,
        remedy=f"choose a private repository, or upload by hand: {shell_command('hf', 'upload', repo_id, folder)}",
    )
