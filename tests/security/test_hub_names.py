"""Another user's folder is not used in place of the Hub repository of the same name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from file_owners import MALLORY, as_root, give
from plan_fixtures import config_of

from launcher import facts
from launcher.config.schema import RunConfig
from launcher.config.sections.data import DataSection
from launcher.data.sources import list_inputs
from launcher.errors import ConfigError, DataError
from launcher.evaluate import questions
from launcher.hardware import device

__all__ = ["as_root", "config_of"]

pytestmark = pytest.mark.usefixtures("as_root")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a folder for each repository name."""
    monkeypatch.delenv("LAUNCHER_TRUST_OWNERS", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("Qwen/Qwen3-8B", "openai/gsm8k"):
        Path(name).mkdir(parents=True)
    Path("openai/gsm8k/train.jsonl").write_text('{"text": "a row"}\n')
    return tmp_path


def problems(config: RunConfig) -> str:
    with pytest.raises(ConfigError) as refused:
        facts.check(facts.resolve(config, device))
    return str(refused.value)


@pytest.mark.parametrize("part", ["Qwen", "Qwen/Qwen3-8B"])
def test_weights_of_another_user(config_of: Callable[..., RunConfig], folder: Path, part: str) -> None:
    """The preset names the repository, so its user may not know that the folder exists."""
    config = config_of("model=qwen3_8b")
    shutil.chown(folder / part, MALLORY)
    refusal = problems(config)
    assert f"model.path: Qwen/Qwen3-8B names a repository of the Hub, and {MALLORY} has made a path of that name here" in refusal
    assert "write ./Qwen/Qwen3-8B if that path is meant" in refusal
    meant = config_of("model=qwen3_8b", "model.path=./Qwen/Qwen3-8B")
    assert "names a repository" not in problems(meant), "it has no config.json"


@pytest.mark.parametrize("key", ["data.path", "data.eval_path"])
def test_rows_of_another_user(config_of: Callable[..., RunConfig], folder: Path, key: str) -> None:
    config = config_of("data=jsonl", "data.path=./openai/gsm8k", f"{key}=openai/gsm8k", "data.eval_fraction=0")
    give(folder / "openai")
    assert f"openai/gsm8k names a repository of the Hub, and {MALLORY} has made a path" in problems(config)


def test_folders_of_the_user_are_used(config_of: Callable[..., RunConfig], folder: Path) -> None:
    config = facts.resolve(config_of("model=qwen3_8b", "data=jsonl", "data.path=openai/gsm8k"), device)
    assert config.model.path == "./Qwen/Qwen3-8B"
    assert "names a repository" not in problems(config)


def test_questions_of_an_evaluation_in_another_folder(folder: Path) -> None:
    """An evaluation reads a run's sources again and resolves their names in its own working directory."""
    data = DataSection.model_validate({"sources": [{"path": "openai/gsm8k"}]})
    encoder: Any = SimpleNamespace(write_as_chat=lambda document, completions: document)
    assert len(list(questions.read_documents(list_inputs(data), encoder, data.checks))) == 1
    give(folder / "openai")
    with pytest.raises(DataError, match=f"openai/gsm8k names a repository of the Hub, and {MALLORY} has made a path"):
        list(questions.read_documents(list_inputs(data), encoder, data.checks))
