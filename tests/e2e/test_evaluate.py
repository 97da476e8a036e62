"""`launcher evaluate` of a run with a base model: killed and continued, counted again, and refused where something is missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_tools import TINY, processes_of

from launcher.evaluate.answer_text import normalized_words

pytestmark = pytest.mark.rest

Launch = Callable[..., subprocess.CompletedProcess[str]]

DEADLINE_S = 600
NUM_PROMPTS = 6
SMALL = (
    f"evaluate.max_prompts={NUM_PROMPTS}",
    "evaluate.max_new_tokens=5",
    "evaluate.selection_prompts=2",
    "evaluate.prompts_per_batch=2",
    "evaluate.metrics=[exact_match,token_f1]",
)


@pytest.fixture(scope="module")
def run(launch: Launch, module_runs: Path) -> Path:
    """A run of one step that began with the weights of another, without an export of its own."""
    steps = ("train.max_steps=1", "eval.at_start=false", f"run.root={module_runs}")
    done = launch(*TINY, *steps, "run.name=base")
    assert done.returncode == 0, done.stdout + done.stderr
    source = ("model.init=pretrained", "model.config=null", "model.tokenizer=null", "model.path=run:base")
    done = launch(*TINY, *source, *steps, "export.enabled=false", "run.name=tuned")
    assert done.returncode == 0, done.stdout + done.stderr
    return module_runs / "tuned"


def test_a_killed_evaluation_leaves_no_process_and_continues(launch: Launch, start: Callable, run: Path) -> None:
    folder = run / "evaluations/step-00000001"
    with start("evaluate", str(run), *SMALL) as process:
        end = time.monotonic() + DEADLINE_S
        while not list(folder.glob("*/.*/*.jsonl")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    while processes_of(folder):
        assert time.monotonic() < end, processes_of(folder)
        time.sleep(0.1)
    before = [line for file in folder.glob("*/.*/*.jsonl") for line in file.read_text().splitlines()]
    assert before
    assert not (folder / "answers.json").exists()
    assert not (folder / "verdict.json").exists()
    done = launch("evaluate", str(run), *SMALL, "--json", timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)["sets"]["held_out"]
    assert [*result["styles"]] == ["0-shot", "8-shot", "tuned"]
    questions = [json.loads(line)["reference"] for line in (folder / "held_out.questions.jsonl").read_text().splitlines()]
    for side, name in (("0-shot", "base-0-shot"), ("8-shot", "base-8-shot"), ("tuned", "tuned")):
        answers = [json.loads(line) for line in (folder / f"held_out/{name}.jsonl").read_text().splitlines()]
        assert [one["index"] for one in answers] == list(range(NUM_PROMPTS))
        matches = [normalized_words(one["text"]) == normalized_words(text) for one, text in zip(answers, questions, strict=True)]
        assert result["verdict"]["means"]["exact_match"][side] == pytest.approx(sum(matches) / NUM_PROMPTS)
    assert not list(folder.glob("held_out/.*")), "no parts are left"
    assert not (folder / "weights").exists(), "nor the weights that were exported for the evaluation"
    assert {path.stat().st_mode & 0o077 for path in (folder, *folder.rglob("*"))} == {0}


@pytest.mark.parametrize(
    "words, message",
    [
        (("evaluate.sets=[held_outt]",), "the run has no evaluation set held_outt"),
        (("evaluate.metrics=[exact_mach]",), "exact_mach"),
        (("evaluate.shots=900",), "900 examples cannot be shown to the base model"),
        (("evaluate.vllm_python=/missing/python",), "this is no Python interpreter of an environment with vLLM"),
        (("evaluate.vllm_gpus=2",), "only vLLM divides a model over GPUs"),
        (("--step", "7"), "there is no committed checkpoint of step 7"),
        (("optim.lr=1",), "optim.lr cannot change in an evaluation"),
        (("--min-gain", "rouge_l:0-shot:0"), "--min-gain names rouge_l"),
        (("evaluate.metrics=[numeric]", "evaluate.max_prompts=50"), "numeric cannot score"),
    ],
)
def test_what_cannot_be_evaluated_is_one_block(launch_here: Launch, run: Path, words: tuple[str, ...], message: str) -> None:
    done = launch_here("evaluate", str(run), *words)
    assert done.returncode == 2, done.stdout + done.stderr
    (first, *_) = [line for line in done.stderr.splitlines() if message in line] or [""]
    assert message in first, done.stderr
    assert "remedy: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_without_checkpoint_and_export_is_refused(launch_here: Launch, run: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir(mode=0o700)
    for name in ("plan.json", "status.json"):
        (empty / name).write_bytes((run / name).read_bytes())
    (empty / "attempts").mkdir()
    done = launch_here("evaluate", str(empty))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "resume" in done.stderr
    assert not os.path.exists(empty / "evaluations")
