"""Push to a fake Hub that supports uploads, in a separate process: huggingface_hub reads the Hub's address on import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, running_hub

from launcher.errors import PushError
from launcher.export import hub as pushing

pytestmark = pytest.mark.rest

TOKEN = "canary-of-the-hub-4711"
CODE = """
import sys
from pathlib import Path
from launcher.export.hub import push
from launcher.errors import PushError
try:
    print(push(Path(sys.argv[1]), "owner/name", again="the same command"))
except PushError as error:
    print(error)
    sys.exit(1)
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running_hub(TOKEN) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {"config.json": b"{}", "README.md": b"---\nlicense: mit\n---\n", "model.safetensors": os.urandom(100_000)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def push(hub: FakeHub, folder: Path, token: str = TOKEN, address: str | None = None) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {"HF_ENDPOINT": address or hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder.parent / "hf")}
    return subprocess.run(
        [sys.executable, "-c", CODE, str(folder)],
        env={**environ, **settings, "HF_TOKEN": token},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_a_push_replaces_the_files_of_an_earlier_export(hub: FakeHub, folder: Path) -> None:
    hub.files = {
        ".gitattributes": b"*",
        "notes.md": b"mine",
        "model-00001-of-00002.safetensors": b"old",
        "model.safetensors.index.json": b"{}",
    }
    done = push(hub, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == f"{hub.address}/owner/name"
    assert hub.unknown == []
    assert hub.private is True
    assert len(hub.commits) == 1
    kept = {".gitattributes": b"*", "notes.md": b"mine"}
    assert hub.files == kept | {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_public_repository_gets_nothing(hub: FakeHub, folder: Path) -> None:
    hub.exists, hub.private = True, False
    refused = push(hub, folder)
    assert refused.returncode == 1, refused.stdout + refused.stderr
    assert f"hf upload owner/name {folder}" in refused.stdout
    assert (hub.commits, hub.stored, hub.files) == ([], {}, {})


def test_a_link_to_a_file_outside_of_the_folder_is_not_pushed(hub: FakeHub, folder: Path, tmp_path_factory: Any) -> None:
    secret = tmp_path_factory.mktemp("home") / "credentials"
    secret.write_text("key")
    (folder / "LICENSE").symlink_to(secret)
    refused = push(hub, folder)
    assert refused.returncode == 1, refused.stdout + refused.stderr
    assert "the file LICENSE is a link to a file outside the folder" in refused.stdout
    assert (hub.commits, hub.exists) == ([], False)


@pytest.mark.parametrize(("end", "status"), [("preupload/main", 403), ("commit/main", 500), ("objects/batch", 403)])
def test_a_refused_push_names_the_command_that_repeats_it(hub: FakeHub, folder: Path, end: str, status: int) -> None:
    hub.refuse = {end: status}
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = push(hub, folder)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "could not be pushed to the Hub; it is complete on this machine" in done.stdout
    assert "then: the same command" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert hub.commits == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_wrong_token_and_an_unreachable_hub_are_reported(hub: FakeHub, folder: Path) -> None:
    wrong = push(hub, folder, token="somebody-elses")
    assert wrong.returncode == 1
    assert "401" in wrong.stdout
    gone = push(hub, folder, address="http://127.0.0.1:9")
    assert gone.returncode == 1
    assert "check the network" in gone.stdout


def test_a_run_that_would_be_pushed_to_a_public_repository_is_refused_before_it_starts(
    hub: FakeHub, launch: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """The check comes before the start, not after days of training."""
    hub.exists, hub.private = True, False
    access = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    settings = ("model=tiny", "data.packing=false", "export.push_to_hub=owner/name", f"run.root={tmp_path / 'runs'}")
    refused = launch("train", *settings, **access)
    assert (refused.returncode, refused.stdout) == (2, ""), refused.stdout + refused.stderr
    assert "the repository is public, so everyone could download the model" in refused.stderr
    assert not (tmp_path / "runs").exists()
    assert hub.commits == []


NOTE_CODE = """
from types import SimpleNamespace as Namespace
from launcher.clusters.preflight import push_note
for name in ("owner/name", None):
    print(push_note(Namespace(config=Namespace(export=Namespace(push_to_hub=name)))))
"""


@pytest.mark.parametrize(("state", "is_noted"), [("private", False), ("missing", False), ("unreachable", True)])
def test_a_hub_that_cannot_be_asked_is_a_note(hub: FakeHub, tmp_path: Path, state: str, is_noted: bool) -> None:
    hub.exists, hub.private = state == "private", True
    address = "http://127.0.0.1:9" if state == "unreachable" else hub.address
    env = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", NOTE_CODE], env=env, capture_output=True, text=True, check=True, timeout=100)
    first, without = done.stdout.splitlines()
    assert without == "None"
    assert first.startswith("the Hub did not say whether owner/name is public" if is_noted else "None")


def test_without_a_token_the_hub_is_not_contacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(PushError, match="HF_TOKEN"):
        pushing.push(tmp_path, "owner/name", again="")
    assert pushing.token_problem("--push", "owner/name", {"HF_TOKEN": "x"}) is None
    problem = pushing.token_problem("--push", "owner/name", {"HF_TOKEN": ""})
    assert problem is not None
    assert problem.where == "--push"
    assert "HF_TOKEN" in problem.remedy
    assert json.dumps(problem.value) == '"owner/name"'
