"""Loads untrusted YAML within bounds: a few lines of nested aliases could otherwise expand beyond the memory."""

from __future__ import annotations

import re
from typing import Any

import yaml

# Maximum number of values after all aliases are expanded. Settings have hundreds; READMEs with many subsets have tens of
# thousands.
MAX_VALUES = 200_000
MAX_CHARS = 8 << 20
# The search time is linear in the length of any text.
_FENCE = re.compile(r"^---[ \t\r]*$", re.MULTILINE)
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class UnboundedYaml(yaml.YAMLError):
    """The text is too long, or its aliases expand to too many values or to themselves."""


def front_matter(text: str) -> str | None:
    """Return the front matter of a README: the lines between a first line `---` and the next `---`; None if there is none."""
    begin = _FENCE.match(text)
    end = _FENCE.search(text, begin.end()) if begin is not None else None
    return None if begin is None or end is None else text[begin.end() : end.start()]


def safe_load(text: str | bytes) -> Any:
    """Return the content of a YAML text, which may only contain JSON types and dates.

    Raises:
        yaml.YAMLError: if it is not YAML, or not within bounds.
    """
    if len(text) > MAX_CHARS:
        raise UnboundedYaml(f"it is longer than {MAX_CHARS >> 20} MiB")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        _require_bounded(node)
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise UnboundedYaml("it is nested too deeply") from None
    finally:
        loader.dispose()


def require_bounded(text: str) -> None:
    """Check a text that another parser reads; a text that is not YAML passes.

    Raises:
        UnboundedYaml: if it is not within bounds.
    """
    if len(text) > MAX_CHARS:
        raise UnboundedYaml(f"it is longer than {MAX_CHARS >> 20} MiB")
    if "&" not in text:
        return
    try:
        _require_bounded(yaml.compose(text, Loader=_Loader))
    except UnboundedYaml:
        raise
    except RecursionError:
        raise UnboundedYaml("it is nested too deeply") from None
    except yaml.YAMLError:
        # The parser that reads the text reports the position.
        return


def _require_bounded(root: yaml.Node | None) -> None:
    if root is not None and _num_values(root, {}, set()) > MAX_VALUES:
        raise UnboundedYaml(f"it has more than {MAX_VALUES:,} values, with its aliases expanded")


def _num_values(node: yaml.Node, known: dict[int, int], within: set[int]) -> int:
    """Return the number of values of a node with its aliases expanded; `within` are the nodes that contain it."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in within:
        raise UnboundedYaml("an alias refers to a value that contains it")
    within.add(id(node))
    inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    children = inner if isinstance(node, yaml.CollectionNode) else []
    known[id(node)] = 1 + sum(_num_values(child, known, within) for child in children)
    within.remove(id(node))
    return known[id(node)]
