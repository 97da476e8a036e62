"""The data sets included in the launcher, by the path that names them. To add one, write its functions and a row of BUILTINS.

builtin:stdlib_docs asks and answers questions from the docstrings of the standard library of the installed Python. The modules
are parsed and never imported, so none of their code runs. The result depends only on the Python version.

builtin:general_text is English of several kinds for measuring what a model forgets: novels, laws and computing, about 200 KB.
general_text.NOTICE.txt lists the origins of the texts, all of which are in the public domain.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import xxhash

from launcher.config.sections.data import GENERAL_TEXT, STDLIB_DOCS
from launcher.data.sources.documents import Document, Message

_GENERAL_TEXT_FILE = Path(__file__).with_name("general_text.jsonl")

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
class BuiltinSource:
    """A data set of the launcher: its documents, each with True if it is held out, their count, and a digest of the text."""

    read: Callable[[], Iterator[tuple[Document, bool]]]
    count: Callable[[], int]
    digest: Callable[[], str]


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
    root = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names):
        file = root / f"{name}.py"
        for path in [file] if file.is_file() else sorted((root / name).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if any(part in LEFT_OUT or part.startswith("_") for part in parts):
                continue
            module, tree = ".".join(parts), ast.parse(path.read_bytes())
            doc = _trim_docstring(tree)
            itself = [_Documented(module, "module", doc, "")] if doc else []
            for item in [*itself, *_list_members(tree, module, inside_class=False)]:
                if item.symbol not in items and item.doc not in texts:
                    items[item.symbol] = item
                    texts.add(item.doc)
    chosen = sorted(items, key=lambda symbol: _hash_to_share(symbol, "choice"))[:NUM_PAIRS]
    pairs = []
    for symbol in sorted(chosen):
        kind, answer, signature = items[symbol].kind, items[symbol].doc, items[symbol].signature
        if signature and _hash_to_share(symbol, "kind") < ARGUMENTS_FRACTION:
            kind, answer = "arguments", f"`{signature}`\n\n{answer}"
        phrasings = PHRASINGS[kind]
        question = phrasings[int(_hash_to_share(symbol, "phrasing") * len(phrasings))].format(name=symbol)
        pairs.append(Pair(symbol, question, answer, held_out=_hash_to_share(symbol, "split") < HELD_OUT_FRACTION))
    return tuple(pairs)


def _hash_to_share(symbol: str, purpose: str) -> float:
    """Return a number in [0, 1) that depends only on the arguments."""
    digest = hashlib.blake2b(f"{purpose}:{symbol}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _list_members(node: ast.Module | ast.ClassDef | ast.If | ast.Try, prefix: str, inside_class: bool) -> Iterator[_Documented]:
    for child in node.body:
        match child:
            case ast.FunctionDef() | ast.AsyncFunctionDef() if not child.name.startswith("_"):
                if doc := _trim_docstring(child):
                    decorators = [ast.unparse(decorator) for decorator in child.decorator_list]
                    is_property = any(name.endswith(("property", ".setter", "DynamicClassAttribute")) for name in decorators)
                    kind = "attribute" if is_property else "method" if inside_class else "function"
                    arguments = ast.unparse(child.args)
                    arguments = arguments.partition(",")[2].strip() if inside_class else arguments
                    # A decorator may change them.
                    is_shown = arguments.strip("/* ,") and not decorators
                    signature = f"{child.name}({arguments})" if is_shown else ""
                    yield _Documented(f"{prefix}.{child.name}", kind, doc, signature)
            case ast.ClassDef() if not child.name.startswith("_"):
                symbol = f"{prefix}.{child.name}"
                if doc := _trim_docstring(child):
                    yield _Documented(symbol, "class", doc, "")
                yield from _list_members(child, symbol, inside_class=True)
            case ast.If() | ast.Try():
                yield from _list_members(child, prefix, inside_class)


def _trim_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
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


@cache
def list_texts() -> tuple[str, ...]:
    """Return the texts, each about 1,500 characters long."""
    return tuple(json.loads(line)["text"] for line in _GENERAL_TEXT_FILE.read_text(encoding="utf-8").splitlines())


# Keyed by the path of the source.
BUILTINS: dict[str, BuiltinSource] = {
    STDLIB_DOCS: BuiltinSource(
        read=lambda: (
            (Document(f"{STDLIB_DOCS}:{p.symbol}", (Message("user", p.question), Message("assistant", p.answer))), p.held_out)
            for p in list_pairs()
        ),
        count=lambda: len(list_pairs()),
        digest=lambda: f"{STDLIB_DOCS} of Python {sys.version}",
    ),
    GENERAL_TEXT: BuiltinSource(
        read=lambda: ((Document(f"{GENERAL_TEXT}:{i}", text=text), False) for i, text in enumerate(list_texts(), 1)),
        count=lambda: len(list_texts()),
        digest=lambda: f"{GENERAL_TEXT} {xxhash.xxh3_128_hexdigest(_GENERAL_TEXT_FILE.read_bytes())}",
    ),
}
