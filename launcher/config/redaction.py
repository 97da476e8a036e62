"""Recognise credentials, and remove them from text that is shown or logged."""

from __future__ import annotations

import re
from typing import Any

# A value of one of these forms is a credential under any key.
_SECRET = re.compile(
    r"(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}"
    r"|wandb_v\d+_\w{16,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+|-----BEGIN [A-Z ]*PRIVATE KEY)"
)
# W&B's older keys have no prefix: 40 hex digits, like a git commit, which only a revision may be.
_HEX_KEY = re.compile(r"[0-9a-f]{40}")
# A user with a password before the host of a URL; with http a user alone may be a token.
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s]*:[^/\s]*@|(?:(?<=http://)|(?<=https://))[^/?\s]+@")
# Query parameters of a URL that grant access: a signature or a key.
IN_QUERY = re.compile(
    r"(?<=[?&])(?P<name>x-(?:amz|goog|ms)-[\w-]+|sig|(?:[\w-]*[_-])?(?:signature|token|key|secret|password)|apikey|AWSAccessKeyId|GoogleAccessId)"
    r"=[^&\s'\"]*",
    re.IGNORECASE,
)
# bos_token, pad_token and similar keys are no credentials.
_SECRET_NAME = r"(?:\w+_)?(?:api_?key|secret|password|passwd|credentials?)|(?:(?:hf|hub|auth|access|api|bearer|wandb)_)?token"  # noqa: S105
# Environment variables of a job with such a name are credentials.
_SECRET_VARIABLE = r"cluster\.env\.(?:\w+_)?(?:token|key|key_id|secret|password|passwd|credentials?|connection_string)"  # noqa: S105
_SECRET_KEY = re.compile(rf"(?:^|[.\]])(?:{_SECRET_NAME})$|^{_SECRET_VARIABLE}$", re.IGNORECASE)
_ASSIGNED = re.compile(rf"(?P<key>(?<![\w-])(?:{_SECRET_NAME})=).+", re.IGNORECASE)


def looks_secret(key: str, value: Any) -> bool:
    """Return whether a value has the form of a credential, or its key names one."""
    if value is None or value == "" or isinstance(value, bool):
        return False
    text = str(value)
    if _SECRET.search(text) or (_HEX_KEY.fullmatch(text) and not key.endswith(".revision")):
        return True
    return bool(_SECRET_KEY.search(key))


def redact(text: str) -> str:
    """Return `text` with `<redacted>` for all that has the form of a credential or is assigned to the name of one."""
    text = IN_QUERY.sub(r"\g<name>=<redacted>", _IN_ADDRESS.sub("<redacted>@", _SECRET.sub("<redacted>", text)))
    text = _ASSIGNED.sub(r"\g<key><redacted>", text)
    return re.sub(rf"(?<!revision=)\b{_HEX_KEY.pattern}\b", "<redacted>", text)
