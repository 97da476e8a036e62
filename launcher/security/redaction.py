"""Recognizes credentials, and removes them from text that is shown or logged."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.security.credentials import FORMS, LOGIN, PASSWORD_IN_ADDRESS, VARIABLE, hide_secrets, secret_within

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
    if name := secret_within(value, secrets):
        return f"{key}: contains the value of {name} in the environment, which looks like a secret; it is not shown"
    return None


def has_login(value: Any) -> bool:
    """Return whether a value contains a URL with a user and a password."""
    return isinstance(value, str) and re.search(PASSWORD_IN_ADDRESS.pattern, value) is not None


def redact(text: str, secrets: Mapping[str, str] | None = None) -> str:
    """Return `text` with `<redacted>` for everything that looks like a credential or is assigned to a credential's name.

    `secrets` are the credentials in the environment, keyed by variable.
    """
    text = _redact_forms(hide_secrets(text, secrets or {}))
    return _HEX_KEY_OR_COMMIT.sub(lambda match: match[0] if match["commit"] else REDACTED, text)


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
