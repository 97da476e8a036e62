"""The report page is complete, built from the run's files alone, and needs no network."""

from __future__ import annotations

import math
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import hand_made
import pytest
from forked import Launch, require_exit
from hand_made import TOKEN, made_verdict

from launcher.cli.report import _read_run_files, page, thin_out
from launcher.clusters.detached_process import describe_this_process
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store
from launcher.tracking.jsonl import JsonlTracker


def test_the_report_of_one_run_has_all_sections(launch: Launch, run: RunDir) -> None:
    hand_made.end(run, cause="infrastructure", message="<b>n1</b> was lost", ended_at=time.time())
    done = launch("report", str(run.root))
    require_exit(done)
    file = run.root / "report.html"
    assert done.stdout == f"page: {file}\n"
    page = file.read_text()
    for words in ("completed", "10 of 40", "$3.40", "GPU hours", "Training loss", "Tokens per second", "MFU", "goodput"):
        assert words in page, words
    assert "infrastructure: &lt;b&gt;n1&lt;/b&gt; was lost" in page
    assert "something in attempt 2" in page
    assert "lost steps" in page
    assert not re.search(r"<script|https?://|src=|@import", page)
    curves = ("Training loss", "Learning rate", "Gradient norm", "Tokens per second", "MFU", "Main memory of rank 0")
    assert [title for title in re.findall(r"<h3>([^<]*)", page) if title in curves] == list(curves)
    assert page.count("<polyline") == len(curves), "no curve without values"
    rows = [re.findall(r"<(?:td|th)(?: [^>]*)?>([^<]*)", row) for row in page.split("<tr>")]
    assert ["5", "1.95 KiB", "-", "1", "2"] in rows
    assert ["10", "1.95 KiB", "2.7500", "2", "2"] in rows
    told = {row[0]: row[1] for row in rows if len(row) == 2}
    assert told["model"].startswith("m: ")
    assert "1,000 rows" in told["data"]
    assert told["steps"].startswith("40")


@pytest.mark.parametrize(
    ("state", "begun", "words"),
    [
        ("running", True, "running"),
        ("pending", True, "ended without a record"),
        ("pending", False, "waiting for machines"),
        ("failed", True, "ended without a record"),
        ("cancelled", False, "never started"),
    ],
)
def test_only_the_newest_attempt_of_a_running_run_is_running(run: RunDir, state: str, begun: bool, words: str) -> None:
    run_store.update_status(run, state=state, job=describe_this_process())
    begun_at = time.time() if begun else None
    run_store.write_attempt(run, 2, replace(run_store.read_attempt(run, 2), begun_at=begun_at))
    rows = re.findall(r"<td[^>]*>([^<]*)</td></tr>", page([_read_run_files(run, "demo")]))
    assert [row for row in rows if row in (words, "ended without a record")] == ["ended without a record", words]


def test_the_evaluations_of_a_run(launch_here: Launch, run: RunDir) -> None:
    for name in ("held_out", "support"):
        folder = run.root / "evaluations/step-00000010" / name
        folder.mkdir(parents=True)
        made_verdict().write(folder)
    # The verdict outside the set folders repeats that of the first set.
    made_verdict().write(folder.parent)
    done = launch_here("report", str(run.root))
    require_exit(done)
    page = (run.root / "report.html").read_text()
    assert re.findall(r"<h3>(step [^<]*)", page) == ["step 10, set held_out", "step 10, set support"]
    assert "<p>Fine-tuning helped: exact match 0.31 against 0.12 (0-shot) and 0.19 (8-shot); difference to 8-shot +0.12" in page
    rows = [re.findall(r"<td[^>]*>([^<]*)", row) for row in page.split("<tr>")]
    assert next(row for row in rows if row[:1] == ["stopped"])[:4] == ["stopped", "0.750", "0.750", "1.000"]
    assert next(row for row in rows if row[:1] == ["8-shot"])[2:] == ["24", "0", "176"]
    # 12.5 seconds for 200 prompts are 17.4 GPU hours per million prompts, at two dollars per GPU hour.
    assert ["tuned", "40", "5", "$35"] in rows
    assert page.count("better than 8-shot") == 2 * 3
    assert "How many &lt;b&gt;apples&lt;/b&gt; are 38 apples, says" in page
    assert TOKEN not in page
    assert "by step" not in page
    later = run.root / "evaluations/step-00000020/held_out"
    later.mkdir(parents=True)
    made_verdict().write(later)
    assert launch_here("report", str(run.root)).returncode == 0
    page = (run.root / "report.html").read_text()
    assert re.findall(r"<h3>([^<]*by step)", page) == ["held_out, by step"]
    assert "exact_match of held_out" in page
    rows = [re.findall(r"<t[dh](?: [^>]*)?>([^<]*)", row) for row in page.split("<tr>")]
    assert ["step", "exact_match, 0-shot", "exact_match, 8-shot", "exact_match, tuned", "outcome"] in rows
    assert [row for row in rows if row[-1:] == ["better"]] == [
        [step, "0.120", "0.190", "0.310", "better"] for step in ("10", "20")
    ]


def test_several_runs_share_their_charts(launch_here: Launch, run: RunDir, tmp_path: Path) -> None:
    shutil.copytree(run.root, run.root.with_name("other"))
    file = tmp_path / "both.html"
    done = launch_here("report", "demo", "other", "--root", str(run.root.parent), "--html", str(file))
    require_exit(done)
    page = file.read_text()
    assert "2 runs" in page
    assert page.count("<title>other</title></polyline>") == page.count("<title>demo</title></polyline>") == 6
    assert not (run.root / "report.html").exists()


def test_half_a_surrogate_pair_is_written_as_its_number(launch_here: Launch, run: RunDir) -> None:
    """Python decodes a file name that is not UTF-8 into lone surrogates."""
    JsonlTracker(run, 2).event("alert", "the file \udcff.jsonl is damaged")
    assert launch_here("report", str(run.root)).returncode == 0
    assert "the file &#56575;.jsonl is damaged" in (run.root / "report.html").read_text()


def test_a_page_that_cannot_be_written_is_an_error(launch_here: Launch, run: RunDir, tmp_path: Path) -> None:
    notes = tmp_path / "notes.html"
    notes.write_text("<p>mine</p>")
    for file, words in ((tmp_path / "none/page.html", "cannot be written"), (notes, "not a page of the launcher")):
        done = launch_here("report", str(run.root), "--html", str(file))
        assert done.returncode == 2
        assert words in done.stderr
        assert "--html" in done.stderr
        assert "Traceback" not in done.stderr
    assert notes.read_text() == "<p>mine</p>"


def test_a_run_that_has_not_started_has_a_page(launch_here: Launch, run: RunDir) -> None:
    run.metrics.unlink()
    run_store.update_status(run, state="failed", step=0)
    done = launch_here("report", str(run.root))
    require_exit(done)
    assert "nothing has been logged yet" in (run.root / "report.html").read_text()


def test_thinning_keeps_spikes() -> None:
    points = [(float(step), 1.0) for step in range(10_000)]
    points[4321] = (4321.0, 99.0)
    points[1234] = (1234.0, math.nan)
    found = thin_out(points, 600)
    assert len(found) <= 600
    assert (4321.0, 99.0) in found
    assert [step for step, _ in found] == sorted(step for step, _ in found)
    assert thin_out(points[:600], 600) == points[:600]
