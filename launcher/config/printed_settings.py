"""Redacts the settings that Hydra prints for --cfg and --info, which bypass the launcher's own check."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from launcher.security.redaction import REDACTED, looks_secret, redact

if TYPE_CHECKING:
    import yaml

# Hydra prints either only the settings, or the settings below this heading.
_HEADING = re.compile(r"^Config\n\*+\n", re.MULTILINE)
_PACKAGE = re.compile(r"^# @package (?P<package>[\w.]+)$", re.MULTILINE)
_OVERRIDE = re.compile(r"(?P<key>[+~]*[^=\s]+)=(?P<value>.+)", re.DOTALL)
# Hydra joins all overrides in the value of this key.
_ALL_OVERRIDES = "override_dirname"


def redact_settings(text: str, secrets: Mapping[str, str]) -> str:
    """Return Hydra's output, with `<redacted>` for each value that looks like a credential or whose key names one.

    `secrets` are the credentials in the environment, by variable name.
    """
    import yaml

    heading = _HEADING.search(text)
    start = heading.end() if heading else 0
    package = _PACKAGE.search(text, start)
    prefix = f"{package['package']}." if package and package["package"] != "_global_" else ""
    settings = text[start:]
    try:
        scalars = list(_scalars(yaml.compose(settings, Loader=yaml.SafeLoader), prefix))
    except yaml.YAMLError:
        # Hydra printed something else, such as the list of plugins.
        return redact(text, secrets)
    replacements = [(node, new) for key, node in scalars if (new := _redacted(key, node.value)) != node.value]
    if any(_OVERRIDE.fullmatch(node.value) for node, _ in replacements):
        joined = [node for key, node in scalars if key.endswith(_ALL_OVERRIDES)]
        replacements = [(n, new) for n, new in replacements if n not in joined] + [(node, REDACTED) for node in joined]
    for node, new in sorted(replacements, key=lambda item: item[0].start_mark.index, reverse=True):
        begin, end = node.start_mark.index, node.end_mark.index
        # A multi-line block ends where the next line begins.
        settings = settings[:begin] + new + ("\n" if settings[begin:end].endswith("\n") else "") + settings[end:]
    return redact(text[:start] + settings, secrets)


def _redacted(key: str, value: str) -> str:
    """Return the value of a key, or of an override in Hydra's own lists, without credentials."""
    import yaml

    if looks_secret(key, value):
        return REDACTED
    override = _OVERRIDE.fullmatch(value) if key.endswith("]") else None
    if override is None:
        return value
    name = override["key"].lstrip("+~")
    try:
        content = list(_scalars(yaml.compose(override["value"], Loader=yaml.SafeLoader), f"{name}."))
    except yaml.YAMLError:
        content = []
    is_secret = looks_secret(name, override["value"]) or any(looks_secret(key, node.value) for key, node in content)
    return f"{override['key']}={REDACTED}" if is_secret else value


def _scalars(node: yaml.Node | Any, prefix: str) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """Yield the scalars below a node with their keys, which start with `prefix`."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        yield prefix.rstrip("."), node
    elif isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _scalars(value, f"{prefix}{name.value}.")
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield from _scalars(item, f"{prefix.rstrip('.')}[{i}].")
