"""Tokenizers that exhaust memory, and a tokenizer whose vocabulary another user of the machine replaces."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from launcher.data.tokenization.encoder import load_tokenizer

CONFIG = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 300}
DOUBLE = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
# Without a limit, each of these takes at most a few GiB.
DOUBLING = {"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 22}}
DOUBLING_AGAIN = {"decoder": {"type": "Sequence", "decoders": [DOUBLE] * 28}}
# Runs each action in its own process, because `tokenizers` aborts it, with a lower memory limit than a real build.
ATTEMPTS = """
import os, sys
from launcher.config.sections.data import DataSection, Source
from launcher.data.sources import PlainText
from launcher.data.tokenization import encoder, render_limits
render_limits._TOKENIZER_BYTES = 64 << 20
def encode(tokenizer):
    one = encoder.Encoder(tokenizer, DataSection(sources=(Source(path="rows.jsonl"),)))
    one.encode([one.render(PlainText("rows.jsonl:1", "bees"))])
def decode(tokenizer):
    render_limits.decode(tokenizer, [tokenizer.convert_tokens_to_ids("e")])
for action, folder in ((encode, sys.argv[1]), (decode, sys.argv[1]), (encode, sys.argv[2]), (decode, sys.argv[3])):
    tokenizer = encoder.load_tokenizer(folder)
    pid = os.fork()
    if pid == 0:
        action(tokenizer)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
# Follows https://github.com/openai/tiktoken/blob/main/tiktoken/load.py
TIKTOKEN = """
import base64, hashlib, os, tempfile
def load_tiktoken_bpe(path, expected_hash=None):
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.path.join(tempfile.gettempdir(), "data-gym-cache"))
    copy = os.path.join(folder, hashlib.sha1(path.encode()).hexdigest())
    with open(copy if folder and os.path.exists(copy) else path, "rb") as file:
        pairs = [line.split() for line in file.read().splitlines()]
    return {base64.b64decode(token): int(rank) for token, rank in pairs}
"""


def save_tokenizer(folder: Path, **parts: Any) -> Path:
    """Save a byte-level tokenizer whose tokenizer.json has the given `parts`."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps({**json.loads(tokenizer.to_str()), **parts}))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_a_tokenizer_that_doubles_a_text_again_and_again_takes_bounded_memory(tmp_path: Path) -> None:
    parts: dict[str, dict[str, Any]] = {"harmless": {}, "encoding": DOUBLING, "decoding": DOUBLING_AGAIN}
    folders = [str(save_tokenizer(tmp_path / name, **changed)) for name, changed in parts.items()]
    environ = {**os.environ, "RUST_BACKTRACE": "0"}
    done = subprocess.run([sys.executable, "-c", ATTEMPTS, *folders], capture_output=True, text=True, env=environ, timeout=300)
    assert done.stdout.split() == ["0", "0", str(-signal.SIGABRT), str(-signal.SIGABRT)], done.stderr
    assert done.stderr.count("memory allocation of") == 2


@pytest.mark.parametrize("is_named", [False, True])
def test_a_vocabulary_that_another_user_left_in_the_temporary_folder_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_named: bool
) -> None:
    """tiktoken caches the files it reads there, under names that anyone can compute."""
    words = [*(bytes([i]) for i in range(256)), b"an", b"no"]
    folder = tmp_path / "model"
    folder.mkdir()

    def write(file: Path, order: list[bytes]) -> None:
        file.write_text("".join(f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(order)))

    write(folder / "tokenizer.model", words)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tiktoken").mkdir()
    (tmp_path / "tiktoken/__init__.py").touch()
    (tmp_path / "tiktoken/load.py").write_text(TIKTOKEN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "shared"))
    # setenv comes first so that monkeypatch removes the variable that loading the tokenizer sets.
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "shared/data-gym-cache"))
    if not is_named:
        monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    planted = tmp_path / "shared/data-gym-cache" / hashlib.sha1(str(folder / "tokenizer.model").encode()).hexdigest()
    planted.parent.mkdir(parents=True)
    write(planted, words[1:256] + words[:1] + words[256:])
    assert load_tokenizer(str(folder))("no", add_special_tokens=False)["input_ids"] == [words.index(b"no")]
    assert load_tokenizer(str(folder))("e", add_special_tokens=False)["input_ids"] == [ord("e")]
