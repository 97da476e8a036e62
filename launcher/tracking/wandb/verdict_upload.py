"""Send the verdicts of an evaluation to the W&B run: `python -m launcher.tracking.wandb.verdict_upload RUN_DIR STEP`.

This is a separate process because it imports W&B's package. It prints one line on what it did, and exits with 0 whatever W&B
answers: the verdict is on disk.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from launcher import run_store
from launcher.errors import describe
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES
from launcher.shell_commands import launcher_command
from launcher.tracking.jsonl import append_event
from launcher.tracking.verdicts import TUNED, EvaluationVerdict, SetVerdict, by_steps, read_verdicts
from launcher.tracking.wandb.tracker import Session, is_online, sync_command


def upload(run: RunDir, step: int) -> str:
    """Add a step's verdicts to the W&B run's summary, each with a table of answers; returns a line for the user.

    If several steps were evaluated, a table has them all.

    During training, the run has its own session, which this one would disturb; nothing is sent then.
    """
    plan = run_store.load_plan(run)
    tracking = plan.config.tracking
    all_verdicts = read_verdicts(run)
    verdicts = [one for one in all_verdicts if one.step == step]
    if tracking.kind != "wandb" or tracking.mode == "disabled" or not verdicts:
        return ""
    status = run_store.read_status(run)
    if (state := status.state) in RUNNING_STATES:
        return f"W&B: the verdict is not sent because the run is {state}; evaluate again after it ends: existing answers are used"
    session = Session(plan, run, offline=not is_online(tracking.mode), on_stop=lambda: None)
    try:
        for one in verdicts:
            session.summary(summary_of(one))
            if one.verdict.examples:
                header, rows = answer_table(one.verdict)
                session.log_table(f"verdict/{one.set_name or 'prompts'}/answers", header, rows)
        for several in by_steps(all_verdicts):
            session.log_table(f"verdict/{several.set_name or 'prompts'}/steps", *several.table)
    finally:
        session.finish(state)
    line = f"W&B: the verdict is in the summary of {session.url or f'the files in {session.folder}'}"
    upload_command = sync_command(run, plan.wandb_id, session) if session.offline else ""
    if not upload_command:
        return line
    # The command names the files of each evaluation. `status` shows the one of the last event.
    append_event(run, status.attempt, "info", "the verdict is in offline files of W&B", step, sync_command=upload_command)
    return f"{line}; {launcher_command('status', run.root)} shows the command that uploads them"


def summary_of(one: SetVerdict) -> dict[str, Any]:
    """Return the summary's entries: the sentence, the outcome, and each side's mean score by metric."""
    name, verdict = one.set_name or "prompts", one.verdict
    scores = {
        f"eval/{name}/{metric}" + (f"/{side}" if side != TUNED else ""): mean
        for metric, means in verdict.means.items()
        for side, mean in means.items()
    }
    return {
        f"verdict/{name}": verdict.sentence,
        f"verdict/{name}/outcome": verdict.outcome.value,
        "verdict/step": one.step,
        **scores,
    }


def answer_table(verdict: EvaluationVerdict) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of the answers before and after: wins, losses and ties on the primary metric."""
    header = ["comparison", "prompt", "reference", *verdict.sides]
    rows = [
        [f"{one.kind}, {one.baseline}", one.prompt, one.reference, *(one.answers.get(side, "") for side in verdict.sides)]
        for one in verdict.examples
    ]
    return header, rows


def main(run_dir: str, step: str) -> int:
    try:
        if line := upload(RunDir(Path(run_dir).absolute()), int(step)):
            print(line)
    except Exception as error:  # W&B raises far more than wandb.Error.
        print(f"W&B: the verdict is not sent: {describe(error)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
