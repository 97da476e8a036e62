"""Steps after the last training step: all ranks write the Hugging Face folder, and rank 0 verifies it."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from launcher import run_store
from launcher.checkpoint import store
from launcher.distributed import RankInfo, run_on_all_ranks
from launcher.errors import CheckpointError, ExportError, Problem, PushError
from launcher.export import hub, model_card
from launcher.export.hf_folder import (
    ExportedFolder,
    ExportTask,
    begin_export,
    complete_export,
    describe_added_stop_ids,
    describe_names,
    find_chat_template,
    write_rank_files,
)
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.shell_commands import launcher_command
from launcher.tracking.jsonl import read_metrics
from launcher.tracking.progress import EVENT, Pace, as_events, report_elapsed_time, silent
from launcher.tracking.run_metrics import read_overfitting
from launcher.tracking.tracker import Composite
from launcher.train import liger
from launcher.train.engine import leave_process_group
from launcher.train.model import weights_gib

# Called on rank 0 with the plan, the Hugging Face folder, the device type that its model fits on, and the tracker.
OnExported = Callable[[LaunchPlan, Path, str, Composite], None]
_NOT_WRITTEN = "training is complete and saved, but the Hugging Face folder could not be written"


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
    make_progress = as_events(tracker.event) if rank_info.is_main else silent
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
        chat_template=find_chat_template(plan),
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
