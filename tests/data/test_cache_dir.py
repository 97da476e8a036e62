"""Repositories are downloaded into the Hub's cache if nobody else can write there, and otherwise into the launcher's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from file_owners import MALLORY, as_root, give

from launcher.config.sections.model import ModelSection
from launcher.data import cache_dir
from launcher.models import found_model

__all__ = ["as_root"]

COMMIT = "1" * 40
REPOSITORY = "models--owner--name"


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The Hub's cache, which others can reach, and a launcher's cache of this user."""
    temporary = tempfile.TemporaryDirectory(dir="/tmp")
    Path(temporary.name).chmod(0o755)
    folder = Path(temporary.name, "home/shared")
    folder.mkdir(mode=0o755, parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "launcher"))
    cache_dir._print_once.cache_clear()
    with temporary:
        yield folder


def add_snapshot(cache: Path) -> Path:
    repository = cache / REPOSITORY
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
    return snapshot


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda cache: cache.chmod(0o777), "can be written by everyone"),
        (lambda cache: cache.parent.chmod(0o777), "can be written by everyone"),
        (lambda cache: give(cache), f"belongs to {MALLORY}"),
    ],
)
def test_where_others_can_write_nothing_is_downloaded(
    shared: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], object], reason: str
) -> None:
    snapshot = add_snapshot(shared)
    assert cache_dir.download_cache("owner/name") == shared
    assert capsys.readouterr().err == ""
    change(shared)
    own = cache_dir.own_hub_cache()
    assert cache_dir.download_cache("owner/name") == own
    said = capsys.readouterr().err
    assert said.startswith("the Hub's cache is not trusted: ")
    assert reason in said
    assert f"; downloads go to {own}; to use the Hub's cache: " in said
    assert own.stat().st_mode & 0o777 == 0o700
    model = ModelSection(path="owner/name")
    assert found_model.locate("owner/name", model).folder == snapshot, "what is there is still read"
    downloaded = add_snapshot(own)
    assert found_model.locate("owner/name", model).folder == downloaded, "nobody else can replace it"
