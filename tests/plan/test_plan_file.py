"""A plan's file that is damaged, or of another schema version, is refused with the field."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import run_store
from launcher.errors import RunError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir

PlanOf = Callable[..., LaunchPlan]


@pytest.mark.parametrize(
    ("part", "value", "field"),
    [("schema_version", 5, "schema_version"), ("config", None, "config"), ("topology", 3, "topology")],
)
def test_a_damaged_plan_gives_an_error_that_names_the_field(
    plan_of: PlanOf, tmp_path: Path, part: str, value: Any, field: str
) -> None:
    run = RunDir(tmp_path)
    run.plan.write_text(json.dumps(json.loads(plan_of().to_json()) | {part: value}))
    with pytest.raises(RunError) as error:
        run_store.load_plan(run)
    (problem,) = error.value.problems
    assert problem.where == str(run.plan)
    assert problem.value.startswith(f"{field}: ")
    assert "\n" not in problem.value


@pytest.mark.parametrize("text", ["", "[]", "null", '{"schema_version": 5}'])
def test_a_file_that_holds_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.plan.write_text(text)
    for read in (run_store.load_plan, run_store.read_placement):
        with pytest.raises(RunError):
            read(run)


def test_looking_at_a_run_does_not_load_the_models_of_plans(plan_of: PlanOf, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(plan_of().to_json())
    code = (
        "import sys; from pathlib import Path; from launcher import run_store; from launcher.plan.run_dir import RunDir\n"
        "print(run_store.read_placement(RunDir(Path(sys.argv[1]))).num_ranks, 'pydantic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "2 False\n", done.stderr
