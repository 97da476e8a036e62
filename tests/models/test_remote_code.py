"""A model's own code on a shared machine, where other users plant files for transformers or swap files after a check.

Model folders from an attacker who wants to run code on this machine or to obtain its files.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from forked import Launch, require_exit
from safetensors.torch import save_file
from weight_tools import save_model

from launcher.config.sections.model import ModelSection
from launcher.errors import CheckpointError, ConfigError, Problem
from launcher.evaluate.transformers_engine import TransformersEngine
from launcher.export import hf_folder
from launcher.models import found_model, remote_code
from launcher.models.found_model import find_model
from launcher.plan.architecture import model_facts
from launcher.train.model import build_model
from launcher.worker.checks import model_check

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
HUB_MODEL = ModelSection(path="owner/name", revision=COMMIT, trust_remote_code=True)
CONFIG = {
    **{"model_type": "mine", "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8},
    **{"intermediate_size": 4, "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}},
}


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
    assert found_model.locate("owner/name", ModelSection(path="owner/name")).folder is None


HOSTILE_CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path({marker!r}).touch()
class C(LlamaConfig):
    model_type = "mine"
class M(LlamaForCausalLM):
    config_class = C
"""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A model with its own code; when the code runs, it creates the file `ran` next to the folder."""
    hostile = tmp_path / "model"
    hostile.mkdir()
    (hostile / "config.json").write_text(json.dumps(CONFIG))
    (hostile / "code.py").write_text(HOSTILE_CODE.format(marker=str(tmp_path / "ran")))
    save_file({"t": torch.zeros(2)}, hostile / "model.safetensors")
    return hostile


@pytest.fixture
def private_file(tmp_path: Path) -> Path:
    (tmp_path / "credentials").write_text("a key")
    return tmp_path / "credentials"


def section(hostile: Path, **settings: Any) -> ModelSection:
    return ModelSection(path=str(hostile), **settings)


def checked(hostile: Path, **settings: Any) -> list[Problem]:
    return find_model(section(hostile, **settings)).problems


def test_the_code_of_a_folder_runs_only_where_its_digest_is_set(hostile: Path, tmp_path: Path) -> None:
    # For a local folder, `revision` pins nothing.
    (problem,) = checked(hostile, trust_remote_code=True, revision="0" * 40)
    assert problem.message.startswith("model.path: the code in the folder is not pinned")
    digest = problem.remedy.rpartition("=")[2]
    pinned = section(hostile, trust_remote_code=True, code_digest=digest)
    assert find_model(pinned).problems == []
    assert not (tmp_path / "ran").exists()
    model_check.compare_weights(hostile, pinned)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["name_or_path", "_name_or_path"])
def test_no_code_runs_before_the_pinned_one_is_here(hostile: Path, tmp_path: Path, key: str) -> None:
    """transformers would load the code that config.json names, from another folder or from a repository's newest commit."""
    config = {**CONFIG, "model_type": "llama", key: str(hostile)}
    model = ModelSection(path="owner/name", revision="0" * 40, trust_remote_code=True, config=config, dtype="fp32")
    assert find_model(model).problems == []
    facts = model_facts(config, None, None, None)
    assert model_check._probe(model, facts)[1] == "isolated"
    assert type(build_model(model, facts, "cpu", chunk_tokens=8).hf).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


