"""Everything that reads plans converts a plan of an earlier schema version to the current version."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import run_store
from launcher.checkpoint.mirror.download import _plan as plan_from_mirror
from launcher.config.renamed_keys import RENAMED
from launcher.errors import CheckpointError, RunError
from launcher.plan.launch_plan import LaunchPlan, digest_of
from launcher.plan.migrations import SCHEMA_VERSION, migrate
from launcher.plan.run_dir import RunDir

PlanOf = Callable[..., LaunchPlan]
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def earlier_text() -> str:
    """Return plan.json as a launcher with schema version 1 wrote it."""
    with zipfile.ZipFile(GOLDEN / "earlier_run.zip") as archive:
        return archive.read("run/plan.json").decode()


@pytest.fixture
def earlier(earlier_text: str) -> dict[str, Any]:
    return json.loads(earlier_text)


def test_settings_that_were_renamed_move_to_their_new_section(earlier: dict[str, Any]) -> None:
    train = copy.deepcopy(earlier["config"]["train"])
    migrated = migrate(earlier)
    assert migrated["schema_version"] == SCHEMA_VERSION
    for old, new in RENAMED.items():
        section, name = new.split(".")
        assert migrated["config"][section][name] == train[old.removeprefix("train.")]
        assert old.removeprefix("train.") not in migrated["config"]["train"]
    assert migrated["config"]["train"]["max_steps"] == train["max_steps"]
    assert {k: v for k, v in migrated.items() if k not in ("config", "schema_version")} == {
        k: v for k, v in earlier.items() if k not in ("config", "schema_version")
    }


def test_a_run_of_an_earlier_version_divides_its_documents_as_before(earlier_text: str, plan_of: PlanOf) -> None:
    assert LaunchPlan.from_json(earlier_text).config.data.split_by == "document"
    values = json.loads(plan_of().to_json())
    assert values["config"]["data"]["split_by"] == "prompt"
    del values["config"]["data"]["split_by"]
    assert LaunchPlan.from_json(json.dumps({**values, "schema_version": 2})).config.data.split_by == "document"


def test_migrating_changes_nothing_in_its_argument(earlier: dict[str, Any]) -> None:
    before = copy.deepcopy(earlier)
    migrate(earlier)
    assert earlier == before


def test_a_current_plan_stays_as_it_is(plan_of: PlanOf) -> None:
    values = json.loads(plan_of().to_json())
    assert migrate(values) == values


def test_an_earlier_plan_loads(earlier_text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(earlier_text)
    plan = LaunchPlan.load(path)
    assert (plan.config.checkpoint.save_every, plan.config.eval.every, plan.config.export.enabled) == (3, 4, False)
    assert LaunchPlan.from_json(plan.to_json()) == plan


def test_an_earlier_plan_is_found_by_the_digest_of_its_text(earlier_text: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    digest = digest_of(earlier_text)
    run.plans.mkdir()
    (run.plans / f"{digest}.json").write_text(earlier_text)
    assert run_store.find_plan(run, digest) == LaunchPlan.from_json(earlier_text)


def test_an_earlier_plan_comes_back_from_a_mirror(earlier_text: str) -> None:
    assert plan_from_mirror(earlier_text.encode(), "s3://bucket") == LaunchPlan.from_json(earlier_text)
    with pytest.raises(CheckpointError, match="the plan in the mirror cannot be read by this launcher"):
        plan_from_mirror(earlier_text.replace('"schema_version": 1', '"schema_version": 5').encode(), "s3://bucket")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("schema_version", 5, "schema_version is 5, and this launcher reads 1 to 4; use the launcher that wrote the plan"),
        ("schema_version", None, "schema_version is None"),
        ("schema_version", True, "schema_version is True"),
        ("config", None, "config is missing or is not an object"),
        ("config", {"train": 3}, "config.train is missing or is not an object"),
        ("topology", 3, "topology: Input should be an object"),
    ],
)
def test_a_damaged_plan_gives_an_error_that_names_the_field(
    earlier: dict[str, Any], tmp_path: Path, part: str, value: Any, message: str
) -> None:
    run = RunDir(tmp_path)
    run.plan.write_text(json.dumps(earlier | {part: value}))
    with pytest.raises(RunError) as error:
        run_store.load_plan(run)
    (problem,) = error.value.problems
    assert (problem.message, problem.where) == ("the plan of this run cannot be read by this launcher", str(run.plan))
    assert problem.value.startswith(message)
    assert "\n" not in problem.value


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_a_plan_that_holds_no_object_is_refused(text: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.plan.write_text(text)
    for read in (run_store.load_plan, run_store.read_placement):
        with pytest.raises(RunError):
            read(run)


def test_looking_at_a_run_reads_an_earlier_plan_without_the_models_of_plans(earlier_text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(earlier_text)
    code = (
        "import sys; from pathlib import Path; from launcher import run_store; from launcher.plan.run_dir import RunDir\n"
        "print(run_store.read_placement(RunDir(Path(sys.argv[1]))).num_ranks, 'pydantic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "2 False\n", done.stderr
