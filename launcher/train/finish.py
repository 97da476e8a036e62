"""How training ends: requests to stop, the outcome, and the Hugging Face folder that all ranks write and rank 0 verifies."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from launcher.checkpoint import store
from launcher.config.sections.cluster import ClusterSection
from launcher.distributed import RankInfo, rank0_broadcast, run_on_all_ranks
from launcher.errors import CheckpointError, ExportError, Problem, PushError
from launcher.export import hub, model_card
from launcher.export.hf_folder import (
    ExportedFolder,
    ExportTask,
    begin_export,
    complete_export,
    describe_added_stop_ids,
    describe_names,
    write_rank_files,
)
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.quantities import format_count
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store
from launcher.shell_commands import launcher_command
from launcher.tracking.jsonl import read_metrics
from launcher.tracking.progress import EVENT, Pace, as_events, ignore_progress, report_elapsed_time
from launcher.tracking.run_metrics import read_overfitting
from launcher.tracking.tracker import Composite
from launcher.train import liger
from launcher.train.engine import leave_process_group
from launcher.train.held_out_loss import EarlyStopping
from launcher.train.model import weights_gib

# Called on rank 0 with the plan, the Hugging Face folder, the device type that its model fits on, and the tracker.
OnExported = Callable[[LaunchPlan, Path, str, Composite], None]
_NOT_WRITTEN = "training is complete and saved, but the Hugging Face folder could not be written"


class Stop(Protocol):
    """Returns this process's reason to stop, or None. `at` is the time.monotonic() of the request, None without one."""

    at: float | None

    def __call__(self) -> str | None: ...

    def cancel(self) -> None:
        """Request a stop as if a person had sent a signal; callable from any thread."""

    def begin_training(self) -> None:
        """End the phase in which a cancel ends the process at once because there is nothing to save."""


def has_time_to_save(
    cluster: ClusterSection, reason: str, asked_at: float | None, save_s: float | None, device: torch.device
) -> bool:
    """Return whether every rank can finish a save, if it takes as long as the last one, before the machines go away. Collective.

    `asked_at` is the time.monotonic() of the request to stop, and `save_s` the seconds of the last save; None if unknown. An
    interrupted save leaves nothing; committed checkpoints stay.
    """
    lead_s = cluster.save_lead_s
    if reason != "preempted" or lead_s is None or save_s is None:
        return True
    waited = time.monotonic() - asked_at if asked_at is not None else 0.0
    late = torch.tensor(float(save_s > lead_s - waited), device=device)
    dist.all_reduce(late, op=dist.ReduceOp.MAX)
    return not late.item()


@dataclass(frozen=True)
class Outcome:
    """How training ended. `state` is completed, cancelled (by a person) or preempted (by the machines, or a limit of the run).

    `reason` is completed or one of launcher.distributed.STOP_REASONS. `checkpoint` is None if nothing was trained or saved.
    """

    state: str
    reason: str
    step: int
    message: str
    checkpoint: Path | None

    @classmethod
    def early_stopped(cls, rank_info: RankInfo, step: int, early_stopping: EarlyStopping, best: Path, newest: Path) -> Outcome:
        """Return the outcome of a run that early stopping ended at `step`, with its best weights if they are kept. Collective.

        `best` and `newest` are the checkpoints of the best evaluation, which may have been removed, and of `step`.
        """
        message = f"{format_count(step, 'step')}; {early_stopping.message}"
        if rank0_broadcast(rank_info, "the best checkpoint cannot be read", best.is_dir):
            message, checkpoint = f"{message}; the weights of step {early_stopping.best_step} are used", best
        else:
            message = f"{message}; that step is not kept (see checkpoint.keep_best), so the last weights are used"
            checkpoint = newest
        return cls("completed", "completed", step, message, checkpoint)

    @classmethod
    def interrupted(
        cls, reason: str, limit: str, step: int, max_steps: int, kept_step: int, save_s: float | None, checkpoint: Path
    ) -> Outcome:
        """Return the outcome of an attempt that stopped at `step` for one of STOP_REASONS; `limit` is the limit that it reached.

        `kept_step` is the step of `checkpoint`: an earlier one if there was no time for a save, which takes `save_s` seconds.
        """
        state = "cancelled" if reason == "cancelled" else "preempted"
        causes = {"cancelled": "stopped on request", "preempted": "the machine was asked to stop", "limit": limit}
        result = f"saved at step {step} of {max_steps}"
        if kept_step != step:
            result = f"there was no time to save step {step}, which takes {save_s:.0f} s; step {kept_step} is kept"
        return cls(state, reason, kept_step, f"{causes[reason]}; {result}", checkpoint)

    @classmethod
    def untrained(cls, step: int, checkpoint: Path | None) -> Outcome:
        """Return the outcome of an attempt that a person cancelled before its first step: there was nothing to save.

        `checkpoint` is the one of `step` that the attempt started from, None if it started from the initial weights.
        """
        newest = "there is no checkpoint" if checkpoint is None else f"the newest checkpoint is of step {step}"
        return cls("cancelled", "cancelled", step, f"stopped before training had begun; {newest}", checkpoint)


