"""A resume requires what the checkpoint was trained on, or shows the differences."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from e2e_tools import TINY, committed, json_lines, last_step, losses, status
from forked import Launch, require_exit

from launcher.plan.launch_plan import LaunchPlan

pytestmark = pytest.mark.rest


SETTINGS = (*(s for s in TINY if s != "model=tiny"), "model=tiny", "data=jsonl", "data.eval_fraction=0", "export.enabled=false")


def write_rows(file: Path, first: int, count: int) -> None:
    rows = [{"text": f"What is {n} plus one?" + f"It is {n + 1}. " * 6} for n in range(first, first + count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def trained(train_here: Launch, module_runs: Path) -> Path:
    """A run of two steps on its own rows."""
    module_runs.mkdir(exist_ok=True)
    write_rows(module_runs.parent / "rows.jsonl", 0, 40)
    overrides = (f"data.path={module_runs.parent / 'rows.jsonl'}", f"run.root={module_runs}", "run.name=trained")
    done = train_here(*SETTINGS, *overrides, "train.max_steps=2", "checkpoint.save_every=1", "checkpoint.keep_last=2")
    require_exit(done)
    return module_runs / "trained"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run that the test may change."""
    return Path(shutil.copytree(trained, tmp_path / "copies/trained"))


@pytest.fixture
def own_cache(run: Path, tmp_path: Path, launcher_cache: Path) -> dict[str, str]:
    """The environment for a separate cache, which the run's plan also names."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in ("models", "isolation-checks"):
        (cache / name).symlink_to(launcher_cache / name)
    old = plan(run)["data"]["cache_dir"]
    shutil.copytree(old, cache / "data" / Path(old).name)
    changed = LaunchPlan.load(run / "plan.json")
    assert changed.data is not None
    changed = changed.model_copy(update={"data": changed.data.model_copy(update={"cache_dir": f"{cache}/data/{Path(old).name}"})})
    (run / "plan.json").write_text(changed.to_json())
    return {"LAUNCHER_CACHE": str(cache)}


def plan(run: Path, attempt: int | None = None) -> dict[str, Any]:
    file = run / "plan.json" if attempt is None else run / f"attempts/{attempt:03d}/plan.json"
    return json.loads(file.read_text())


def refused(
    launch_here: Launch, run: Path, *arguments: str, attempts: int = 1, steps: tuple[int, ...] = (1, 2), **environ: str
) -> str:
    done = launch_here("resume", str(run), *arguments, **environ)
    require_exit(done, 2)
    assert "Traceback" not in done.stderr
    assert "remedy: " in done.stderr
    assert len(list((run / "attempts").iterdir())) == attempts
    assert committed(run) == [f"step-{step:08d}" for step in steps]
    return done.stderr


def edit_plan(run: Path, **changes: Any) -> None:
    """Edit the plan file by hand: `optim__weight_decay=0.5` changes a setting, `data_num_rows` a count."""
    values = plan(run)
    for key, value in changes.items():
        section, _, name = key.partition("__")
        (values[section[5:]] if section.startswith("plan_") else values["config"][section])[name] = value
    (run / "plan.json").write_text(json.dumps(values, indent=2) + "\n")


def test_differences_to_the_plan_are_shown_and_refused(launch_here: Launch, run: Path) -> None:
    text = refused(
        launch_here,
        run,
        "data.max_length=32",
        "run.seed=1",
        "optim.weight_decay=0.1",
        "train.max_steps=9",
        "train.global_batch_size=4",
    )
    shown = [line.split() for line in text.splitlines() if line.startswith("  ")]
    assert shown[:4] == [
        ["checkpoint", "requested"],
        ["run.seed", "42", "1"],
        ["data.max_length", "64", "32"],
        ["optim.weight_decay", "0.0", "0.1"],
    ]
    assert "checkpoints/step-00000002" in text
    assert "--force" in text


def test_a_last_step_before_the_current_step_is_refused(launch_here: Launch, run: Path) -> None:
    (run / "export").mkdir(exist_ok=True)
    assert "the checkpoint is of step 2, and train.max_steps ends the run at step 1" in refused(
        launch_here, run, "train.max_steps=1"
    )
    text = refused(launch_here, run, "train.max_steps=null", "train.epochs=0.01")
    assert "the checkpoint is of step 2, and train.epochs ends the run at step 1" in text


def test_a_longer_run_needs_consent_to_its_cost(train_here: Launch, launch_here: Launch, run: Path) -> None:
    costs = ("run.confirm_usd=0.5", "cluster.price_per_gpu_hour=2")
    text = refused(launch_here, run, "train.max_steps=4", *costs)
    assert "and there is no terminal to ask on" in text
    done = train_here("resume", str(run), "--step", "1", *costs)
    assert done.returncode == 0, "as many steps as before need no consent"


def test_a_resume_that_would_train_nothing_is_refused(launch_here: Launch, run: Path) -> None:
    """It would replace the result of the run by that of an earlier step."""
    assert "the run is complete: step 2 of 2" in refused(launch_here, run)
    text = refused(launch_here, run, "--step", "1", "train.max_steps=1")
    assert "no step is left to train: the run would end at step 1, where it would begin" in text


def test_changes_that_cannot_work_are_refused_even_with_force(launch_here: Launch, run: Path) -> None:
    text = refused(launch_here, run, "--force", "model.path=./other", "run.seed=1")
    assert "model.path" in text
    assert "run.seed" not in text
    assert "model.path=run:trained" in text


@pytest.mark.parametrize(
    "changes, shown",
    [
        ({"optim__weight_decay": 0.5}, ["optim.weight_decay", "0.0", "0.5"]),
        ({"plan_data__num_rows": 5}, ["plan.data.num_rows", "ROWS", "5"]),
        ({"plan_model__hidden_size": 24}, ["plan.model.hidden_size", "20", "24"]),
    ],
)
def test_a_plan_edited_by_hand_is_reported(launch_here: Launch, run: Path, changes: dict[str, Any], shown: list[str]) -> None:
    rows = str(plan(run)["data"]["num_rows"])
    edit_plan(run, **changes)
    text = refused(launch_here, run, "train.max_steps=3")
    expected = [rows if word == "ROWS" else word for word in shown]
    assert expected in [line.split() for line in text.splitlines()]


def test_a_missing_plan_is_reported(launch_here: Launch, run: Path) -> None:
    edit_plan(run, optim__weight_decay=0.5)
    shutil.rmtree(run / "plans")
    assert "the run directory no longer has the plan of this checkpoint" in refused(launch_here, run, "train.max_steps=3")


def test_changed_data_under_the_same_settings_is_refused(
    launch_here: Launch, run: Path, own_cache: dict[str, str], trained: Path
) -> None:
    source = trained.parent.parent / "rows.jsonl"
    before = source.read_bytes()
    write_rows(source, 100, 30)
    try:
        asked = launch_here("resume", str(run), f"data.path={source}", "train.max_steps=3", **own_cache)
        assert asked.returncode == 2, asked.stdout
        assert f"note: changed since the rows of this run were built: {source} (digest " in asked.stdout
        assert "remedy: remove the path to continue with the rows as they were built; or" in asked.stderr
        assert ["plan.data.num_docs", "40", "30"] in [line.split() for line in asked.stderr.splitlines()]
        shutil.rmtree(Path(own_cache["LAUNCHER_CACHE"]) / "data")
        text = refused(launch_here, run, "train.max_steps=3", **own_cache)
    finally:
        source.write_bytes(before)
    shown = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("  plan.data.")}
    assert shown["plan.data.num_docs"] == ["40", "30"]
    assert {"plan.data.key", "plan.data.num_rows", "plan.data.num_tokens"} <= shown.keys()


def test_a_damaged_cache_is_refused_and_a_deleted_one_is_rebuilt(
    train_here: Launch, run: Path, own_cache: dict[str, str]
) -> None:
    folder = Path(plan(run)["data"]["cache_dir"])
    marks = folder / "trained.npy"
    content = marks.read_bytes()
    marks.write_bytes(content[:128] + b"\1" * (len(content) - 128))
    same = ("run.seed=42", "train.global_batch_size=4", f"model.dtype={plan(run)['config']['model']['dtype']}")
    free = (
        "train.max_steps=3",
        "cluster.ranks_per_node=1",
        "checkpoint.save_every=0",
        "cluster.max_restarts=2",
    )
    done = train_here("resume", str(run), *same, *free, **own_cache)
    require_exit(done, 1)
    assert "the data cache is damaged: a block does not match its digest" in done.stderr
    assert f"where:  {marks}, bytes 0 to {len(content) - 1}" in done.stderr
    assert f"`rm -r {folder}`, then `python -m launcher data ...`" in done.stderr
    events = json_lines(run / "events.jsonl")
    assert sum(event["attempt"] == 2 and event.get("fields", {}).get("phase") == "joined" for event in events) == 1, "no restart"
    assert (status(run)["attempt"], last_step(run)) == (2, 2)
    shutil.rmtree(folder)
    done = train_here("resume", str(run), *same, *free, **own_cache)
    require_exit(done)
    assert "the data cache differs from the one in the plan; building it again from the sources" in done.stdout
    assert "differences from the checkpoint" not in done.stdout
    assert (folder / "meta.json").is_file()
    assert plan(run, 3)["data"] == plan(run)["data"]
    assert (status(run)["state"], last_step(run)) == ("completed", 3)


def test_force_trains_on_changed_data_in_another_dtype_and_records_it(
    train_here: Launch, launch_here: Launch, run: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    write_rows(other, 500, 60)
    more = ("train.max_steps=3", "checkpoint.keep_last=9")
    text = refused(launch_here, run, f"data.path={other}", *more)
    assert "data.sources[0].path" in text
    assert "or start another run with these weights" in text
    dtype = plan(run)["config"]["model"]["dtype"]
    other_dtype = "fp32" if dtype == "bf16" else "bf16"
    changes = (f"data.path={other}", "optim.weight_decay=0.1", f"model.dtype={other_dtype}")
    done = train_here("resume", str(run), "--force", *changes, *more)
    require_exit(done)
    assert "continuing with differences from the checkpoint:" in done.stdout
    shown = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.startswith("  ")}
    assert shown["data.path"][1] == f"'{other}'"
    assert shown["plan.data.num_docs"] == ["40", "60"]
    assert shown["model.dtype"] == [f"'{dtype}'", f"'{other_dtype}'"]
    recorded = plan(run, 2)
    assert recorded["data"]["num_docs"] == 60
    assert recorded["data"]["cache_dir"] != plan(run)["data"]["cache_dir"]
    assert {f"data.path={other}", "optim.weight_decay=0.1"} <= set(recorded["provenance"]["overrides"])
    assert sorted(losses(run)) == [1, 2, 3]
    # The checkpoint of step 3 was saved with that plan, so these settings no longer differ.
    text = refused(launch_here, run, "run.seed=1", "train.max_steps=4", attempts=2, steps=(1, 2, 3))
    shown = [line.split() for line in text.splitlines() if line.startswith("  ")]
    assert shown[:2] == [["checkpoint", "requested"], ["run.seed", "42", "1"]]
    assert str(other) not in text
    back = launch_here("resume", str(run), "--step", "2")
    assert back.returncode == 2
    assert "data.path" in back.stderr


def test_what_force_accepted_needs_no_force_before_the_next_checkpoint(launch_here: Launch, run: Path) -> None:
    """The attempt that --force started may fail before it saves: resume continues it as it was started."""
    forced = LaunchPlan.load(run / "plan.json")
    section = forced.config.run.model_copy(update={"seed": 7})
    provenance = forced.provenance.model_copy(update={"overrides": (*forced.provenance.overrides, "run.seed=7")})
    config = forced.config.model_copy(update={"run": section})
    (run / "attempts/002").mkdir()
    forced = forced.model_copy(update={"config": config, "provenance": provenance})
    (run / "attempts/002/plan.json").write_text(forced.to_json())
    text = refused(launch_here, run, "train.max_steps=3", "data.max_length=32", attempts=2)
    assert "data.max_length" in text
    assert "run.seed" not in text
    assert "run.seed" in refused(launch_here, run, "--step", "1", "train.max_steps=3", attempts=2)


def test_settings_without_effect_on_the_rows_do_not_build_them_again(launch_here: Launch, run: Path, trained: Path) -> None:
    source = trained.parent.parent / "rows.jsonl"
    before = source.read_bytes()
    source.unlink()
    try:
        text = refused(launch_here, run, "data.workers=1", "train.max_steps=1")
    finally:
        source.write_bytes(before)
    assert "and train.max_steps ends the run at step 1" in text
