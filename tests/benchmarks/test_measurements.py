"""How benchmarks measure a command and a run's saves, compare predicted speeds, and write to RESULTS.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import predicted_speed
import process_tree
import pytest
import results
from plan_fixtures import PlanOf, config_of, plan_of
from predicted_speed import FACTORS, Outcome
from saving import Saves, measured_saves
from steps import faster_half

from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.planner import planned_step

__all__ = ["config_of", "plan_of"]
TEXT = """# Results

An introduction.

## Current

### export

**2026-01-02 10:00 UTC: export of 2 ranks**

| s |
|---|
| 2 |

`python benchmarks/export.py`

A note by hand.

### saving

**2026-01-01 10:00 UTC: saving, 1 GiB**

| s |

## History

### 2025-12-01 10:00 UTC: export of 1 rank

| s |
"""
TRUE_FACTORS = (1.4, 2.0, 0.7, 1.2)


def test_the_current_section_of_a_benchmark_is_replaced_and_becomes_the_first_of_the_history() -> None:
    text = results.with_section(TEXT, "export", "2026-02-01 10:00 UTC: export of 4 ranks", "| s |\n|---|\n| 1 |")
    current, history = text.split("## History\n")
    assert current.startswith(
        "# Results\n\nAn introduction.\n\n## Current\n\n### export\n\n**2026-02-01 10:00 UTC: export of 4 ranks**"
    )
    assert "| 1 |" in current
    assert "2026-01-02" not in current
    former = (
        "### 2026-01-02 10:00 UTC: export of 2 ranks\n\n| s |\n|---|\n| 2 |\n\n`python benchmarks/export.py`\n\nA note by hand."
    )
    assert history.strip() == f"{former}\n\n### 2025-12-01 10:00 UTC: export of 1 rank\n\n| s |"
    # The sections of other benchmarks keep their order.
    assert current.index("### export") < current.index("### saving\n\n**2026-01-01 10:00 UTC: saving, 1 GiB**\n\n| s |")


def test_a_benchmark_without_a_section_is_added_after_the_others() -> None:
    text = results.with_section(TEXT, "export of 70B", "2026-02-01 10:00 UTC: 70B", "| s |")
    current, history = text.split("## History\n")
    assert [line for line in current.splitlines() if line.startswith("### ")] == ["### export", "### saving", "### export of 70B"]
    assert history == TEXT.split("## History\n")[1]


def test_results_begin_with_an_empty_file() -> None:
    first = results.with_section("", "export", "2026-01-01: a", "one")
    second = results.with_section(first, "export", "2026-01-02: b", "two")
    assert (
        second == "# Results\n\n## Current\n\n### export\n\n**2026-01-02: b**\n\ntwo\n\n## History\n\n### 2026-01-01: a\n\none\n"
    )


def test_a_file_without_the_two_headings_is_refused() -> None:
    with pytest.raises(ValueError, match="## Current"):
        results.with_section("# Results\n\n## 2026-01-01: export\n", "export", "2026-01-02: b", "two")


def test_the_recorded_results_can_be_written_to() -> None:
    recorded = (Path(results.__file__).parent / "RESULTS.md").read_text()
    before, after = recorded.split("## History\n"), results.with_section(recorded, "export", "T", "B").split("## History\n")
    assert before[0].count("\n### ") == after[0].count("\n### ")
    assert after[1].endswith(before[1])


# The command exits at once and leaves a grandchild whose parent has already exited.
ORPHAN = """
import os, time
if os.fork() == 0:
    if os.fork() == 0:
        held = bytearray(b"x") * (100 * 2**20)
        while time.process_time() < 0.5:
            pass
        os.write(1, b"done")
    os._exit(0)
