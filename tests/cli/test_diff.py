"""The `diff` command on two run directories."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import hand_made
import pytest
from plan_fixtures import DATA, PROVENANCE

from launcher.plan.launch_plan import Topology
from launcher.plan.run_dir import RunDir
from launcher.runs.run_records import Attempt
from launcher.tracking.jsonl import JsonlTracker

Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(run: RunDir, typed: Ask) -> Ask:
    return partial(typed, "diff", "--root", str(run.root.parent))


@pytest.fixture
def other(run: RunDir) -> RunDir:
    """A run of six logged steps with a different learning rate, data, package versions and machines."""
    settings = {**hand_made.SETTINGS, "optim": {"lr": 1e-3}}
    data = DATA.model_copy(update={"num_rows": 900, "digest": "abc-def", "chat_template": "{{ messages }}"})
    topology = Topology(nodes=2, ranks_per_node=2, world_size=4, device="cuda", backend="nccl")
    parts = {"data": data, "eval_sets": {"exam": DATA}, "topology": topology, "provenance": PROVENANCE}
    plan = hand_made.plan(run.root.with_name("other"), settings, **parts)
    made = hand_made.run(plan, Attempt(None), state="failed", step=6, max_steps=40)
    log = JsonlTracker(made, 1)
    for step in range(1, 7):
        log.log(step, {"train/loss": 5.0 - step / 10, "perf/tokens_per_sec": 2469.0, "time/step_s": 1.0})
    return made


def test_only_what_differs_is_shown_side_by_side(run: RunDir, other: RunDir, ask: Ask) -> None:
    code, out, err = ask("demo", "other", "--json")
    assert (code, err) == (0, "")
    values = json.loads(out)
    assert (values["left"], values["right"]) == ("demo", "other")
    changes = {section: {d["key"]: (d["left"], d["right"]) for d in values[section]} for section in list(values)[2:]}
    assert changes["settings"] == {"optim.lr": (1e-5, 1e-3)}
    assert changes["data"].pop("eval_sets.exam.num_rows") == (None, 1000)
    assert {key: change for key, change in changes["data"].items() if not key.startswith("eval_sets.")} == {
        "data.num_rows": (1000, 900),
        "data.digest": ("", "abc-def"),
        "data.chat_template": (None, changes["data"]["data.chat_template"][1]),
    }
    assert changes["machines"] == {"topology.nodes": (1, 2), "topology.world_size": (2, 4)}
    assert changes["versions"] == {"python": ("3.11", "3.11.9"), "torch": (None, "2.13.0")}
    assert changes["code"]["git commit"] == (None, "0" * 40)
    results = changes["results"]
    assert results["training loss"] == (pytest.approx(3.0), pytest.approx(4.4))
    assert "held-out loss" not in results, "neither has one"
    assert results["tokens per second"] == (1234.5, 2469.0)
    assert results["state"] == ("completed", "failed")
    assert changes["model"] == {}


def test_the_tables_name_runs_values_and_changes(run: RunDir, other: RunDir, ask: Ask) -> None:
    code, out, _ = ask("demo", "other")
    assert code == 0
    lines = {line.split("  ")[0]: line.split() for line in out.splitlines() if line}
    assert lines["settings"] == ["settings", "demo", "other"]
    assert lines["optim.lr"][1:] == ["1e-05", "0.001"]
    assert lines["results"] == ["results", "demo", "other", "change"]
    assert lines["tokens per second"][3:] == ["1,234.5", "2,469", "+100.0%"]
    assert "data.num_rows" in lines
    assert "train.max_steps" not in out


def test_a_run_does_not_differ_from_itself(run: RunDir, ask: Ask) -> None:
    assert ask("demo", "demo") == (0, "no differences between demo and demo\n", "")
    values = json.loads(ask("demo", "demo", "--json")[1])
    assert not any(values[section] for section in list(values)[2:])


def test_a_run_that_does_not_exist_is_refused(run: RunDir, ask: Ask) -> None:
    code, _, err = ask("demo", "demos")
    assert code == 2
    assert "did you mean demo?" in err


def test_values_that_look_like_secrets_are_not_shown(run: RunDir, other: RunDir, ask: Ask, tmp_path: Path) -> None:
    secret = "hf_" + "Canary" * 6
    for path in (other.plan, *other.plans.glob("*.json")):
        plan = json.loads(path.read_text())
        plan["config"]["tracking"]["project"] = secret
        path.write_text(json.dumps(plan))
    for flags in ([], ["--json"]):
        code, out, err = ask("demo", "other", *flags)
        assert code == 0
        assert secret not in out + err


def test_a_run_is_compared_with_a_file_of_settings(run: RunDir, ask: Ask, tmp_path: Path) -> None:
    file = tmp_path / "next.yaml"
    file.write_text("model: tiny\noptim: {lr: 5e-4}\ntrain: {max_steps: 40}\n")
    code, out, err = ask("demo", str(file), "--json")
    assert (code, err) == (0, "")
    values = json.loads(out)
    assert list(values) == ["left", "right", "settings"]
    changes = {d["key"]: (d["left"], d["right"]) for d in values["settings"]}
    assert changes["optim.lr"] == (1e-5, 5e-4)
    assert "train.max_steps" not in changes
    file.write_text("model: tiny\noptim: {lrr: 5e-4}\n")
    code, _, err = ask("demo", str(file))
    assert code == 2
    assert f"{file}:2" in err
