"""Ray makes its folders writable for everyone, so other users must not be able to reach those of a run's own Ray."""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from file_owners import MALLORY, as_root

from launcher import run_store
from launcher.config.sections.ray import RaySection
from launcher.plan.run_dir import RunDir
from launcher.worker.ray import connection

__all__ = ["as_root"]

# The path that Ray creates below its folder, with the longest process id.
_SOCKET = f"session_2026-11-29_13-50-58_775902_{2**22}/sockets/plasma_store"
_MAX_SOCKET_CHARS = 107


@pytest.mark.usefixtures("as_root")
def test_nobody_puts_a_socket_in_place_of_the_one_of_the_raylet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ray._common.utils import try_to_create_directory

    monkeypatch.setattr(run_store, "read_status", lambda run: SimpleNamespace(state="completed"))
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    with connection._own_folder(RunDir(tmp_path)) as folder:
        sockets = folder / "session" / "sockets"
        for made in (folder, sockets.parent, sockets):
            try_to_create_directory(str(made))
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o777, "Ray does not do that any more"
        attempt = ["/usr/bin/env", "touch", str(sockets / "raylet")]
        done = subprocess.run(attempt, user=MALLORY, group=MALLORY, extra_groups=[], capture_output=True, text=True, cwd="/")
        assert done.returncode != 0
        assert not os.listdir(sockets)
    assert not folder.parent.exists()


def test_socket_names_fit_below_the_longest_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run_store, "read_status", lambda run: SimpleNamespace(state="completed"))
    names = []
    monkeypatch.setattr(tempfile, "mkdtemp", lambda prefix, dir: names.append(dir) or str(tmp_path / "none"))
    for length in (connection._MAX_FOLDER_CHARS, connection._MAX_FOLDER_CHARS + 1):
        monkeypatch.setattr(tempfile, "tempdir", "/" + "t" * (length - 1))
        with connection._own_folder(RunDir(tmp_path)) as folder:
            inner = folder.name
    assert [len(name) for name in names] == [connection._MAX_FOLDER_CHARS, len("/tmp")]
    assert len(f"{names[0]}/ray-12345678/{inner}/{_SOCKET}") <= _MAX_SOCKET_CHARS


def test_the_token_is_not_in_the_run_which_a_group_may_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """docs/security.md suggests chmod -R g+rX RUN, and anyone with the token can run code as the run's user."""
    import ray

    plan = SimpleNamespace(config=SimpleNamespace(cluster=RaySection()), topology=SimpleNamespace(device="cpu", world_size=1))
    monkeypatch.setattr(run_store, "read_status", lambda run: SimpleNamespace(state="completed"))
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.setattr(ray, "init", lambda **options: None)
    with connection._own_folder(RunDir(tmp_path)) as folder:
        connection._start(plan, "", folder, {})
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert len(token.read_text()) == 64
        assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert not token.exists()
    assert list(tmp_path.iterdir()) == []
