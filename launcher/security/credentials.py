"""Patterns of credentials in text, shared by settings and data checks, and the credentials in the environment."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from urllib.request import Request


@dataclass(frozen=True)
class Form:
    """One form of credential. Every text that matches `pattern` contains one of `literals`, in lower case."""

    kind: str
    literals: tuple[bytes, ...]
    pattern: str


PASSWORD_IN_ADDRESS = Form("password in an address", (b"://",), r"://[^/\s:@]{1,64}:[^/\s@]{3,128}@(?=[\w.-])")
FORMS = (
    Form("private key", (b"private key",), r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----[^-]*"),
    Form("AWS key", (b"akia", b"asia"), r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    Form("GitHub token", (b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_"), r"\bgh[pousr]_[A-Za-z0-9]{16,}"),
    Form("GitHub token", (b"github_pat_",), r"\bgithub_pat_\w{16,}"),
    Form("Hugging Face token", (b"hf_",), r"\bhf_[A-Za-z0-9]{16,}"),
    Form("API key", (b"sk-", b"sk_"), r"\bsk[-_](?:[A-Za-z]+[-_])*[A-Za-z0-9_-]{20,}"),
    Form("Slack token", (b"xox",), r"\bxox[abprs]-[\w-]{10,}"),
    Form("Google key", (b"aiza",), r"\bAIza[\w-]{35}"),
    Form("W&B key", (b"wandb_v",), r"\bwandb_v\d+_\w{16,}"),
    Form("JSON web token", (b"eyj",), r"\beyJ[\w-]{10,2000}\.[\w-]{10,2000}\.[\w-]+"),
    PASSWORD_IN_ADDRESS,
)
# A user with a password and a fully qualified host name, as the whole text; a run with an image digest looks similar.
LOGIN = re.compile(r"(?!run:|mailto:)[\w.+%-]{1,64}:[^\s/@:]{3,128}@[\w-]+(?:\.[\w-]+)+(?::\d+)?(?:/\S*)?")
# Case-insensitive names of variables that hold credentials, such as PGPASSWORD, SSHPASS, SLURM_JWT and GITHUB_PAT.
VARIABLE = (
    r"(?:\w*(?:token|secret|password|passwd|passphrase|credentials?|jwt)"
    r"|(?:\w+_)?(?:(?:api_?)?key|key_id|(?:ssh)?pass|connection_string)|\w+_(?:pat|pwd))"
)
_VARIABLE = re.compile(VARIABLE, re.IGNORECASE)
# Shorter values are words such as "none". A value is searched for within a text only if it is longer than a word.
_MIN_CHARS, _MIN_CHARS_WITHIN = 8, 16


def environment_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that are named like credentials, except those that name a file with credentials."""
    return {
        name: value
        for name, value in environ.items()
        if _VARIABLE.fullmatch(name) and len(value) >= _MIN_CHARS and not os.path.exists(os.path.expanduser(value))
    }


def secret_within(text: str, secrets: Mapping[str, str]) -> str | None:
    """Return the name of the variable whose value is the text or part of it, or None."""
    return next((name for name, value in secrets.items() if text == value or _is_part(value, text)), None)


def hide_secrets(text: str, secrets: Mapping[str, str]) -> str:
    """Return the text with `<redacted>` in place of these variables' values."""
    for value in secrets.values():
        if text == value or _is_part(value, text):
            text = text.replace(value, "<redacted>")
    return text


def request_json(request: Request, timeout_s: float) -> Any:
    """Return the JSON of the answer to a request that carries a key, which follows no redirect to another server.

    Raises:
        OSError: if there is no answer; HTTPError for a status other than 200, including redirects.
        ValueError: if it is not JSON.
    """
    # Imported here because it loads slowly.
    from urllib.request import HTTPRedirectHandler, build_opener

    class NoRedirects(HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:
            return None

    with build_opener(NoRedirects).open(request, timeout=timeout_s) as answer:
        return json.load(answer)


def _is_part(value: str, text: str) -> bool:
    return len(value) >= _MIN_CHARS_WITHIN and value in text
