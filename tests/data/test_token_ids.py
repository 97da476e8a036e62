"""A tokenizer with ids beyond the model's embedding is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from launcher import facts
from launcher.config.compose import run_hydra
from launcher.config.schema import RunConfig
from launcher.config.sections.data import DataSection
from launcher.data.build import build
from launcher.errors import DataError


def composed(tokenizer_dir: Path, chats: Path, vocab_size: int) -> RunConfig:
    configs: list[RunConfig] = []
    model = [f"model.tokenizer={tokenizer_dir}", f"model.config.vocab_size={vocab_size}"]
    run_hydra(["model=tiny", *model, "data=jsonl", f"data.path={chats}"], lambda done: configs.append(done.config))
    return configs[0]


def test_ids_beyond_the_embedding_are_refused(section: Callable[..., DataSection], tokenizer_dir: Path, chats: Path) -> None:
    config = composed(tokenizer_dir, chats, vocab_size=100)
    assert facts.gather(config, []).data is None
    build(config.data, str(tokenizer_dir))
    with pytest.raises(DataError, match="embedding has 100 rows") as caught:
        facts.gather(config, [])
    assert caught.value.problems[0].value == str(tokenizer_dir)
    whole = composed(tokenizer_dir, chats, vocab_size=len(AutoTokenizer.from_pretrained(str(tokenizer_dir))))
    assert facts.gather(whole, []).data is not None
