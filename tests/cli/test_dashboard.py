"""The W&B workspace: its JSON compared with a golden file, and its creation and update on a fake server."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from forked import Launch, preloaded, require_exit
from http_server import Answer, Request, serving

from launcher.plan.run_dir import RunDir
from launcher.tracking.metrics import SECTIONS


class Views:
    """Answers W&B's queries for saved views, and keeps the saved views by name."""

    def __init__(self) -> None:
        self.saved: dict[str, dict[str, Any]] = {}
        self.projects = {"demo"}
        self.environ: dict[str, str] = {}

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "upsertView" in query:
            known = self.saved.get(variables["name"])
            assert variables.get("id") == (known["id"] if known else None), "an update names what it updates"
            self.saved[variables["name"]] = {"id": "view-1", **variables}
            return {"upsertView": {"view": {"id": "view-1", "name": variables["name"]}, "inserted": known is None}}
        if "allViews" in query:
            if variables["projectName"] not in self.projects:
                return {"project": None}
            found = [v for name, v in self.saved.items() if name == variables["viewName"]]
            return {"project": {"allViews": {"edges": [{"node": node} for node in found]}}}
        assert "viewer" in query, query
        return {"viewer": {"id": "1", "entity": "team", "username": "me", "flags": "{}", "teams": {"edges": []}}}


@pytest.fixture
def views() -> Iterator[Views]:
    views = Views()

    def answer(request: Request) -> Answer:
        if request.path != "/graphql":
            return 404, {}
        asked = json.loads(request.body)
        return 200, {"data": views.answer(asked["query"], asked.get("variables") or {})}

    with serving(answer) as address:
        views.environ = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "c" * 40}
        yield views


@pytest.fixture(scope="session")
def launch(launcher_env: dict[str, str]) -> Launch:
    """Run a command in a process forked from one that has imported W&B, because W&B reads the environment only once."""

    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        server = preloaded("launcher.cli.report", "launcher.tracking.wandb.project", "wandb_workspaces.workspaces")
        return server.run("launcher", *arguments, env={**launcher_env, **env})

    return run


def sections(view: dict[str, Any]) -> list[str]:
    return [section["name"] for section in json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]]


def test_the_workspace_equals_the_golden_file(launch: Launch, golden: Callable[[str, str], None]) -> None:
    done = launch("dashboard", "team/demo", "--dry-run")
    require_exit(done)
    golden("dashboard.json", done.stdout)


def test_a_run_has_a_workspace_of_its_own(launch: Launch, run: RunDir) -> None:
    made = json.loads(launch("dashboard", str(run.root), "--dry-run").stdout)
    (only,) = made["spec"]["section"]["runSets"][0]["filters"]["filters"]
    assert (only["key"]["name"], only["op"], only["value"]) == ("name", "=", json.loads(run.plan.read_text())["wandb_id"])
    assert made["name"] == "Launcher: demo-run"


def test_the_workspace_is_created_once_and_sections_of_people_stay(launch: Launch, views: Views) -> None:
    done = launch("dashboard", "demo", **views.environ)
    require_exit(done)
    address = f"{views.environ['WANDB_BASE_URL']}/team/demo?nw=launcher"
    assert done.stdout == f"dashboard: {address}\n"
    (view,) = views.saved.values()
    assert sections(view) == list(SECTIONS)

    spec = json.loads(view["spec"])
    bank = spec["section"]["panelBankConfig"]
    own = {**bank["sections"][0], "name": "Mine", "panels": bank["sections"][0]["panels"][:1]}
    bank["sections"] = [own, *bank["sections"][2:]]
    view["spec"] = json.dumps(spec)
    again = launch("dashboard", "demo", **views.environ)
    require_exit(again)
    (view,) = views.saved.values()
    assert sections(view) == [*SECTIONS, "Mine"]


def test_a_missing_project_is_an_error(launch: Launch, views: Views) -> None:
    done = launch("dashboard", "none-such", **views.environ)
    assert done.returncode == 2
    assert "no such W&B project" in done.stderr
    assert "team/none-such" in done.stderr
    assert not views.saved
