"""A model's own code on a shared machine, where other users plant files for transformers or swap files after a check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from weight_tools import save_model

from launcher.config.sections.model import ModelSection
from launcher.models import found_model, remote_code
from launcher.models.found_model import find_model
from launcher.train.model import build_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DAEMON = 1
CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
from .part import touch
touch()
class C(LlamaConfig):
    model_type = "mine"
class M(LlamaForCausalLM):
    config_class = C
"""
PART = """
import pathlib
def touch():
    pathlib.Path({marker!r}).touch()
"""
# Loads a model in a separate process, as the weight check, the probe, each rank and an export do.
LOAD = """
import sys
from pathlib import Path
from launcher.config.schema import ModelSection
from launcher.worker.checks import model_check
model_check.compare_weights(Path(sys.argv[1]), ModelSection.model_validate_json(sys.argv[2]))
"""


def write_code(folder: Path, marker: Path) -> None:
    (folder / "code.py").write_text(CODE)
    (folder / "part.py").write_text(PART.format(marker=str(marker)))


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The file that the model's own code creates when it runs."""
    return tmp_path / "ran"


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """The file that another user's code creates when it runs."""
    return tmp_path / "planted"


@pytest.fixture
def folder(tmp_path: Path, ran: Path) -> Path:
    """A model with weights and its own code."""
    folder = save_model(tmp_path / "model", {"model_type": "llama"})
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps({**config, **own}))
    write_code(folder, ran)
    return folder


@pytest.fixture
def snapshot(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same model in a shared Hub cache, as links to blobs."""
    hub = tmp_path / "shared/hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    snapshot = hub / "models--owner--name/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for file in folder.iterdir():
        file.rename(blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    return snapshot


def pinned(folder: Path) -> ModelSection:
    return ModelSection(path=str(folder), trust_remote_code=True, code_digest=remote_code.code_digest(folder), dtype="fp32")


HUB_MODEL = ModelSection(path="owner/name", revision=COMMIT, trust_remote_code=True)


@pytest.mark.rest
def test_modules_that_others_planted_in_a_shared_cache_do_not_run(folder: Path, ran: Path, planted: Path, tmp_path: Path) -> None:
    home = tmp_path / "shared"
    (home / "modules/transformers_modules/model").mkdir(parents=True)
    for package in ("transformers_modules", "transformers_modules/model"):
        (home / "modules" / package / "__init__.py").write_text(f"open({str(planted)!r}, 'w')")
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "HF_HOME": str(home), "TMPDIR": str(tmp_path / "temporary")}
    environment.pop("HF_MODULES_CACHE", None)
    arguments = [sys.executable, "-c", LOAD, str(folder), pinned(folder).model_dump_json()]
    subprocess.run(arguments, env=environment, check=True, timeout=300)
    assert ran.exists()
    assert not planted.exists()
    assert list((tmp_path / "temporary").iterdir()) == [], "the private copy is removed"


def test_a_rank_runs_no_code_that_the_digest_does_not_cover(folder: Path, ran: Path, planted: Path, tmp_path: Path) -> None:
    """transformers runs custom_generate/generate.py even if the folder is a link, which the digest does not follow."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "generate.py").write_text(f"open({str(planted)!r}, 'w')\ndef generate(*args, **kwargs): ...\n")
    (folder / "custom_generate").symlink_to(elsewhere)
    model = pinned(folder)
    built = build_model(model, find_model(model).facts, "cpu", chunk_tokens=8)
    assert type(built.hf).__name__ == "M"
    assert (ran.exists(), planted.exists()) == (True, False)


def test_a_snapshot_of_this_user_is_loaded_from_a_private_copy(snapshot: Path, ran: Path, planted: Path) -> None:
    path = remote_code.folder_to_load(snapshot, True, None)
    hf = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    assert type(hf).__name__ == "M"
    assert ran.exists()


@pytest.mark.parametrize("target", ["other", "../../../elsewhere"])
def test_a_reference_does_not_lead_a_pinned_commit_to_other_code(snapshot: Path, target: str) -> None:
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / COMMIT).write_text(target)
    other = snapshot.parent / target
    other.mkdir()
    (other / "config.json").write_text("{}")
    assert found_model.locate("owner/name", HUB_MODEL).folder == snapshot
    (snapshot.parents[1] / "refs/main").write_text("../../../elsewhere")
    assert not [*found_model._list_snapshots("owner/name", None)]
