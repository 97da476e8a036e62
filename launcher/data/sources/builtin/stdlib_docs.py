"""Questions and answers from the docstrings of the standard library of the installed Python.

The modules are parsed and never imported, so none of their code runs. The result depends only on the Python version.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

NUM_PAIRS = 3000
HELD_OUT_FRACTION = 0.05
MIN_WORDS, MAX_WORDS = 8, 120
ARGUMENTS_FRACTION = 0.3

# Programs, games, tests, codec tables and tools for maintaining Python, whose docstrings explain little.
LEFT_OUT = frozenset(
    {"antigravity", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "msilib", "pydoc_data", "test", "tests", "this"}
    | {"tkinter", "turtle", "turtledemo"}
)

PHRASINGS = {
    "module": (
        "What is the Python module `{name}` for?",
        "Describe Python's `{name}` module.",
        "When would I use the module `{name}` from Python's standard library?",
    ),
    "class": (
        "What is the class `{name}` in Python?",
        "Explain the Python class `{name}`.",
        "What is `{name}` in Python's standard library used for?",
    ),
    "function": (
        "What does the function `{name}` do in Python?",
        "Explain `{name}` from Python's standard library.",
        "What is `{name}()` for in Python?",
    ),
    "method": (
        "What does the method `{name}` do in Python?",
        "Explain the Python method `{name}`.",
        "What happens when I call `{name}()` in Python?",
    ),
    "attribute": (
        "What is `{name}` in Python?",
        "Explain the attribute `{name}` in Python.",
        "What does the attribute `{name}` hold in Python?",
    ),
    "arguments": (
        "What arguments does `{name}` take in Python?",
        "What is the signature of `{name}` in Python, and what does it do?",
        "How do I call `{name}` in Python?",
    ),
}


@dataclass(frozen=True)
class Pair:
    """One question and its answer about `symbol`, a dotted name such as json.decoder.JSONDecoder.decode."""

    symbol: str
    question: str
    answer: str
    held_out: bool


@dataclass(frozen=True)
class _Documented:
    symbol: str
    kind: str
    doc: str
    signature: str


@cache
def list_pairs() -> tuple[Pair, ...]:
    """Return about NUM_PAIRS pairs in the order of their symbols, always the same for a Python version.

    Each symbol and each answer text occurs only once, so held-out pairs share neither with the other pairs.
    """
    items: dict[str, _Documented] = {}
    texts: set[str] = set()
    for module, path in _modules():
        for item in _documented(module, path):
            if item.symbol not in items and item.doc not in texts:
                items[item.symbol] = item
                texts.add(item.doc)
    chosen = sorted(items, key=lambda symbol: _share(symbol, "choice"))[:NUM_PAIRS]
    return tuple(_pair(items[symbol]) for symbol in sorted(chosen))


def _pair(item: _Documented) -> Pair:
    kind, answer = item.kind, item.doc
    if item.signature and _share(item.symbol, "kind") < ARGUMENTS_FRACTION:
        kind, answer = "arguments", f"`{item.signature}`\n\n{item.doc}"
    phrasings = PHRASINGS[kind]
    question = phrasings[int(_share(item.symbol, "phrasing") * len(phrasings))].format(name=item.symbol)
    return Pair(item.symbol, question, answer, held_out=_share(item.symbol, "split") < HELD_OUT_FRACTION)


def _share(symbol: str, purpose: str) -> float:
    """Return a number in [0, 1) that depends only on the arguments."""
    digest = hashlib.blake2b(f"{purpose}:{symbol}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _modules() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names):
        file, folder = root / f"{name}.py", root / name
        for path in [file] if file.is_file() else sorted(folder.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if not any(part in LEFT_OUT or part.startswith("_") for part in parts):
                yield ".".join(parts), path


def _documented(module: str, path: Path) -> Iterator[_Documented]:
    tree = ast.parse(path.read_bytes())
    if doc := _trimmed(tree):
        yield _Documented(module, "module", doc, "")
    yield from _members(tree, module, inside_class=False)


def _members(node: ast.Module | ast.ClassDef | ast.If | ast.Try, prefix: str, inside_class: bool) -> Iterator[_Documented]:
    for child in node.body:
        match child:
            case ast.FunctionDef() | ast.AsyncFunctionDef() if not child.name.startswith("_"):
                if doc := _trimmed(child):
                    kind = "attribute" if _is_property(child) else "method" if inside_class else "function"
                    yield _Documented(f"{prefix}.{child.name}", kind, doc, _signature(child, inside_class))
            case ast.ClassDef() if not child.name.startswith("_"):
                symbol = f"{prefix}.{child.name}"
                if doc := _trimmed(child):
                    yield _Documented(symbol, "class", doc, "")
                yield from _members(child, symbol, inside_class=True)
            case ast.If() | ast.Try():
                yield from _members(child, prefix, inside_class)


def _is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    names = [ast.unparse(decorator) for decorator in function.decorator_list]
    return any(name.endswith(("property", ".setter", "DynamicClassAttribute")) for name in names)


def _signature(function: ast.FunctionDef | ast.AsyncFunctionDef, inside_class: bool) -> str:
    """Return `name(arguments)` as in the source; empty without arguments, or if a decorator may change them."""
    if function.decorator_list:
        return ""
    arguments = ast.unparse(function.args)
    if inside_class:
        arguments = arguments.partition(",")[2].strip()
    return f"{function.name}({arguments})" if arguments.strip("/* ,") else ""


def _trimmed(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    """Return the first paragraphs of the docstring, up to MAX_WORDS words or the first `>>>`; None below MIN_WORDS."""
    doc = ast.get_docstring(node, clean=False)
    if doc is None:
        return None
    kept: list[str] = []
    num_words = 0
    for paragraph in inspect.cleandoc(doc).split("\n\n"):
        paragraph = "\n".join(line.rstrip() for line in paragraph.strip("\n").splitlines())
        num_words += len(paragraph.split())
        if num_words > MAX_WORDS or paragraph.lstrip().startswith(">>>"):
            break
        if paragraph:
            kept.append(paragraph)
    text = "\n\n".join(kept).strip()
    return text if len(text.split()) >= MIN_WORDS else None
