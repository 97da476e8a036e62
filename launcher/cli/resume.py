"""Start a further attempt of a run: choose the checkpoint, plan again, and reject a run that cannot continue."""

from __future__ import annotations

import time
from dataclasses import replace

from launcher import code_snapshot, run_store
from launcher.checkpoint import store
from launcher.checkpoint.manifest import Checkpoint
from launcher.checkpoint.state import read_state
from launcher.cli import formatting
from launcher.cli.accounts import wandb_check
from launcher.cli.checkpoints import verify
from launcher.cli.launch import may_start, require_idle
from launcher.cli.starting.interrupts import Interrupts
from launcher.cli.starting.resumed_plan import plan_again, resume_command
from launcher.cli.views.plan_view import remarks
from launcher.cli.worker_process import worker_environment
from launcher.clusters.backends import Cluster
from launcher.clusters.preflight import check_startable, disk_note, push_note
from launcher.errors import CheckpointError, DamagedCheckpoint, LauncherError, Problem, SubmitError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt, read_export
from launcher.shell_commands import launcher_command
from launcher.tracking import goodput
from launcher.tracking.metrics_tail import has_trained


def resume_run(
    run: RunDir,
    plan: LaunchPlan,
    cluster: Cluster,
    overrides: list[str],
    step: int | None,
    interrupts: Interrupts,
    force: bool = False,
    automatic: bool = False,
    accepts_cost: bool = False,
) -> int:
    """Submit a further attempt of a run that has ended, from the checkpoint of `step` or the newest one; returns its number.

    Before a run gets more steps than it had, run.confirm_usd applies as at its start, unless `accepts_cost`.

    A run that has trained no step, for example because it was cancelled in the queue, begins with its initial weights. An
    `automatic` attempt counts toward the retry budgets with the attempts before it, and starts over if no checkpoint was ever
    committed.

    Raises:
        ConfigError: if settings or data differ from those of the checkpoint and `force` is false.
        SubmitError: if the run is running, is complete, has reached a limit, or has no such checkpoint.
    """
    require_idle(run, cluster)
    begins_again = automatic and store.newest_step(run.checkpoints) is None
    checkpoint = None if begins_again else _choose_checkpoint(run, step)
    if checkpoint is not None and not run.attempts.is_dir():
        plan = run_store.find_plan(run, checkpoint.manifest.plan_digest) or plan
        print("note: attempts/ is missing; it is created again, and limits of time and cost count from this attempt on")
    former = plan
    plan = plan_again(plan, run, checkpoint, overrides, cluster, force)
    if checkpoint is not None:
        _require_steps_left(run, plan, checkpoint)
    _require_budget(run, plan)
    check_startable(plan)
    cluster.check(plan)
    for note in (*wandb_check.check(plan.config, worker_environment()), disk_note(plan), push_note(plan)):
        if note:
            print(f"note: {note}")
    for line in _changed_remarks(plan, former):
        print(line)
    if checkpoint is not None and (note := _describe_replaced_export(run, plan, checkpoint.step)):
        print(f"note: {note}")
    is_longer = (plan.batch.max_steps or 0) > (former.batch.max_steps or 0)
    if is_longer and not automatic and not may_start([plan], accepts_cost):
        raise SubmitError("the run was not continued, as you answered", where=str(run.root), remedy="answer y to continue it")
    # Changes to the run begin here.
    interrupts.defer()
    if checkpoint is not None:
        for path in store.set_aside_after(run.checkpoints, checkpoint.step):
            print(f"set aside: {formatting.short(path)}")
    _replace_unusable_code(run)
    resume_step = None if checkpoint is None else checkpoint.step
    attempt = run_store.create_attempt(run, Attempt(resume_step, automatic=automatic, pinned=step is not None))
    plan_path = run_store.write_plan(run, attempt, plan)
    run_store.update_status(run, state="pending", job=None, max_steps=plan.batch.max_steps, message="")
    missing = "no checkpoint was saved yet" if begins_again else "no step was trained yet"
    start = f"the beginning: {missing}" if resume_step is None else f"step {resume_step} of {plan.batch.max_steps}"
    print(f"continuing {plan.run_name} from {start}", flush=True)
    cluster.submit(run, attempt, plan_path)
    return attempt


def _changed_remarks(plan: LaunchPlan, former: LaunchPlan) -> list[str]:
    """Return the warnings and notes of a plan that the former one does not have, such as a warm-up longer than the run."""
    known = remarks(former)
    return [line for line in remarks(plan) if line not in known]


