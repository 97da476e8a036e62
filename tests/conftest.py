"""What every test may use: the launcher as a command, and a cache of models and data of the session's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
RUN_DEADLINE_S = 240


@pytest.fixture(scope="session")
def launcher_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for converted models and built data; the demonstration model is converted once a session."""
    return tmp_path_factory.mktemp("launcher-cache")


@pytest.fixture(scope="session")
def launcher_env(launcher_cache: Path) -> dict[str, str]:
    """The environment of launcher processes: no keys, no hub, a cache of their own."""
    dropped = ("WANDB_", "HF_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {"LAUNCHER_CACHE": str(launcher_cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO), "NETRC": os.devnull}


@pytest.fixture(scope="session")
def launch(launcher_env: Mapping[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m launcher ARGUMENTS` to its end."""

    def run(
        *arguments: str, cwd: Path | None = None, timeout: float = RUN_DEADLINE_S, **env: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "launcher", *arguments],
            capture_output=True,
            text=True,
            cwd=cwd or REPO,
            env={**launcher_env, **env},
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def demo_model(launch: Callable[..., subprocess.CompletedProcess[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration model as a Hugging Face folder; its data cache is built as well."""
    done = launch("data", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(launch("plan", "--json").stdout)
    return Path(plan["model"]["path"])


@pytest.fixture(scope="session")
def start(launcher_env: Mapping[str, str]) -> Callable[..., object]:
    """Start `python -m launcher ARGUMENTS` in the background; killed with all it started when the block is left."""

    @contextmanager
    def begin(*arguments: str, cwd: Path | None = None, **env: str) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd or REPO,
            env={**launcher_env, **env},
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(timeout=30)
            if process.stdout is not None:
                process.stdout.close()

    return begin
