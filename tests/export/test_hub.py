"""Push to a fake Hub that supports uploads, in a separate process: huggingface_hub reads the Hub's address on import.

The model card is complete, accepted by the Hub, and free of private details.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, running_hub
from forked import Launch, require_exit
from huggingface_hub import ModelCard
from plan_fixtures import composed, facts_for

from launcher.checkpoint.manifest import Manifest
from launcher.errors import PushError
from launcher.export import hub as pushing
from launcher.export.hf_folder import ExportedFolder
from launcher.export.model_card import render_model_card
from launcher.export.parity import LogitParity
from launcher.plan.launch_plan import LaunchPlan, Lineage, Origin
from launcher.plan.planner import plan as make_plan

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
NOTE_CODE = """
from types import SimpleNamespace as Namespace
from launcher.clusters.preflight import push_note
for name in ("owner/name", None):
    print(push_note(Namespace(config=Namespace(export=Namespace(push_to_hub=name)))))
"""
MANIFEST = Manifest(step=40, world_size=2, plan_digest="d1ge57", attempt=2, eval_loss=1.75, files={})


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


@pytest.mark.rest
def test_a_push_replaces_the_files_of_an_earlier_export(hub: FakeHub, folder: Path) -> None:
    hub.files = {
        ".gitattributes": b"*",
        "notes.md": b"mine",
        "model-00001-of-00002.safetensors": b"old",
        "model.safetensors.index.json": b"{}",
    }
    done = push(hub, folder)
    require_exit(done)
    assert done.stdout.strip() == f"{hub.address}/owner/name"
    assert hub.unknown == []
    assert hub.private is True
    assert len(hub.commits) == 1
    kept = {".gitattributes": b"*", "notes.md": b"mine"}
    assert hub.files == kept | {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.rest
def test_a_public_repository_gets_nothing(hub: FakeHub, folder: Path) -> None:
    hub.exists, hub.private = True, False
    refused = push(hub, folder)
    require_exit(refused, 1)
    assert f"hf upload owner/name {folder}" in refused.stdout
    assert (hub.commits, hub.stored, hub.files) == ([], {}, {})


@pytest.mark.rest
def test_a_link_to_a_file_outside_of_the_folder_is_not_pushed(hub: FakeHub, folder: Path, tmp_path_factory: Any) -> None:
    secret = tmp_path_factory.mktemp("home") / "credentials"
    secret.write_text("key")
    (folder / "LICENSE").symlink_to(secret)
    refused = push(hub, folder)
    require_exit(refused, 1)
    assert "the file LICENSE is a link to a file outside the folder" in refused.stdout
    assert (hub.commits, hub.exists) == ([], False)


@pytest.mark.rest
@pytest.mark.parametrize(("end", "status"), [("preupload/main", 403), ("commit/main", 500), ("objects/batch", 403)])
def test_a_refused_push_names_the_command_that_repeats_it(hub: FakeHub, folder: Path, end: str, status: int) -> None:
    hub.refuse = {end: status}
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = push(hub, folder)
    require_exit(done, 1)
    assert "could not be pushed to the Hub; it is complete on this machine" in done.stdout
    assert "then: the same command" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert hub.commits == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.rest
def test_a_wrong_token_and_an_unreachable_hub_are_reported(hub: FakeHub, folder: Path) -> None:
    wrong = push(hub, folder, token="somebody-elses")
    assert wrong.returncode == 1
    assert "401" in wrong.stdout
    gone = push(hub, folder, address="http://127.0.0.1:9")
    assert gone.returncode == 1
    assert "check the network" in gone.stdout


@pytest.mark.rest
def test_a_run_that_would_be_pushed_to_a_public_repository_is_refused_before_it_starts(
    hub: FakeHub, launch: Launch, tmp_path: Path
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


@pytest.mark.rest
@pytest.mark.parametrize(("state", "is_noted"), [("private", False), ("missing", False), ("unreachable", True)])
def test_a_hub_that_cannot_be_asked_is_a_note(hub: FakeHub, tmp_path: Path, state: str, is_noted: bool) -> None:
    hub.exists, hub.private = state == "private", True
    address = "http://127.0.0.1:9" if state == "unreachable" else hub.address
    env = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", NOTE_CODE], env=env, capture_output=True, text=True, check=True, timeout=100)
    first, without = done.stdout.splitlines()
    assert without == "None"
    assert first.startswith("the Hub did not say whether owner/name is public" if is_noted else "None")


@pytest.mark.rest
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


MADE = ExportedFolder(
    path=Path("/home/me/runs/tried/export"),
    step=40,
    dtype="bf16",
    files=("model.safetensors",),
    num_parameters=1_000_000,
    num_bytes=2_000_000,
    num_tensors=20,
    num_compared=20,
    loaded=True,
    parity=LogitParity(0.01, 2e-4, 1.0, 64, 1e-2),
    added_stop_ids=(3, 5),
)
LINEAGE = Lineage(
    run_name="second",
    run_dir="/home/me/runs/second",
    step=7,
    plan_digest="d2",
    wandb_id="w2",
    ancestors=(Origin(run_name="first", run_dir="/home/me/runs/first", step=1000, plan_digest="d1", wandb_id="w1"),),
)
METRICS = [
    {"trainer/step": 0, "eval/held_out/loss": 3.5},
    {"trainer/step": 39, "train/loss": 9.9},
    {"trainer/step": 40, "train/loss": 2.9},
    {"trainer/step": 39, "train/loss": 2.25, "time": 1.0},
    {"trainer/step": 40, "train/loss": 2.125},
    {"trainer/step": 40, "eval/held_out/loss": 1.5},
    {"trainer/step": 41, "train/loss": 0.5},
    {"trainer/step": 41, "eval/held_out/loss": 0.5},
]


def plan_of(*tokens: str, base: Path | None = None) -> LaunchPlan:
    config = composed(("model=tiny", "run.name=tried", *tokens))
    facts = facts_for(config)
    return make_plan(config, facts.model_copy(update={"model": facts.model.model_copy(update={"path": base and str(base)})}))


def base_folder(folder: Path, front_matter: str) -> Path:
    base = folder / "my-base"
    base.mkdir(parents=True)
    (base / "README.md").write_text(f"---\n{front_matter}---\n\n# Base\n---\nlicense: another\n---\n")
    return base


def test_a_card_describes_base_data_settings_losses_and_lineage(tmp_path: Path) -> None:
    base = base_folder(tmp_path, "license: apache-2.0\nbase_model: owner/original\ntags: [x]\n")
    plan = plan_of(
        *(f"model.path={base}", "model.init=pretrained", "optim.lr=3e-5", "train.max_steps=40", "train.epochs=null"),
        *("train.global_batch_size=8", "data=jsonl", "data.max_length=1024", "data.path=/home/me/private/answers.jsonl"),
        base=base,
    )
    plan = plan.model_copy(update={"lineage": LINEAGE})
    card = render_model_card(plan, MANIFEST, METRICS, MADE)
    data = ModelCard(card).data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == "owner/original"
    assert data["library_name"] == "transformers"
    for row in (
        "| model | my-base |",
        "| license | apache-2.0 |",
        "| sources | train (answers.jsonl) |",
        "| rows | 1,000 of at most 1,024 tokens |",
        "| tokens | 900,000, of which 450,000 are trained |",
        "| learning rate | 3e-05 at its peak |",
        "| length | 40 steps",
        "| world size | 2 ranks on 1 node (cpu) |",
        "| seed | 42 |",
        "| ZeRO | stage 3, optimizer offload none, parameter offload none |",
        "| training, step 40 | 2.1250 |",
        "| held_out, step 0 | 3.5000 |",
        "| held_out, step 40 | 1.5000 |",
        "| stop tokens | 3, 5 added to the base model's: they end turns in the data |",
        "20 of 20 tensors match the engine's weights by digest",
        "| run | tried |",
        "| plan digest | d1ge57 |",
        "| from | run second at step 7, plan digest d2 |",
        "| from | run first at step 1,000, plan digest d1 |",
        "| launcher | 0.1.0 at commit 000000000000 |",
        "torch 2.13.0",
    ):
        assert row in card, row
    for private in (str(tmp_path), "/home", "/srv", "/cache", "private", "0.5000"):
        assert private not in card, private


def test_a_base_without_a_license_is_shown_as_unknown(tmp_path: Path) -> None:
    tmp_path.joinpath("my-base").mkdir()
    plan = plan_of(f"model.path={tmp_path}/my-base", "model.init=pretrained", base=tmp_path / "my-base")
    card = render_model_card(plan, MANIFEST, [], MADE)
    assert "| license | unknown: see the base model |" in card
    assert "| held out, step 40 | 1.7500 |" in card
    data = ModelCard(card).data.to_dict()
    assert data["license"] == "unknown"
    assert "base_model" not in data, "a folder's name is no id of the Hub"


def test_a_custom_license_keeps_its_name_and_link(tmp_path: Path) -> None:
    base = base_folder(tmp_path, "license: other\nlicense_name: house-license\nlicense_link: LICENSE\n")
    plan = plan_of("model.path=owner/original", "model.revision=v2", "model.init=pretrained", base=base)
    card = render_model_card(plan, MANIFEST, METRICS, MADE)
    data = ModelCard(card).data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "house-license", "LICENSE")
    assert data["base_model"] == "owner/original"
    assert "| license | other, house-license, LICENSE |" in card
    assert "| revision | v2 |" in card


def test_names_are_escaped_in_tables() -> None:
    card = render_model_card(plan_of("data=jsonl", "data.path='./a|b<i>`.jsonl'"), MANIFEST, METRICS, MADE)
    assert r"| sources | train (a\|b\<i\>\`.jsonl) |" in card


def test_the_card_of_an_unfinished_run_shows_its_progress() -> None:
    plan = plan_of("train.max_steps=200")
    batch = plan.batch.model_copy(update={"epochs": 5.0})
    card = render_model_card(plan.model_copy(update={"batch": batch}), MANIFEST, METRICS, MADE)
    assert "| length | 40 steps, 1 of 5 epochs |" in card
    assert "| model | none: trained from random weights |" in card
    assert "| license |" not in card, "there is no base model to see"
    assert "base_model" not in ModelCard(card).data.to_dict()
    assert "| changed |" not in card


def test_settings_changed_by_a_resume_are_shown() -> None:
    plan, before = plan_of("optim.lr=1e-5"), plan_of("optim.lr=2e-5")
    card = render_model_card(plan, MANIFEST, METRICS, MADE, [before, plan])
    assert "| learning rate | 1e-05 at its peak |" in card
    assert "| changed | settings of optim differed in earlier attempts; those above are the last ones |" in card
    assert "| changed |" not in render_model_card(plan, MANIFEST, METRICS, MADE, [plan, plan])
