"""`status` and `ls`, which read only the files of runs: state, times, costs, verdicts, and records that are damaged."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace

import hand_made
import pytest
from forked import Launch, require_exit
from hand_made import made_verdict

from launcher.cli.main import main
from launcher.cli.status import sparkline, summarize
from launcher.clusters.detached_process import describe_this_process
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, json_records, run_records, run_store
from launcher.shell_commands import short_path
from launcher.tracking import goodput
from launcher.tracking.goodput import Breakdown
from launcher.tracking.jsonl import JsonlTracker

Typed = Callable[..., tuple[int, str, str]]


def test_status_reads_the_files_of_the_run(launch_here: Launch, run: RunDir) -> None:
    done = launch_here("status", str(run.root))
    require_exit(done)
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["state"] == "completed"
    assert lines["step"] == "10 of 40 (25%)"
    assert lines["loss"].startswith("3.0000  █")
    assert lines["loss"].endswith("▁")
    assert lines["pace"] == "1,234 tokens/s, 2.00 s a step, MFU 41.0%"
    assert lines["memory"] == "1.5 GiB of main memory in rank 0"
    assert lines["cost"] == "$3.40 so far (1.70 GPU hours)"
    assert lines["checkpoints"] == "step 5, step 10"
    assert "something in attempt 2" in lines["alert"]
    assert "time left" not in done.stdout
    found = json.loads(launch_here("status", str(run.root), "--json").stdout)
    assert found["metrics"]["trainer/step"] == 10
    assert (found["cost"]["gpu_hours"], found["cost"]["usd"]) == (pytest.approx(1.7, abs=0.01), pytest.approx(3.4, abs=0.02))
    assert (found["cost"]["expected_usd"], found["cost"]["at_typical_price"]) == (None, False)
    assert [alert["step"] for alert in found["alerts"]] == [7, 10]


def test_the_step_is_the_newest_of_metrics_and_status(run: RunDir) -> None:
    """The ranks log metrics more often than they write status.json."""
    status = replace(run_store.update_status(run, state="running"), step=8)
    before = replace(status, updated_at=1.0)
    assert summarize(run, before)["step"] == 10
    assert summarize(run, replace(before, attempt=3))["step"] == 8, "what the attempt before has logged may be done anew"
    assert summarize(run, status)["step"] == 8, "as where the ranks have gone back since"


def test_a_run_that_was_asked_to_stop_shows_no_time_left(launch_here: Launch, run: RunDir) -> None:
    atomic_files.write_json(run.cancel(2), {"save": True})
    run_store.update_status(run, state="running", job=describe_this_process())
    lines = dict(line.split(maxsplit=1) for line in launch_here("status", str(run.root)).stdout.splitlines())
    assert lines["state"] == "running, stop requested"
    assert "time" not in lines


def test_a_resumed_run_that_waits_is_not_asked_to_stop(run: RunDir) -> None:
    """The previous attempt was, and status.json keeps its number until the next job begins."""
    atomic_files.write_json(run.cancel(2), {"save": True})
    number = run_store.create_attempt(run, run_records.Attempt(resume_step=5))
    found = summarize(run, run_store.update_status(run, state="pending", max_steps=60))
    assert (found["attempt"], found["asked_to_stop"], found["left_s"]) == (number, False, 55 * 2.0)
    assert found["cost"]["expected_usd"] == pytest.approx(found["cost"]["usd"] + 2 * 2.0 * 110 / 3600)
    assert summarize(run, run_store.update_status(run, state="pending", max_steps=3))["left_s"] == 0, "fewer steps than it has"
    atomic_files.write_json(run.cancel(number), {"save": True})
    assert summarize(run, run_store.update_status(run, state="pending"))["asked_to_stop"]


def test_a_limit_before_the_last_step_is_shown(launch_here: Launch, run: RunDir) -> None:
    plan = json_records.read_json(run.plan)
    run_store.update_status(run, state="running", job=describe_this_process())

    def told(**limits: float) -> dict[str, str]:
        config = plan["config"] | {"run": plan["config"]["run"] | limits}
        atomic_files.write_json(run.plan, plan | {"config": config})
        return dict(line.split(maxsplit=1) for line in launch_here("status", str(run.root)).stdout.splitlines())

    # Two GPUs at two dollars an hour have cost $3.40; another half hour costs two dollars more.
    lines = told(max_usd=5.4)
    assert re.fullmatch(r"left   (2[89]m\d\ds|30m00s), until run.max_usd=5.4 stops it early", lines["time"])
    assert "about $5.40 at the end" in lines["cost"]
    assert lines["time"] != told(max_usd=4.4, max_hours=10)["time"]
    assert "run.max_hours=1 stops it early" in told(max_usd=100, max_hours=1)["time"], "51 minutes have gone"
    assert told(max_usd=100, max_hours=10)["time"] == "left   1h00m"


def test_the_time_left_is_omitted_for_a_silent_run(launch_here: Launch, run: RunDir) -> None:
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    run.metrics.write_text("".join(json.dumps(line | {"time": line["time"] - 1800}) + "\n" for line in lines))
    run_store.update_status(run, state="running", job=describe_this_process())
    lines = dict(line.split(maxsplit=1) for line in launch_here("status", str(run.root)).stdout.splitlines())
    assert lines["step"].startswith("10 of 40 (25%), 30m")
    assert "time" not in lines
    # If steps are logged rarely, status.json has a newer step.
    status = run_store.update_status(run, step=12)
    found = summarize(run, status)
    assert (found["step"], found["left_s"]) == (12, 3600)
    assert found["age_s"] < 60


def test_discarded_steps_are_not_shown(run: RunDir) -> None:
    log = JsonlTracker(run, 2)
    log.log(30, {"train/loss": 77.0, "time/step_s": 2.0})
    log.log(30, {"eval/held_out/loss": 77.0})
    log.log(10, {"eval/held_out/loss": 2.5})
    number = run_store.create_attempt(run, run_records.Attempt(resume_step=10, pinned=True))
    status = run_store.update_status(run, attempt=number, state="running")
    assert summarize(run, status)["eval_loss"] == 2.5, "the newest line of all"
    JsonlTracker(run, number).log(11, {"train/loss": 2.4, "time/step_s": 2.0})
    found = summarize(run, status)
    assert (found["eval_loss"], found["eval_step"]) == (2.5, 10)
    assert max(found["losses"]) < 5


def test_an_unreadable_run_does_not_hide_the_others(launch_here: Launch, run: RunDir) -> None:
    shutil.copytree(run.root, run.root.with_name("broken"))
    metrics = run.root.with_name("broken") / "metrics.jsonl"
    metrics.unlink()
    metrics.mkdir()
    done = launch_here("ls", "--root", str(run.root.parent))
    assert "demo" in done.stdout
    assert done.stderr.startswith("broken: ")
    assert done.returncode == 0
    alone = launch_here("status", "broken", "--root", str(run.root.parent))
    assert alone.returncode == 1
    assert alone.stderr.startswith("a file cannot be read or written: Is a directory\n  where:  ")
    assert "Traceback" not in alone.stderr


def test_the_wandb_line_ignores_addresses_of_the_hub(launch_here: Launch, run: RunDir) -> None:
    log = JsonlTracker(run, 2)
    log.event("info", "Weights & Biases: offline", url=None, sync_command="wandb sync x")
    lines = dict(line.split(maxsplit=1) for line in launch_here("status", str(run.root)).stdout.splitlines())
    assert lines["W&B"] == "offline; upload it with: wandb sync x"
    log.event("info", "Weights & Biases: here", url="https://wandb.example/run", sync_command=None)
    log.event("mirror", "step 10 is in the mirror")
    log.event("export", "pushed", url="https://hub.example/model")
    lines = dict(line.split(maxsplit=1) for line in launch_here("status", str(run.root)).stdout.splitlines())
    assert lines["W&B"] == "https://wandb.example/run"
    assert lines["mirror"] == "step 10 is in the mirror"
    assert "export" not in lines
    run.export.mkdir()
    log.event("alert", "Weights & Biases does not have all data", sync_command="wandb sync y")
    lines = dict(line.split(maxsplit=1) for line in launch_here("status", str(run.root)).stdout.splitlines())
    assert lines["W&B"] == "https://wandb.example/run; upload the missing part with: wandb sync y"
    assert lines["export"] == short_path(run.export)


def test_status_shows_goodput_gpus_and_ranks(launch_here: Launch, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = Breakdown(wall_s=7200, kept_s=5400, queue_s=900, start_s=0, load_s=600, save_s=0.5, restart_s=299.5, lost_steps=12)
    gpus = {
        "gpu/util_mean": 0.93,
        "gpu/util_min": 0.41,
        "gpu/memory_max_frac": 0.88,
        "gpu/power_mean": 640.0,
        "gpu/temp_max": 77.0,
    }
    pace = {"perf/tokens_per_sec": 1.0, "time/step_s": 1.0, "memory/host_rss_gib": 1.0, "trainer/eta_s": 1.0}
    more = {"time/straggler_ratio": 1.31, "gpu/xids": 2.0, **gpus, **pace, **spent.metrics()}
    JsonlTracker(run, 2).log(11, {"train/loss": 2.0, **more})
    monkeypatch.setattr(goodput, "read", lambda *_, **__: spent)
    lines = dict(line.split(maxsplit=1) for line in launch_here("status", str(run.root)).stdout.splitlines())
    assert lines["GPUs"] == "93% busy (lowest 41%), memory up to 88%, 640 W each, up to 77 °C, 2 Xid errors"
    assert lines["ranks"] == "the slowest rank takes 1.31x the time of the median rank"
    assert lines["goodput"].startswith("75.0% of 2h00m was spent on kept steps; waiting for machines 15m00s, loading")
    told = json.loads(launch_here("status", str(run.root), "--json").stdout)["goodput"]
    assert (told["fraction"], told["wall_s"], told["queue_s"], told["lost_steps"]) == (0.75, 7200, 900, 12)


def test_json_has_no_nan(launch_here: Launch, run: RunDir) -> None:
    JsonlTracker(run, 2).log(11, {"train/loss": math.nan, "trainer/eta_s": math.inf})

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is no JSON")

    for verb in (("status", str(run.root)), ("ls", "--root", str(run.root.parent))):
        found = json.loads(launch_here(*verb, "--json").stdout, parse_constant=refuse)
        one = found[0] if isinstance(found, list) else found
        assert (one["metrics"]["train/loss"], one["metrics"]["trainer/eta_s"], one["losses"][-1]) == (None, None, None)
        assert one["metrics"]["trainer/step"] == 11


def test_time_after_the_last_line_counts_as_in_the_report(launch_here: Launch, run: RunDir) -> None:
    """After the last step, two GPUs ran for half an hour: an unlogged step, or the last save and the export."""
    now = time.time()
    for attempt, submitted_at, begun_at in ((1, now - 7200, now - 7200), (2, now - 3600, now - 3600)):
        times = {"submitted_at": submitted_at, "begun_at": begun_at}
        run_store.write_attempt(run, attempt, replace(run_store.read_attempt(run, attempt), **times))
    hand_made.end(run, 1, ended_at=now - 3600)
    for file in (run.metrics, run.events):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        earlier = {1: now - 7100, 2: now - 2700}
        moved = [line | {"time": earlier[line["attempt"]] + 60 * i} for i, line in enumerate(lines)]
        file.write_text("".join(json.dumps(line) + "\n" for line in moved))
    found = summarize(run, run_store.update_status(run, state="running"))
    assert found["cost"]["gpu_hours"] == pytest.approx(4.0, abs=0.01)
    assert found["cost"]["usd"] == pytest.approx(8.0, abs=0.02)
    hand_made.end(run, 2, state="completed", cause="completed", ended_at=now - 1800)
    found = summarize(run, run_store.update_status(run, state="completed"))
    assert (found["cost"]["gpu_hours"], found["goodput"]["wall_s"]) == (pytest.approx(3.0), pytest.approx(5400))
    assert launch_here("report", str(run.root)).returncode == 0
    page = (run.root / "report.html").read_text()
    for value, label in (
        (f"{found['goodput']['fraction']:.1%}", "goodput"),
        ("1h30m", "since submission"),
        ("3.00", "GPU hours"),
    ):
        assert f"<b>{value}</b><span>{label}" in page, label


def test_watching_survives_a_storage_failure(start: Callable, run: RunDir) -> None:
    run_store.update_status(run, state="running", job=describe_this_process())
    with start("status", str(run.root), "--watch", "0.2", "--json") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["state"] == "running"
        away = run.root.rename(run.root.with_name("away"))
        unread = next(line for line in process.stdout if not line.startswith("{"))
        assert unread.startswith("the run cannot be read now: a file of the run is missing")
        away.rename(run.root)
        run_store.update_status(run, state="completed", step=40)
        rest, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert json.loads(rest.splitlines()[-1])["step"] == 40


def test_ls_is_a_table_with_the_newest_run_first(launch_here: Launch, run: RunDir) -> None:
    time.sleep(0.01)
    plan = run_store.load_plan(run)
    run_store.create(plan.model_copy(update={"run_dir": str(run.root.with_name("later-run"))}))
    done = launch_here("ls", "--root", str(run.root.parent))
    require_exit(done)
    names, later, demo = (line.split() for line in done.stdout.splitlines())
    assert names == ["run", "state", "step", "loss", "cost", "updated"]
    assert later[:2] == ["later-run", "pending"]
    assert demo[:5] == ["demo", "completed", "10/40", "3.0000", "$3.40"]


def test_a_sparkline_shows_the_shape() -> None:
    assert sparkline([]) == ""
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([0.0, 7.0, math.nan, 3.0]) == "▁█!▄"


def test_on_cpus_rank_hours_are_counted(launch_here: Launch, run: RunDir) -> None:
    plan = json_records.read_json(run.plan)
    atomic_files.write_json(run.plan, plan | {"topology": plan["topology"] | {"device": "cpu", "backend": "gloo"}})
    assert "cost        $3.40 so far (1.70 rank hours)" in launch_here("status", str(run.root)).stdout
    assert "$3.40" in launch_here("ls", "--root", str(run.root.parent)).stdout
    assert launch_here("report", str(run.root)).returncode == 0
    page = (run.root / "report.html").read_text()
    assert "rank hours" in page
    assert "GPU hours" not in page


def test_the_expected_cost_follows_from_the_pace(run: RunDir) -> None:
    status = run_store.update_status(run, state="running")
    # One more hour on two ranks, at two dollars per GPU hour.
    assert summarize(run, status)["cost"]["expected_usd"] == pytest.approx(3.4 + 2 * 2.0, abs=0.01)


def test_attempts_that_never_trained_are_paid_for(launch_here: Launch, run: RunDir) -> None:
    """Two GPUs ran for 51 minutes without logging a step. Waiting for the first machines costs nothing."""
    run.metrics.unlink()
    hand_made.end(run, 1, ended_at=time.time())
    shutil.rmtree(run.attempt(2))
    status = run_store.update_status(run, state="failed", attempt=1, step=0)
    cost = summarize(run, status)["cost"]
    assert cost == {
        "gpu_hours": pytest.approx(1.7, abs=0.01),
        "usd": pytest.approx(3.4, abs=0.02),
        "expected_usd": None,
        "at_typical_price": False,
    }
    assert "$3.40" in launch_here("ls", "--root", str(run.root.parent)).stdout
    plan = json_records.read_json(run.plan)
    atomic_files.write_json(run.plan, plan | {"price": None})
    assert summarize(run, status)["cost"] == cost | {"usd": None}
    atomic_files.write_json(run.plan, plan | {"price": None, "topology": plan["topology"] | {"device": "cpu", "backend": "gloo"}})
    assert summarize(run, status)["cost"] is None
    (run.attempt(1) / "journal/attempt.jsonl").unlink()
    run_store.write_attempt(run, 1, replace(run_store.read_attempt(run, 1), begun_at=None))
    atomic_files.write_json(run.plan, plan)
    assert summarize(run, replace(status, state="pending"))["cost"] is None


def test_a_typical_price_is_marked(launch_here: Launch, run: RunDir) -> None:
    plan = run_store.load_plan(run)
    assert plan.price is not None
    typical = replace(plan.price, assumption="typical")
    atomic_files.write_text(run.plan, plan.model_copy(update={"price": typical}).to_json())
    words = "$3.40 so far (1.70 GPU hours); at a typical price; set yours with cluster.price_per_gpu_hour"
    assert f"cost        {words}\n" in launch_here("status", str(run.root)).stdout
    assert json.loads(launch_here("status", str(run.root), "--json").stdout)["cost"]["at_typical_price"] is True
    assert " ~$3.40 " in launch_here("ls", "--root", str(run.root.parent)).stdout
    assert launch_here("report", str(run.root)).returncode == 0
    assert "$3.40 at a typical price" in (run.root / "report.html").read_text()


@pytest.mark.parametrize("price", [[], {"usd_per_gpu_hour": "much"}])
def test_a_plan_with_a_damaged_price_is_an_error_that_names_it(
    run: RunDir, capsys: pytest.CaptureFixture[str], price: object
) -> None:
    plan = json.loads(run.plan.read_text())
    atomic_files.write_json(run.plan, plan | {"price": price})
    assert main(["status", str(run.root)]) == 2
    said = capsys.readouterr().err
    assert "the plan of this run cannot be read by this launcher" in said
    assert str(run.plan) in said


def test_a_long_run_is_shown_as_fast_as_a_short_one(launch: Launch, run: RunDir) -> None:
    """The run has 10,000 steps; the limit is generous because other programs may be running."""
    log = JsonlTracker(run, 2)
    metrics = {f"group/metric_{i}": 0.123456789 * i for i in range(40)}
    for step in range(11, 10_011):
        log.log(step, {"train/loss": 3.0, "perf/tokens_per_sec": 1.0, "time/step_s": 1.0, "memory/host_rss_gib": 1.0, **metrics})
    began = time.monotonic()
    done = launch("status", str(run.root), "--json")
    took = time.monotonic() - began
    assert json.loads(done.stdout)["metrics"]["trainer/step"] == 10_010
    assert took < 3


def test_the_newest_verdict_and_what_is_still_to_be_answered_are_shown(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    status = run_store.read_status(run)
    assert (summarize(run, status)["verdict"], summarize(run, status)["answers"]) == (None, None)
    for step in (10, 20):
        folder = run.root / f"evaluations/step-{step:08d}"
        folder.mkdir(parents=True)
        made_verdict().write(folder)
    (run.root / "evaluations/step-00000030").mkdir()
    JsonlTracker(run, 2).event("answers", "the answers of step 30 come from job 77")
    shown = summarize(run, status)["verdict"]
    assert (shown["step"], shown["outcome"]) == (20, "better")
    assert main(["status", str(run.root)]) == 0
    out = capsys.readouterr().out
    assert "verdict     step 20: Fine-tuning helped: exact match 0.31" in out
    assert "answers     the answers of step 30 come from job 77" in out
    (run.root / "evaluations/step-00000030/verdict.json").write_text("{")
    assert summarize(run, status)["verdict"] is None, "a damaged one hides nothing else"


def test_the_verdict_of_a_step_that_was_set_aside_is_not_shown(run: RunDir) -> None:
    folder = run.root / "evaluations/step-00000020"
    folder.mkdir(parents=True)
    aside = run.checkpoints / "aside-step-00000020"
    aside.mkdir()
    (aside / "manifest.json").write_text("{}")
    evaluated = atomic_files.digest_file(aside / "manifest.json").xxh3_128
    replace(made_verdict(), checkpoint="d" * 32).write(folder)
    status = run_store.read_status(run)
    assert summarize(run, status)["verdict"]["step"] == 20, "retention has removed its checkpoint"
    replace(made_verdict(), checkpoint=evaluated).write(folder)
    assert summarize(run, status)["verdict"] is None


@pytest.mark.parametrize("content", [None, b"", b'{"state": "runn', b"\xff\x00\n"])
@pytest.mark.parametrize(
    "name",
    [
        *("status.json", "events.jsonl", "metrics.jsonl", "driver.json", "attempts/001/attempt.json"),
        *("attempts/002/attempt.json", "attempts/002/cancel.json", "attempts/002/journal/attempt.jsonl"),
    ],
)
def test_a_damaged_file_hides_nothing_else(typed: Typed, run: RunDir, name: str, content: bytes | None) -> None:
    """Of the metrics, that is all but the losses: the step is in status.json too."""
    run_store.update_status(run, state="failed", step=10, message="a rank was killed")
    file = run.root / name
    file.unlink(missing_ok=True)
    if content is not None:
        file.write_bytes(content)
    for verb in ("status", "report", "checkpoints"):
        code, out, err = typed(verb, str(run.root))
        assert (code, err) == (0, ""), (verb, out)
        if verb == "status":
            shown = dict(line.split(maxsplit=1) for line in out.splitlines())
            assert (shown["state"], shown["attempt"]) == ("failed: a rank was killed", "2")
            assert (shown["step"], shown["checkpoints"]) == ("10 of 40 (25%)", "step 5, step 10")
    _, listed, err = typed("ls", str(run.root.parent))
    assert (listed.splitlines()[1].split()[:3], err) == (["demo", "failed", "10/40"], "")


def test_the_cost_of_ended_runs_is_listed_without_their_metrics(
    typed: Typed, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand runs are listed in two seconds, and a run's metrics may be gigabytes."""
    for attempt in (1, 2):
        hand_made.end(run, attempt, ended_at=time.time())
    monkeypatch.setattr(goodput, "read_time_lines", None)
    assert "$3.40" in typed("ls", str(run.root.parent))[1]
