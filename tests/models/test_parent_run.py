"""`model.path=run:...` on real run directories with real checkpoints: resolution and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import hand_made
import pytest
from plan_fixtures import CPU, H100, ConfigOf, config_of, facts_for
from pydantic import ValidationError

from launcher import facts
from launcher.checkpoint import store
from launcher.checkpoint.manifest import STATE
from launcher.checkpoint.state import State
from launcher.config.schema import RunConfig
from launcher.config.sections.model import ModelSection
from launcher.errors import ConfigError, Problem
from launcher.models import parent_run
from launcher.models.found_model import find_model
from launcher.plan.launch_plan import DeviceFacts, LaunchPlan, Lineage, Origin
from launcher.plan.planner import plan
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, run_store

__all__ = ["config_of"]

SHAPES = {"embed": (6, 4), "norm": (4,)}
MakeRun = Callable[..., RunDir]


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def make_run(config_of: ConfigOf, tmp_path: Path) -> MakeRun:
    """Create a run directory with committed checkpoints of `steps`, whose files contain `content`."""

    def make(name: str, *steps: int, lineage: Lineage | None = None, content: bytes = b"weights") -> RunDir:
        config = config_of("train.max_steps=20", f"run.name={name}")
        gathered = facts_for(config, working_dir=str(tmp_path)).model_copy(update={"lineage": lineage})
        run = run_store.create(plan(config, gathered))
        for step in steps:
            add_checkpoint(run, step, content)
        return run

    return make


def add_checkpoint(run: RunDir, step: int, content: bytes = b"weights") -> Path:
    state = State(parameters=SHAPES, optimizer_step=step, loss_scaler={}, engine={}, extra={})
    files = {STATE: state.to_json().encode(), store.shard_name(0): content}
    return hand_made.checkpoint(run, step, files=files, digest=LaunchPlan.load(run.plan).digest())


def settings(config_of: ConfigOf, path: str, *more: str) -> RunConfig:
    tokens = ("model=tiny", "model.init=pretrained", "model.config=null", "model.dtype=bf16")
    return config_of(*tokens, f"model.path='{path}'", *more)


def resolved(config: RunConfig) -> RunConfig:
    return facts.resolve_settings(config, lambda: CPU)


def problem_of(config: RunConfig) -> Problem:
    with pytest.raises(ConfigError) as error:
        resolved(config)
    (problem,) = error.value.problems
    assert problem.where == "model.path"
    assert problem.remedy
    return problem


@pytest.mark.parametrize("path", ["run:a", "run:a@3", "run:/srv/runs/a", "run:./runs/a@12", "run:~/runs/a", "run:../a@b@3"])
def test_valid_names_of_a_run_are_accepted(path: str) -> None:
    assert ModelSection(path=path).path == path


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"path": "run:"}, "is not a reference to a run; write run:NAME or run:NAME@STEP"),
        ({"path": "run:a@x"}, "is not a reference to a run; write"),
        ({"path": "run:runs/a"}, "is not a reference to a run; write"),
        ({"path": "run:a", "init": "random"}, "set model.init=pretrained"),
        ({"path": "./m", "tokenizer": "run:a"}, "the tokenizer comes with the weights of model.path"),
    ],
)
def test_invalid_names_of_a_run_are_refused(values: dict[str, str], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        ModelSection(**values)  # type: ignore[arg-type]


def test_a_missing_step_is_resolved_to_the_newest_one(make_run: MakeRun, config_of: ConfigOf) -> None:
    run = make_run("a", 5, 10)
    config = resolved(settings(config_of, "run:a"))
    assert config.model.path == f"run:{run.root}@10"
    add_checkpoint(run, 15)
    assert resolved(config) == config, "a later checkpoint changes nothing"
    for path in ("run:a@5", "run:./runs/a@5", f"run:{run.root}@5"):
        assert resolved(settings(config_of, path)).model.path == f"run:{run.root}@5"
    # A run name is looked up under run.root.
    assert resolved(settings(config_of, "run:a@5", f"run.root={run.root.parent}")).model.path == f"run:{run.root}@5"


def test_settings_without_a_parent_are_unchanged(config_of: ConfigOf) -> None:
    config = config_of("model=tiny", "model.dtype=bf16")
    assert resolved(config) is config


@pytest.mark.parametrize(
    ("node", "gpu_type", "is_fast", "dtype"),
    [(H100, "null", False, "bf16"), (CPU, "H100-80GB", False, "bf16"), (CPU, "null", True, "bf16"), (CPU, "null", False, "fp32")],
)
def test_an_automatic_dtype_is_bf16_where_that_is_fast(
    config_of: ConfigOf,
    monkeypatch: pytest.MonkeyPatch,
    node: DeviceFacts,
    gpu_type: str,
    is_fast: bool,
    dtype: str,
) -> None:
    monkeypatch.setattr(facts, "has_fast_bf16", lambda: is_fast)
    config = config_of("model=tiny", f"cluster.gpu_type={gpu_type}")
    assert config.model.dtype == "auto"
    assert facts.resolve_settings(config, lambda: node).model.dtype == dtype


def test_unknown_runs_and_steps_are_refused_with_the_existing_ones(make_run: MakeRun, config_of: ConfigOf) -> None:
    make_run("a", 5, 10)
    make_run("empty")
    missing = problem_of(settings(config_of, "run:b"))
    assert (missing.message, missing.value) == ("model.path: there is no run named b", "run:b")
    assert "a" in missing.remedy
    step = problem_of(settings(config_of, "run:a@7"))
    assert step.message == "model.path: run a: there is no committed checkpoint of step 7"
    assert (step.value, step.remedy) == ("run:a@7", "choose one of: 5, 10")
    unsaved = problem_of(settings(config_of, "run:empty"))
    assert "run empty: there is no committed checkpoint" in unsaved.message
    assert "python -m launcher resume" in unsaved.remedy
    itself = problem_of(settings(config_of, "run:a", "run.name=a"))
    assert "a run cannot start from its own weights" in itself.message
    assert "resume" in itself.remedy


def test_an_unreadable_plan_of_the_parent_is_refused(make_run: MakeRun, config_of: ConfigOf) -> None:
    run = make_run("a", 5)
    run.plan.write_text("{}")
    assert "cannot be read by this launcher" in problem_of(settings(config_of, "run:a")).message


def test_model_facts_come_from_the_parent_before_its_weights_are_prepared(make_run: MakeRun, config_of: ConfigOf) -> None:
    run = make_run("a", 5)
    # The parent's architecture takes precedence over the preset's.
    config = resolved(config_of("model=qwen3_8b", "model.path=run:a"))
    assert config.model.config is not None
    gathered = facts.gather(config, find_model(config.model), [], CPU)
    source = LaunchPlan.load(run.plan)
    assert (gathered.model.path, gathered.model.config) == (None, source.model.config)
    assert (gathered.model.num_params, gathered.model.num_params_exact) == (28, True)
    assert gathered.model.num_params == sum(math.prod(shape) for shape in SHAPES.values())
    assert facts.find_prepared_data(config, find_model(config.model)) is None
    assert find_model(config.model).is_config_known


def test_lineage_goes_back_to_the_first_run(make_run: MakeRun) -> None:
    first = make_run("first", 5)
    lineage = parent_run.build_lineage(parent_run.find_parent("run:first"))
    assert lineage == Lineage(
        run_name="first",
        run_dir=str(first.root),
        step=5,
        plan_digest=LaunchPlan.load(first.plan).digest(),
        wandb_id=LaunchPlan.load(first.plan).wandb_id,
    )
    for name in ("second", "third"):
        make_run(name, 7, lineage=lineage)
        lineage = parent_run.build_lineage(parent_run.find_parent(f"run:{name}"))
    assert (lineage.run_name, lineage.step) == ("third", 7)
    assert [(a.run_name, a.step) for a in lineage.ancestors] == [("second", 7), ("first", 5)]
    assert all(type(a) is Origin for a in lineage.ancestors)


def test_each_checkpoint_and_dtype_has_its_own_weights_folder(make_run: MakeRun) -> None:
    make_run("a", 5, 10)
    make_run("b", 5)
    sources = [parent_run.find_parent(path) for path in ("run:a@5", "run:a@10", "run:b@5")]
    folders = {parent_run.weights_folder(source, dtype) for source in sources for dtype in ("bf16", "fp32")}
    assert len(folders) == 6
    assert parent_run.weights_folder(sources[0], "bf16") == parent_run.weights_folder(parent_run.find_parent("run:a@5"), "bf16")
    # Save the same step again with other weights.
    atomic_files.remove_directory(sources[0].checkpoint.path)
    add_checkpoint(sources[0].run, 5, b"other")
    assert parent_run.weights_folder(parent_run.find_parent("run:a@5"), "bf16") not in folders


def test_the_parents_export_is_used_only_for_the_same_checkpoint_and_dtype(make_run: MakeRun) -> None:
    run = make_run("a", 5, 10)
    newest, earlier = parent_run.find_parent("run:a"), parent_run.find_parent("run:a@5")
    digest = newest.checkpoint.manifest.plan_digest
    assert parent_run.find_export(newest, "bf16") is None
    run.export.mkdir()

    def write(**changes: object) -> None:
        marker = {"step": 10, "plan_digest": digest, "dtype": "bf16", **changes}
        (run.export / "export.json").write_text(json.dumps(marker))

    write()
    assert parent_run.find_export(newest, "bf16") == run.export
    assert parent_run.find_export(newest, "fp32") is None, "half of the bits are gone"
    assert parent_run.find_export(newest, "fp16") is None
    assert parent_run.find_export(earlier, "bf16") is None
    write(dtype="fp32")
    assert parent_run.find_export(newest, "bf16") == parent_run.find_export(newest, "fp32") == run.export
    write(plan_digest="0" * 32)
    assert parent_run.find_export(newest, "bf16") is None
    (run.export / "export.json").write_text("{")
    assert parent_run.find_export(newest, "bf16") is None
