"""Calls functions on forked ranks that train a plan, without a backend; the command `plan` makes the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hand_made
from forked import Launch, require_exit
from forked_ranks import RankServer

from launcher.clusters.network import LOOPBACK, free_port
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store
from launcher.runs.run_records import Attempt


def build_plan(launch: Launch, *settings: str) -> LaunchPlan:
    """Build the data and return the plan."""
    require_exit(launch("data", *settings))
    values = json.loads(launch("plan", *settings, "--json").stdout)
    return LaunchPlan.model_validate({name: value for name, value in values.items() if name in LaunchPlan.model_fields})


class PlannedRanks:
    """Prepares attempts of runs in `folder`, and calls functions with their plans."""

    def __init__(self, server: RankServer, folder: Path) -> None:
        self._server, self.folder = server, folder

    def prepare(self, plan: LaunchPlan, name: str, step: int, attempt: int = 1, start_step: int | None = None) -> LaunchPlan:
        """Create attempt `attempt` of a run that ends at `step`, and return its plan."""
        run = RunDir(self.folder / name)
        part = hand_made.changed(plan, f"train.max_steps={step}").model_copy(update={"run_dir": str(run.root)})
        if attempt == 1:
            run_store.create(part)
        run_store.create_attempt(run, Attempt(start_step))
        return part

    def call(self, function: str, num_ranks: int, plan: LaunchPlan, *arguments: Any) -> list[Any]:
        """Call `function`, given as module:name, with the path of the plan and `arguments`; return the result of each rank."""
        path = self.folder / "plan.json"
        path.write_text(plan.to_json())
        meeting = {"MASTER_ADDR": LOOPBACK.address, "MASTER_PORT": str(free_port(LOOPBACK.address))}
        of_each = [(str(path), *arguments)] * num_ranks
        return self._server.values(function, of_each, self.folder / "ranks", environment=meeting)
