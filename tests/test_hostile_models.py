"""Model folders from an attacker who wants to run code on this machine or to obtain its files."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launcher.checkpoint import model_folder
from launcher.config.sections.model import ModelSection
from launcher.errors import CheckpointError, ConfigError, Problem
from launcher.evaluate.transformers_engine import TransformersEngine
from launcher.export import hf_folder
from launcher.models import remote_code
from launcher.models.found_model import find_model
from launcher.plan.architecture import model_facts
from launcher.train.model import build_model
from launcher.worker.checks import model_check

CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path({marker!r}).touch()
class C(LlamaConfig):
    model_type = "mine"
class M(LlamaForCausalLM):
    config_class = C
"""
CONFIG = {
    **{"model_type": "mine", "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8},
    **{"intermediate_size": 4, "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with its own code; when the code runs, it creates the file `ran` next to the folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "code.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    save_file({"t": torch.zeros(2)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def private_file(tmp_path: Path) -> Path:
    (tmp_path / "credentials").write_text("a key")
    return tmp_path / "credentials"


def section(folder: Path, **settings: Any) -> ModelSection:
    return ModelSection(path=str(folder), **settings)


def checked(folder: Path, **settings: Any) -> list[Problem]:
    return find_model(section(folder, **settings)).problems


def test_the_code_of_a_folder_runs_only_where_its_digest_is_set(folder: Path, tmp_path: Path) -> None:
    # For a local folder, `revision` pins nothing.
    (problem,) = checked(folder, trust_remote_code=True, revision="0" * 40)
    assert problem.message.startswith("model.path: the code in the folder is not pinned")
    digest = problem.remedy.rpartition("=")[2]
    pinned = section(folder, trust_remote_code=True, code_digest=digest)
    assert find_model(pinned).problems == []
    assert not (tmp_path / "ran").exists()
    model_check.compare_weights(folder, pinned)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["name_or_path", "_name_or_path"])
def test_no_code_runs_before_the_pinned_one_is_here(folder: Path, tmp_path: Path, key: str) -> None:
    """transformers would load the code that config.json names, from another folder or from a repository's newest commit."""
    config = {**CONFIG, "model_type": "llama", key: str(folder)}
    model = ModelSection(path="owner/name", revision="0" * 40, trust_remote_code=True, config=config, dtype="fp32")
    assert find_model(model).problems == []
    facts = model_facts(config, None, None, None)
    assert model_check._probe(model, facts)[1] == "isolated"
    assert type(build_model(model, facts, "cpu", chunk_tokens=8).hf).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


def test_code_of_another_folder_does_not_run(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    names = {"AutoConfig": f"{other}--code.C", "AutoModelForCausalLM": f"{other}--code.M"}
    (folder / "config.json").write_text(json.dumps({**CONFIG, "auto_map": names}))
    with pytest.raises(ConfigError):
        model_check.compare_weights(folder, section(folder, trust_remote_code=True, code_digest=remote_code.code_digest(folder)))
    assert not (tmp_path / "ran").exists()


def test_plan_does_not_run_the_code_of_a_model(
    folder: Path, tmp_path: Path, launch_here: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Another user's settings file can name that user's model and allow its code."""
    # The embedding covers all tokens of the data, which may be prepared already.
    config = {**CONFIG, "model_type": "llama", "max_position_embeddings": 2048, "vocab_size": 49152}
    (folder / "config.json").write_text(json.dumps(config))
    allowed = ("model.trust_remote_code=true", f"model.code_digest={remote_code.code_digest(folder)}")
    done = launch_here("plan", "model=tiny", f"model.path={folder}", "data=stdlib_docs", *allowed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "plan does not run the code of a model" in " ".join(done.stdout.split())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change", ["code.py", "below/deeper.py"])
def test_changed_code_is_refused_at_the_start_and_by_whatever_would_load_it(folder: Path, tmp_path: Path, change: str) -> None:
    pinned = section(folder, trust_remote_code=True, code_digest=remote_code.code_digest(folder))
    (folder / change).parent.mkdir(exist_ok=True)
    with open(folder / change, "a") as file:
        file.write("# changed\n")
    (problem,) = find_model(pinned).problems
    assert problem.message == "model.path: the code in the folder differs from the code that model.code_digest pins"
    with pytest.raises(ConfigError, match="differs from the code that"):
        model_check.compare_weights(folder, pinned)
    assert not (tmp_path / "ran").exists()


def test_flash_attention_in_config_json_fetches_nothing_from_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ImportError, match="FlashAttention2"):
        TransformersEngine(folder, section(folder), None, dtype="fp32", device="cpu", stop_ids=())  # type: ignore[arg-type]
    assert not import_utils.is_kernels_available()


def test_a_model_without_a_folder_gets_neither_code_nor_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    assert remote_code.code_option(trusts_code=True, folder=None) == {"trust_remote_code": False}
    with pytest.raises(ImportError):
        importlib.import_module("kernels")


@pytest.mark.parametrize("name", ["LICENSE", "model.safetensors"])
def test_a_link_that_leaves_the_folder_is_refused_before_anything_copies_it(
    folder: Path, private_file: Path, tmp_path: Path, name: str
) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(private_file)
    expected = f"the file {name} is a link to a file outside the folder: {private_file}"
    assert expected in [problem.message for problem in checked(folder)]
    if name == "LICENSE":
        task = hf_folder.ExportTask(checkpoint=tmp_path, model=folder, tokenizer=folder, out=tmp_path / "export")
        task.partial.mkdir()
        with pytest.raises(CheckpointError, match=name):
            hf_folder._copy_side_files(task, folder)
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
    assert list(model_folder.link_problems(snapshot)) == []
    (snapshot / "additional_chat_templates/b.jinja").symlink_to(private_file)
    (snapshot / "NOTICE").symlink_to("../../../models--owner--name")
    names = [problem.value for problem in model_folder.link_problems(snapshot)]
    assert names == ["NOTICE", "additional_chat_templates/b.jinja"]


def test_weights_outside_of_the_folder_are_refused(folder: Path) -> None:
    name = "../../etc/passwd"
    (folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": "llama", "transformers_weights": name}))
    (problem,) = checked(folder)
    assert "transformers_weights" in problem.message
    (folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": "llama"}))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t": name}}))
    (problem,) = checked(folder)
    assert "weight_map" in problem.message