def write_weights(plan: LaunchPlan, rank_info: RankInfo, checkpoint: Path, device: torch.device, tracker: Composite) -> None:
    """Write the weight files of the Hugging Face folder, each on one rank; call `finish` on rank 0 afterwards. Collective.

    Also undoes Liger's changes to transformers, and sends an alert if the run overfits.

    Raises:
        ExportError: on every rank, after leaving the process group, if any rank cannot write, or if a weight differs from
            the engine's.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    liger.undo()
    # A run that ended because it overfits, and kept its best weights, needs no advice.
    keeps_best = plan.config.eval.stop_after > 0 and plan.config.checkpoint.keep_best > 0
    with suppress(OSError, ValueError):
        overfitting = None if keeps_best else read_overfitting(RunDir(Path(plan.run_dir)))
        if overfitting is not None:
            tracker.event("alert", overfitting.summary)
    if not plan.config.export.enabled:
        return
    task = _build_export_task(plan, checkpoint)
    make_progress = as_events(tracker.event) if rank_info.is_main else ignore_progress
    try:
        run_on_all_ranks(device, _NOT_WRITTEN, lambda: begin_export(task) if rank_info.is_main else None)
        rank, world_size = rank_info.rank, rank_info.world_size
        run_on_all_ranks(device, _NOT_WRITTEN, lambda: write_rank_files(task, rank, world_size, make_progress))
    except CheckpointError as error:
        # All ranks raise this, so none of them writes any longer.
        leave_process_group()
        if rank_info.is_main:
            shutil.rmtree(task.partial, ignore_errors=True)
        raise _build_export_error(plan, error.problems) from error


def finish(plan: LaunchPlan, checkpoint: Path, tracker: Composite, on_exported: OnExported) -> None:
    """Complete the Hugging Face folder, verify that it is the trained model, push it if configured, and call `on_exported`.

    Raises:
        ExportError: if the folder cannot be written, or does not compute what the trained model computed.
    """
    if not plan.config.export.enabled:
        return
    task = _build_export_task(plan, checkpoint)
    try:
        device = "cpu"
        if torch.cuda.is_available() and 2 * weights_gib(plan) < torch.cuda.mem_get_info()[0] / 2**30:
            device = "cuda"
        manifest = store.open_checkpoint(checkpoint).manifest
        run = RunDir(Path(plan.run_dir))
        metrics, plans = read_metrics(run.metrics, model_card.METRICS), run_store.load_plans_until(run, manifest.attempt)
        exported = complete_export(
            task, lambda folder: model_card.render_model_card(plan, manifest, metrics, folder, plans), device
        )
        _report_export(exported, tracker)
        _push_to_hub(plan, exported, tracker)
        on_exported(plan, exported.path, device, tracker)
    except CheckpointError as error:
        raise _build_export_error(plan, error.problems) from error
    except OSError as error:
        problem = Problem(f"{_NOT_WRITTEN}: {error.strerror}", where=str(error.filename or plan.run_dir))
        raise _build_export_error(plan, [problem]) from error
    finally:
        shutil.rmtree(task.partial, ignore_errors=True)


def _build_export_error(plan: LaunchPlan, problems: Iterable[Problem]) -> ExportError:
    again = f"then: {launcher_command('export', plan.run_dir)}"
    return ExportError(replace(problem, remedy=problem.remedy or again) for problem in problems)


def _build_export_task(plan: LaunchPlan, checkpoint: Path) -> ExportTask:
    return ExportTask(
        checkpoint=checkpoint,
        model=Path(plan.model.path) if plan.model.path else plan.model.config,
        tokenizer=Path(plan.model.tokenizer_path) if plan.model.tokenizer_path else None,
        out=RunDir(Path(plan.run_dir)).export,
        dtype=plan.config.model.dtype,
        trust_remote_code=plan.config.model.trust_remote_code,
        code_digest=plan.config.model.code_digest,
        chat_template=plan.data.chat_template if plan.data else None,
        turn_end_ids=plan.data.turn_end_ids if plan.data else (),
    )


def _report_export(exported: ExportedFolder, tracker: Composite) -> None:
    proofs = ["not compared with the engine's weights"]
    if exported.num_compared:
        proofs = [f"{exported.num_compared} tensors equal the engine's"]
    if not exported.loaded:
        proofs.append(f"not loaded back: {exported.not_loaded}")
    elif (parity := exported.parity) is None:
        proofs.append("loaded back, logits finite")
    else:
        proofs.append(f"loaded back, mean KL to the trained model {parity.mean_kl:.1e} over {parity.num_tokens} tokens")
    tracker.event(
        "export",
        f"Hugging Face folder: {exported.path} ({exported.dtype}; {'; '.join(proofs)})",
        path=str(exported.path),
        tensors_compared=exported.num_compared,
        mean_kl=exported.parity.mean_kl if exported.parity else None,
    )
    if exported.added_stop_ids:
        tracker.event("export", describe_added_stop_ids(exported))
    if names := describe_names(exported):
        tracker.event("export", names)


def _push_to_hub(plan: LaunchPlan, exported: ExportedFolder, tracker: Composite) -> None:
    """Push the folder to the Hub. A failure is only an alert: the run is complete and the folder exists."""
    repo_id = plan.config.export.push_to_hub
    if repo_id is None:
        return
    try:
        again = launcher_command("export", plan.run_dir, "--push", repo_id)
        activity = f"pushing {exported.num_bytes / 2**30:.2f} GiB to {repo_id}"
        with report_elapsed_time(activity, lambda text: tracker.event(EVENT, text), Pace()):
            address = hub.push(exported.path, repo_id, again=again)
    except PushError as error:
        problem, *_ = error.problems
        tracker.event("alert", f"{problem.message}: {problem.value or problem.where}; {problem.remedy}")
    else:
        tracker.event("export", f"pushed to {address}", url=address)