def test_code_of_another_folder_does_not_run(hostile: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(hostile, other)
    names = {"AutoConfig": f"{other}--code.C", "AutoModelForCausalLM": f"{other}--code.M"}
    (hostile / "config.json").write_text(json.dumps({**CONFIG, "auto_map": names}))
    with pytest.raises(ConfigError):
        model_check.compare_weights(
            hostile, section(hostile, trust_remote_code=True, code_digest=remote_code.code_digest(hostile))
        )
    assert not (tmp_path / "ran").exists()


def test_plan_does_not_run_the_code_of_a_model(hostile: Path, tmp_path: Path, launch_here: Launch) -> None:
    """Another user's settings file can name that user's model and allow its code."""
    # The embedding covers all tokens of the data, which may be prepared already.
    config = {**CONFIG, "model_type": "llama", "max_position_embeddings": 2048, "vocab_size": 49152}
    (hostile / "config.json").write_text(json.dumps(config))
    allowed = ("model.trust_remote_code=true", f"model.code_digest={remote_code.code_digest(hostile)}")
    done = launch_here("plan", "model=tiny", f"model.path={hostile}", "data=stdlib_docs", *allowed)
    require_exit(done)
    assert "plan does not run the code of a model" in " ".join(done.stdout.split())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change", ["code.py", "below/deeper.py"])
def test_changed_code_is_refused_at_the_start_and_by_whatever_would_load_it(hostile: Path, tmp_path: Path, change: str) -> None:
    pinned = section(hostile, trust_remote_code=True, code_digest=remote_code.code_digest(hostile))
    (hostile / change).parent.mkdir(exist_ok=True)
    with open(hostile / change, "a") as file:
        file.write("# changed\n")
    (problem,) = find_model(pinned).problems
    assert problem.message == "model.path: the code in the folder differs from the code that model.code_digest pins"
    with pytest.raises(ConfigError, match="differs from the code that"):
        model_check.compare_weights(hostile, pinned)
    assert not (tmp_path / "ran").exists()


def test_flash_attention_in_config_json_fetches_nothing_from_the_hub(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without flash-attn installed, transformers would load it with the package `kernels` from kernels-community on the Hub."""
    from transformers.utils import import_utils

    version = getattr(import_utils, "KERNELS_MIN_VERSION", "1")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").touch()
    (tmp_path / f"kernels-{version}.dist-info").mkdir()
    (tmp_path / f"kernels-{version}.dist-info/METADATA").write_text(f"Name: kernels\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    import_utils.is_kernels_available.cache_clear()
    assert import_utils.is_kernels_available()
    config = {**CONFIG, "model_type": "llama", "auto_map": {}, "attn_implementation": "flash_attention_2"}
    (hostile / "config.json").write_text(json.dumps(config))
    with pytest.raises(ImportError, match="FlashAttention2"):
        TransformersEngine(hostile, section(hostile), None, dtype="fp32", device="cpu", stop_ids=())  # type: ignore[arg-type]
    assert not import_utils.is_kernels_available()


def test_a_model_without_a_folder_gets_neither_code_nor_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    assert remote_code.code_option(trusts_code=True, folder=None) == {"trust_remote_code": False}
    with pytest.raises(ImportError):
        importlib.import_module("kernels")


@pytest.mark.parametrize("name", ["LICENSE", "model.safetensors"])
def test_a_link_that_leaves_the_folder_is_refused_before_anything_copies_it(
    hostile: Path, private_file: Path, tmp_path: Path, name: str
) -> None:
    (hostile / name).unlink(missing_ok=True)
    (hostile / name).symlink_to(private_file)
    expected = f"the file {name} is a link to a file outside the folder: {private_file}"
    assert expected in [problem.message for problem in checked(hostile)]
    if name == "LICENSE":
        task = hf_folder.ExportTask(checkpoint=tmp_path, model=hostile, tokenizer=hostile, out=tmp_path / "export")
        task.partial.mkdir()
        with pytest.raises(CheckpointError, match=name):
            hf_folder._copy_side_files(task, hostile)
        assert list(task.partial.iterdir()) == []


def test_links_within_folders_and_to_the_cache_of_the_hub_are_followed(tmp_path: Path, private_file: Path) -> None:
    repository = tmp_path / "hub/models--owner--name"
    snapshot = repository / "snapshots/0123"
    (repository / "blobs").mkdir(parents=True)
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    (tmp_path / "hub/blobs/ab").mkdir(parents=True)
    (tmp_path / "hub/blobs/ab/shared").write_text("{}")
    (repository / "blobs/one").write_text("{}")
    (repository / "blobs/two").symlink_to("../../blobs/ab/shared")
    (snapshot / "config.json").symlink_to("../../blobs/one")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/two")
    (snapshot / "LICENSE").symlink_to("config.json")
    (snapshot / "additional_chat_templates/a.jinja").symlink_to("../../../blobs/one")
    (snapshot / "model.safetensors").symlink_to("../../blobs/one")
    assert list(found_model.link_problems(snapshot)) == []
    (snapshot / "additional_chat_templates/b.jinja").symlink_to(private_file)
    (snapshot / "NOTICE").symlink_to("../../../models--owner--name")
    names = [problem.value for problem in found_model.link_problems(snapshot)]
    assert names == ["NOTICE", "additional_chat_templates/b.jinja"]


def test_weights_outside_of_the_folder_are_refused(hostile: Path) -> None:
    name = "../../etc/passwd"
    (hostile / "config.json").write_text(json.dumps({**CONFIG, "model_type": "llama", "transformers_weights": name}))
    (problem,) = checked(hostile)
    assert "transformers_weights" in problem.message
    (hostile / "config.json").write_text(json.dumps({**CONFIG, "model_type": "llama"}))
    (hostile / "model.safetensors").unlink()
    (hostile / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t": name}}))
    (problem,) = checked(hostile)
    assert "weight_map" in problem.message
