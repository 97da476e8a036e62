"""What is shown or logged: without credentials, and without control sequences from files and other machines."""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from launcher.errors import printable


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

REDACTED = "<redacted>"
# A value in one of these forms is a credential under any key.
_SECRET = re.compile("|".join(form.pattern for form in FORMS if form is not PASSWORD_IN_ADDRESS))
# W&B's older keys have no prefix: 40 hex digits, like a git commit.
_HEX_KEY = re.compile(r"[0-9a-f]{40}")
# In text, these digits are a commit after the name of a setting, or in the path of a snapshot or a page of the Hub.
_HEX_KEY_OR_COMMIT = re.compile(
    rf"(?P<commit>revision['\"]?(?:=|: ?)['\"]?|/(?:snapshots|resolve|blob|tree|commit)/)?\b{_HEX_KEY.pattern}\b"
)
# A user with a password before a URL's host; with http, a user alone may be a token.
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s:]*:[^/\s]*@|(?:(?<=http://)|(?<=https://))[^/?\s]+@")
# Query parameters of a URL that grant access: a signature or a key.
IN_QUERY = re.compile(
    r"(?<=[?&])(?P<name>x-(?:amz|goog|ms)-[\w-]+|sig|(?:[\w-]*[_-])?(?:signature|token|key|secret|password)|apikey|AWSAccessKeyId|GoogleAccessId)"
    r"=[^&\s'\"]*",
    re.IGNORECASE,
)
# bos_token, pad_token and similar keys are not credentials.
_SECRET_NAME = r"(?:\w+_)?(?:api_?key|secret|password|passwd|credentials?)|(?:(?:hf|hub|auth|access|api|bearer|wandb)_)?token"  # noqa: S105
# A job's environment variables with such names are credentials.
_SECRET_VARIABLE = rf"cluster\.env\.{VARIABLE}"
_SECRET_KEY = re.compile(rf"(?:^|[.\]])(?:{_SECRET_NAME})$|^{_SECRET_VARIABLE}$", re.IGNORECASE)
# The message for an address that contains a password.
LOGIN_IN_ADDRESS = "contains a user with a password; the value is not shown"
_ASSIGNED = re.compile(rf"(?P<key>(?<![\w-])(?:{_SECRET_NAME})=).+", re.IGNORECASE)


def environment_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that are named like credentials, except those that name a file with credentials."""
    return {
        name: value
        for name, value in environ.items()
        if _VARIABLE.fullmatch(name) and len(value) >= _MIN_CHARS and not os.path.exists(os.path.expanduser(value))
    }


def looks_secret(key: str, value: Any) -> bool:
    """Return whether a value has the form of a credential, or its key names one."""
    if value is None or value == "" or isinstance(value, bool):
        return False
    text = str(value)
    if _SECRET.search(text) or (_HEX_KEY.fullmatch(text) and not key.endswith(".revision")):
        return True
    return bool(_SECRET_KEY.search(key))


def secret_problem(key: str, value: Any, secrets: Mapping[str, str]) -> str | None:
    """Return why a setting must not have this value, without quoting it, or None if it may.

    `secrets` are the credentials in the environment, keyed by variable.
    """
    if looks_secret(key, value):
        return f"{key}: looks like a secret (a token, key or password); its value is not shown"
    if not isinstance(value, str):
        return None
    if LOGIN.fullmatch(value):
        return f"{key}: {LOGIN_IN_ADDRESS}"
    if name := next((name for name, secret in secrets.items() if _holds_secret(value, secret)), None):
        return f"{key}: contains the value of {name} in the environment, which looks like a secret; it is not shown"
    return None


def has_login(value: Any) -> bool:
    """Return whether a value contains a URL with a user and a password."""
    return isinstance(value, str) and re.search(PASSWORD_IN_ADDRESS.pattern, value) is not None


def redact(text: str, secrets: Mapping[str, str] | None = None) -> str:
    """Return `text` with `<redacted>` for everything that looks like a credential or is assigned to a credential's name.

    `secrets` are the credentials in the environment, keyed by variable.
    """
    for secret in (secrets or {}).values():
        if _holds_secret(text, secret):
            text = text.replace(secret, REDACTED)
    return _HEX_KEY_OR_COMMIT.sub(lambda match: match[0] if match["commit"] else REDACTED, _redact_forms(text))


def redact_setting(key: str, value: Any, text: str | None = None) -> str:
    """Return a setting's value as text, with `<redacted>` for what looks like a credential; `text` is its form if not str(value).

    As in `looks_secret`, 40 hex digits are a credential only as the whole value: they may be part of a path.
    """
    return REDACTED if looks_secret(key, value) else _redact_forms(str(value) if text is None else text)


def _redact_forms(text: str) -> str:
    text = IN_QUERY.sub(rf"\g<name>={REDACTED}", _IN_ADDRESS.sub(f"{REDACTED}@", _SECRET.sub(REDACTED, text)))
    return _ASSIGNED.sub(rf"\g<key>{REDACTED}", text)


def redacted_command_line() -> str:
    """Return this process's command line as typed, with credentials redacted."""
    program, *arguments = sys.orig_argv
    return redact(shlex.join([Path(program).name, *arguments]))


def _holds_secret(text: str, secret: str) -> bool:
    return text == secret or (len(secret) >= _MIN_CHARS_WITHIN and secret in text)


# Output that cannot control the terminal

_COLORS = re.compile(r"\x1b\[[0-9;]*m")


class PrintableStream:
    """Writes escape sequences as visible text. rich, whose sequences must take effect, writes to `rich_proxied_file`."""

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        self.rich_proxied_file.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextmanager
def printable_output() -> Iterator[None]:
    """Make all output in this block printable."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (PrintableStream(raw(stream)) for stream in before)
    # Logging handlers of already imported libraries keep the stream from their import.
    handlers = [
        handler
        for logger in (logging.root, *logging.root.manager.loggerDict.values())
        for handler in getattr(logger, "handlers", ())
        if isinstance(handler, logging.StreamHandler) and handler.stream is before[1]
    ]
    for handler in handlers:
        handler.setStream(cast("TextIO", sys.stderr))
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(before[1])
        sys.stdout, sys.stderr = before


def raw(stream: TextIO) -> TextIO:
    """Return the stream itself, for the launcher's own escape sequences."""
    return getattr(stream, "rich_proxied_file", stream)


def as_plain_lines(text: str) -> str:
    """Return a log's text without colors; overwritten progress bars become separate lines."""
    return _COLORS.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
