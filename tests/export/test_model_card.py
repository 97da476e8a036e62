"""The model card is complete, accepted by the Hub, and free of private details."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard
from plan_fixtures import composed, facts_for

from launcher.checkpoint.manifest import Manifest
from launcher.export.hf_folder import ExportedFolder
from launcher.export.model_card import render_model_card
from launcher.export.parity import LogitParity
from launcher.plan.launch_plan import LaunchPlan, Lineage, Origin
from launcher.plan.planner import plan as make_plan

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
MANIFEST = Manifest(step=40, world_size=2, plan_digest="d1ge57", attempt=2, eval_loss=1.75, files={})
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
    assert "| length | 40 of 200 planned steps, 1 of 5 epochs |" in card
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
