"""Text from a run's files, which may be another user's, is made safe before it reaches the terminal."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from launcher import run_store
from launcher.plan.run_dir import RunDir
from launcher.security.printable_stream import printable_output
from launcher.tracking.jsonl import JsonlTracker

Launch = Callable[..., subprocess.CompletedProcess[str]]

EVIL = "\x1b]0;title\x07\x1b[2Ja\x9b1mb\u202ec"


def test_nothing_that_a_run_holds_can_act_upon_the_terminal(launch_here: Launch, run: RunDir) -> None:
    JsonlTracker(run, 2).event("alert", f"an alert {EVIL}", step=10)
    run_store.update_status(run, state="failed", message=f"a message {EVIL}", job={"id": EVIL, "nodes": [EVIL]})
    log = run.rank_log(2, 0)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(f"10%\r20%\r\n\x1b[1;31mred\x1b[0m {EVIL}\n")
    evil = run.root.with_name(f"n{EVIL}")
    run.root.rename(evil)
    shown = ""
    for words in (
        ("ls", "--root", str(run.root.parent)),
        *(("status", str(evil)), ("logs", str(evil)), ("checkpoints", str(evil)), ("report", str(evil)), ("resume", str(evil))),
        ("status", f"{evil}-gone"),
    ):
        done = launch_here(*words)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", done.stdout + done.stderr), words
        shown += done.stdout
    for text in ("n", "an alert ", "a message "):
        assert f"{text}\\x1b]0;title\\x07\\x1b[2Ja\\x9b1mb\\u202ec" in shown
    assert "10%\n20%\nred \\x1b]0;" in shown


def test_what_libraries_log_cannot_act_upon_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers logs names from a model's config.json; its log handler keeps the stream from import time."""
    monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
    logger = logging.getLogger("library")
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    with printable_output():
        logger.warning("no rope of the type %s", EVIL)
    logger.warning("end")
    assert terminal.getvalue() == "no rope of the type \\x1b]0;title\\x07\\x1b[2Ja\\x9b1mb\\u202ec\nend\n"
    logger.removeHandler(handler)
