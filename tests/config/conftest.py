from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli.main import main
from launcher.config.compose import Composed, run_hydra
from launcher.errors import ConfigError, Problem


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def session_cache(cache_home: None, launcher_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the cache shared by all tests, for plans that succeed: converting a model takes longer than these tests."""
    monkeypatch.setenv("LAUNCHER_CACHE", str(launcher_cache))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one row"}\n')
    return path


@pytest.fixture
def compose() -> Callable[..., list[Composed]]:
    """Compose a command line; return one result per job."""

    return lambda *tokens: run_hydra(tokens)


@pytest.fixture
def refused(compose: Callable[..., list[Composed]]) -> Callable[..., list[Problem]]:
    """Return the problems for which a command line is refused; check that each has a remedy."""

    def problems(*tokens: str) -> list[Problem]:
        with pytest.raises(ConfigError) as error:
            compose(*tokens)
        assert all(problem.remedy for problem in error.value.problems), error.value.problems
        return list(error.value.problems)

    return problems


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a `plan` that must fail with exit code 2, no stdout and no traceback; return standard error."""

    def text(*tokens: str) -> str:
        code = main(["plan", *tokens])
        out, err = capsys.readouterr()
        assert code == 2, out + err
        assert out == ""
        assert "Traceback" not in err
        return err

    return text