os.wait()
time.sleep(0.6)
"""


def measure(tmp_path: Path, code: str) -> tuple[int, dict[str, float]]:
    figures = tmp_path / "figures.json"
    command = [sys.executable, process_tree.__file__, str(figures), sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, json.loads(figures.read_text())


def test_processes_whose_parent_has_ended_are_counted(tmp_path: Path) -> None:
    code, figures = measure(tmp_path, ORPHAN)
    assert code == 0
    assert figures["cpu_s"] > 0.5
    assert figures["peak_mib"] > 100
    assert figures["largest_mib"] > 100
    assert figures["seconds"] > 0.6


def test_the_exit_code_is_that_of_the_command(tmp_path: Path) -> None:
    assert measure(tmp_path, "raise SystemExit(3)")[0] == 3
    assert measure(tmp_path, "import os; os.kill(os.getpid(), 9)")[0] == 137


def step(number: int, time: float, seconds: float) -> dict[str, Any]:
    return {"trainer/step": number, "time": time, "time/step_s": seconds, "train/loss": 1.0}


def save(last_step: int, time: float, seconds: float, stall_s: float) -> dict[str, Any]:
    figures = {"ckpt/last_step": last_step, "ckpt/save_s": seconds, "ckpt/stall_s": stall_s, "ckpt/bytes": 10}
    return {"trainer/step": last_step + 1, "time": time, **figures}


def test_steps_beside_a_write_are_told_from_others_and_the_first_save_is_left_out() -> None:
    lines = [
        *(step(1, 10, 5), step(2, 12, 2), step(3, 14, 2)),
        # Saved after step 3, written during step 4.
        *(step(4, 17, 3), save(3, 17, 2.5, 0.9), step(5, 19, 2)),
        # Saved after step 5, written until the middle of step 7.
        *(step(6, 23, 4), step(7, 26, 3), save(5, 26, 5.0, 0.1), step(8, 28, 2)),
        save(8, 29, 1.5, 1.5),
    ]
    assert measured_saves(lines) == Saves(
        alone=[2, 2, 2], beside=[4, 3], stalls=[0.1], background=[5.0], waited=1.5, num_bytes=10
    )


# Seconds and bytes per second as benchmarks/cpu_rates.py prints them.
MEASURED = {
    "layer_s": 0.02,
    "head_s": 0.3,
    "attention_s": 0.001,
    "layer_bytes_per_s": 8e9,
    "loss_bytes_per_s": 4e9,
    "copied_bytes_per_s": 3e9,
    "states_bytes_per_s": 6e9,
    "gathered_bytes_per_s": 1e9,
    "reduce_factor": 1.5,
}


def planned(plan_of: PlanOf, *more: str) -> LaunchPlan:
    return plan_of("model=tiny", "model.dtype=bf16", "model.attention=varlen", *more)


def outcomes(plan_of: PlanOf) -> list[Outcome]:
    """Made-up runs that take exactly as long as the model predicts with TRUE_FACTORS."""
    made = []
    for number, case in enumerate(predicted_speed.CASES[:-1]):
        plan = planned(plan_of, *case.overrides, "train.max_steps=8", "train.epochs=null")
        # Each run has different rates, so that no two parts are proportional.
        measured = {name: value * (1 + 0.3 * ((number * place) % 5)) for place, (name, value) in enumerate(MEASURED.items())}
        step = planned_step(plan, rates=predicted_speed.rates_of(plan, measured))
        assert step is not None
        outcome = Outcome(case, plan, parts=[step])
        outcome.step_s.append(outcome.predicted_s(TRUE_FACTORS))
        made.append(outcome)
    return made


def test_rates_give_the_seconds_that_were_measured(plan_of: PlanOf) -> None:
    plan = planned(plan_of, "data.max_length=256", "train.micro_batch_size=4", "model.activation_checkpointing=all")
    step = planned_step(plan, rates=predicted_speed.rates_of(plan, MEASURED))
    assert step is not None
    assert plan.data is not None
    tokens, layers, micro_batches = 4 * 256, plan.model.num_layers, plan.batch.accumulation
    assert predicted_speed.shapes_of(plan)["chunk_tokens"] == tokens * plan.data.num_trained_tokens / plan.data.num_tokens
    # All trained tokens fit into one chunk.
    products_s = layers * MEASURED["layer_s"] * 4 / 3 + MEASURED["head_s"]
    assert step.products_s == pytest.approx(micro_batches * products_s)
    docs = tokens / predicted_speed.shapes_of(plan)["doc_tokens"]
    assert step.attention_s == pytest.approx(micro_batches * docs * layers * MEASURED["attention_s"] * 4 / 3)
    assert not step.runs_ahead


def test_shapes_are_those_of_the_models_products(plan_of: PlanOf) -> None:
    plan = planned(plan_of, *predicted_speed.CASES[-2].overrides)
    shapes = predicted_speed.shapes_of(plan)
    weights = sum(inputs * outputs for inputs, outputs in shapes["products"])
    # Each layer also has two norms.
    assert plan.model.num_params == 12 * (weights + 2 * 512) + 49152 * 512 + 512
    assert shapes["tokens"] == 512


@pytest.mark.rest
def test_factors_are_found_again_and_errors_are_those_of_the_other_half(plan_of: PlanOf) -> None:
    made = outcomes(plan_of)
    factors = predicted_speed.fit([outcome for outcome in made if outcome.case.is_fit])
    assert len(factors) == len(FACTORS)
    # Parts that hardly affect the time keep the assumed factor.
    for outcome in made:
        assert outcome.predicted_s(factors) == pytest.approx(outcome.measured_s, rel=0.03)
    lines = predicted_speed.table(made)
    assert sum("| fit |" in line for line in lines) == sum(case.is_fit for case in predicted_speed.CASES)
    assert any(line.startswith("5 configurations for the test: ") and "5 within 20%" in line for line in lines)
    # A run that takes twice the predicted time is reported as half as fast, and changes no factor.
    slow = made[-1]
    assert not slow.case.is_fit
    slow.step_s[0] *= 2
    row = next(line for line in predicted_speed.table(made) if slow.case.name in line)
    assert float(row.split("|")[-2].strip(" %")) > 90
    assert f"{slow.plan.batch.expected_tokens / slow.step_s[0]:,.0f}" in row
    assert any("4 within 20%" in line for line in predicted_speed.table(made))


def test_nearly_half_of_the_configurations_is_for_the_test_and_all_names_differ() -> None:
    assert len({case.name for case in predicted_speed.CASES}) == len(predicted_speed.CASES) >= 8
    assert sum(not case.is_fit for case in predicted_speed.CASES) >= 6


def test_the_faster_half_is_what_other_programs_have_slowed_least() -> None:
    assert faster_half([3.0, 1.0, 9.0, 2.0, 8.0]) == 2.0
    assert faster_half([4.0]) == 4.0