def _require_steps_left(run: RunDir, plan: LaunchPlan, checkpoint: Checkpoint) -> None:
    """Reject a checkpoint at or after the last step, unless the run has ended there without its export.

    Raises:
        SubmitError: with what to do instead.
    """
    max_steps = plan.batch.max_steps
    export = launcher_command("export", formatting.short(run.root), "--step", str(checkpoint.step))
    if max_steps is not None and checkpoint.step > max_steps:
        key = "train.epochs" if plan.config.train.max_steps is None else "train.max_steps"
        raise SubmitError(
            f"the checkpoint is of step {checkpoint.step}, and {key} ends the run at step {max_steps}",
            where=key,
            value=str(plan.config.train.epochs if key == "train.epochs" else max_steps),
            remedy=f"raise it, go back with --step, or export this step with: {export}",
        )
    if checkpoint.step == max_steps and (store.newest_step(run.checkpoints) or 0) > checkpoint.step:
        raise SubmitError(
            f"no step is left to train: the run would end at step {max_steps}, where it would begin",
            where="--step",
            value=str(checkpoint.step),
            remedy=f"raise train.max_steps, or export this step with: {export}",
        )
    exported = read_export(run)
    is_completed = run_store.read_status(run).state == "completed"
    has_result = is_completed and not plan.config.export.enabled
    if exported is not None:
        has_result = is_completed or exported.step == checkpoint.step
    if checkpoint.step == max_steps and has_result:
        raise SubmitError(
            f"the run is complete: step {checkpoint.step} of {max_steps}",
            where=str(run.root),
            remedy=f"train further with: {resume_command(run)} train.max_steps=...",
        )
    if exported is not None and is_completed and _ended_early(checkpoint, plan):
        raise SubmitError(
            f"the run is complete: it ended at step {checkpoint.step} because of eval.stop_after",
            where=str(run.root),
            remedy=f"train further with: {resume_command(run)} eval.stop_after=0",
        )


def _ended_early(checkpoint: Checkpoint, plan: LaunchPlan) -> bool:
    """Return whether the run ended at this checkpoint because a loss no longer fell, and its settings still say so."""
    if not plan.config.eval.stop_after:
        return False
    kept = read_state(checkpoint.path).extra.get("early_stopping") or {}
    return plan.config.eval.stop_after <= int(kept.get("num_without_improvement", 0))


def _describe_replaced_export(run: RunDir, plan: LaunchPlan, step: int) -> str | None:
    """Say that a run's result will be replaced; None unless it is completed, or has exported the step that it continues from."""
    exported = read_export(run)
    if exported is None or not plan.config.export.enabled:
        return None
    if exported.step != step and run_store.read_status(run).state != "completed":
        return None
    holds = f"{formatting.short(run.export)} holds step {exported.step}"
    return f"{holds} and is replaced when the run ends; to keep this model, copy the folder before then"


def _replace_unusable_code(run: RunDir) -> None:
    """If the run's code reads other plans, copy the current code into the run and report it."""
    if not code_snapshot.is_current(run):
        earlier = code_snapshot.replace(run, run_store.newest_attempt(run))
        message = "the code of this run reads other plans than this launcher writes: the current code replaces it"
        print(f"{message}, {earlier.name} keeps it")


def _require_budget(run: RunDir, plan: LaunchPlan) -> None:
    """Reject an attempt that would stop after one step.

    Raises:
        SubmitError: if the run has used up run.max_hours or run.max_usd.
    """
    limits, problems, command = plan.limits, [], resume_command(run)
    if limits.max_seconds is None and limits.max_gpu_seconds is None:
        return
    try:
        spent = goodput.read(run, time.time(), "pending", plan)
    except (OSError, LauncherError, KeyError, TypeError, ValueError) as error:
        line, *_ = str(error).partition("\n")
        print(f"note: the time and cost so far cannot be read, so the limits count from this attempt on: {line}")
        return
    if limits.max_seconds is not None and spent.held_s >= limits.max_seconds:
        value, remedy = f"it has run for {spent.held_s / 3600:.2f} hours", f"raise it: {command} run.max_hours=..."
        problems.append(Problem("the run has used up run.max_hours", "run.max_hours", value, remedy))
    max_usd = plan.config.run.max_usd
    if max_usd is not None and spent.usd is not None and spent.usd >= max_usd:
        value = f"it has cost ${spent.usd:,.2f}, for {spent.gpu_s / 3600:,.2f} GPU hours"
        remedy = f"raise it: {command} run.max_usd=..."
        problems.append(Problem("the run has used up run.max_usd", "run.max_usd", value, remedy))
    if problems:
        raise SubmitError(problems)


def _choose_checkpoint(run: RunDir, step: int | None) -> Checkpoint | None:
    """Return the newest checkpoint, or the one at `step`; None for a run that has trained no step.

    The ranks verify the newest checkpoint when they read it. A checkpoint at a chosen step is verified here, because later
    checkpoints are set aside for it.

    Raises:
        SubmitError: if it does not exist, cannot be read right now, or is damaged; nothing was changed.
    """
    is_untrained = not has_trained(run, run_store.read_status(run))
    if step is None and is_untrained:
        return None
    try:
        if step is None:
            return store.get_latest(run.checkpoints)
        checkpoint = store.get_at_step(run.checkpoints, step)
        if error := verify([checkpoint])[checkpoint.path]:
            is_damaged = isinstance(error, DamagedCheckpoint)
            raise store.damaged_step_error(step, error.problems, run.checkpoints) if is_damaged else error
        return checkpoint
    except CheckpointError as error:
        fallback = "if the run has not saved a checkpoint yet, start it again under another run.name"
        if is_untrained:
            fallback = "leave out --step: the run has trained no step, and begins with its plan"
        raise SubmitError([replace(problem, remedy=problem.remedy or fallback) for problem in error.problems]) from None
