"""Before the first step: reports how the ranks have joined, and builds engine, batches, evaluator, checkpoints and monitoring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name
from typing import Any

import torch

from launcher.checkpoint import store
from launcher.checkpoint.saver import Saver
from launcher.config.sections.evaluation import HELD_OUT
from launcher.data.loader import PrefetchLoader, RowBatches, TrainBatches
from launcher.data.packing import choose_evenly
from launcher.data.sources.reading import make_eval_source
from launcher.data.split import Split
from launcher.distributed import RankInfo, measure_bus_bandwidth, run_on_all_ranks
from launcher.errors import RunError
from launcher.plan.launch_plan import DataFacts, LaunchPlan
from launcher.plan.objectives import OBJECTIVES
from launcher.plan.planner import as_run
from launcher.plan.quantities import format_count
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store
from launcher.tracking.goodput import JOINED, PHASE
from launcher.tracking.progress import EVENT, as_events, ignore_progress
from launcher.tracking.tracker import Composite
from launcher.train import attention, liger
from launcher.train.checkpointer import Checkpointer
from launcher.train.engine import build_engine
from launcher.train.held_out_loss import EvalRows, Evaluator, Scorer
from launcher.train.model import CausalLMLoss
from launcher.train.monitoring.monitor import Monitor, StatusFile
from launcher.train.monitoring.step_metrics import Meter, StepTimer, find_peak_tflops
from launcher.train.objectives import Objective
from launcher.train.parameter_samples import ParameterSamples
from launcher.train.previous_failure import find_previous_failure
from launcher.train.proof import FirstStepProof
from launcher.train.resume import StartPoint, agree_on_start_point

# Padding is neither attended to nor trained, so any id in the vocabulary works.
_PAD_ID = 0
# Below this, NCCL uses TCP over Ethernet, which is too slow for every model.
_SLOW_GB_PER_S = 5.0
# With more ranks, latency dominates an all-reduce of this size on any network.
_MOST_RANKS = 1024


@dataclass(frozen=True)
class RunContext:
    """The run that this rank takes part in."""

    plan: LaunchPlan
    rank_info: RankInfo
    run_dir: RunDir
    device: torch.device
    tracker: Composite


@dataclass
class Components:
    """The components of the loop; `start` is the checkpoint it starts from."""

    engine: Any
    model: CausalLMLoss
    objective: Objective
    batches: PrefetchLoader
    evaluator: Evaluator
    checkpointer: Checkpointer
    meter: Meter
    timer: StepTimer
    monitor: Monitor
    beat: Callable[[str, int], None]
    status: StatusFile
    max_steps: int
    start: StartPoint
    proof: FirstStepProof | None
    """Until the first step of this attempt is proven."""


def report_ranks(run: RunContext) -> None:
    """Record that the ranks have joined, why the ranks before them failed, and how fast the network is. Collective."""
    world_size, tracker = run.rank_info.world_size, run.tracker
    fields: dict[str, Any] = {PHASE: JOINED, "ranks": world_size}
    tracker.event("info", f"{format_count(world_size, 'rank')} joined", 0, **fields)
    if run.rank_info.is_main and (failure := find_previous_failure(run.run_dir, run.rank_info.attempt)):
        tracker.event("alert", failure.message, recorded=failure.is_recorded)
    if world_size > 1:
        gb_per_s = measure_bus_bandwidth(run.device)
        warning = bandwidth_warning(run.plan, gb_per_s)
        message = f"all-reduce over {world_size} ranks: {gb_per_s:.2f} GB/s{warning}"
        tracker.event("alert" if warning else "info", message, 0, gb_per_s=gb_per_s)


def bandwidth_warning(plan: LaunchPlan, gb_per_s: float) -> str:
    """Return advice to append to the measurement if GPUs of several nodes will wait for their network; empty otherwise."""
    topology = plan.topology
    if topology.device != "cuda" or topology.nodes == 1 or topology.world_size > _MOST_RANKS or gb_per_s >= _SLOW_GB_PER_S:
        return ""
    return (
        ", the speed of Ethernet: training will wait for the network; set NCCL_DEBUG=INFO to see which one NCCL chose, and check "
        "that the container sees InfiniBand or RoCE"
    )


def build_components(run: RunContext, beat: Callable[[str, int], None]) -> Components:
    """Build everything for `run`, with the initial weights in the engine unless it starts from a checkpoint. Collective.

    Raises:
        RunError: if the plan has no data.
        Superseded: if another attempt has taken over the run.
        CheckpointError: if the checkpoint to start from is missing, or this engine cannot be saved.
    """
    plan, rank_info, device, tracker = run.plan, run.rank_info, run.device, run.tracker
    data, max_steps = plan.data, plan.batch.max_steps
    if data is None or max_steps is None:
        raise RunError(
            "the plan has no data",
            where=str(run.run_dir.plan),
            remedy="build it with: python -m launcher data, with the settings of the run",
        )
    peak = find_peak_tflops(plan.config, device) if rank_info.is_main else None
    fence = partial(run_store.fence, run.run_dir, rank_info.attempt, refresh=True)
    run_on_all_ranks(device, "this attempt may not train", fence if rank_info.is_main else lambda: None)
    start = agree_on_start_point(run.run_dir, rank_info, device)
    make_progress = as_events(tracker.event) if rank_info.is_main else ignore_progress
    say = partial(tracker.event, EVENT) if rank_info.is_main else lambda text: None
    samples: list[ParameterSamples] = []

    def watch_gradients(model: CausalLMLoss) -> None:
        if plan.config.train.proof:
            samples.append(ParameterSamples(model.parameters_by_name(), device))

    engine, model = build_engine(plan, rank_info, make_progress, start.checkpoint is not None, on_model=watch_gradients)
    if device.type == "cuda":
        tracker.event("info", attention.describe(model.hf.config, plan.config.data.packing), 0)
    if plan.liger:
        problem = model.liger_problem
        tracker.event("alert" if problem else "info", liger.describe_use(problem, plan.config, run.run_dir.root), 0)
    # Refuse an engine that cannot be saved here, not at the first checkpoint.
    saver = _build_saver(run, engine, model, fence)
    chosen = OBJECTIVES[plan.config.objective.name]
    train_batches = TrainBatches(
        Split.open(data, named=chosen.columns),
        plan.batch,
        plan.config.run.seed,
        plan.topology.data_rank(rank_info.rank),
        plan.topology.data_ranks,
        pad_id=_PAD_ID,
        group_by_length=not plan.config.data.packing,
    )
    batches, eval_rows = PrefetchLoader(train_batches, device), _open_eval_rows(plan, data, chosen.columns)
    monitored = as_run(plan, has_liger=not model.liger_problem) if plan.liger else plan
    monitor = Monitor(monitored, rank_info, device, model, tracker)
    objective: Objective = resolve_name(chosen.builder)()
    proof = FirstStepProof(plan, engine, model, samples[0], objective, train_batches.split) if samples else None
    scorer = Scorer(engine, model, objective, rank_info, device, plan.topology)
    best_set = plan.config.checkpoint.best_set
    return Components(
        engine=engine,
        model=model,
        objective=objective,
        batches=batches,
        evaluator=Evaluator(scorer, eval_rows, beat, say),
        checkpointer=Checkpointer(
            saver, tracker, rank_info.is_main, beat, best_set, plan.eval_rows_digest(best_set), data.cache_dir
        ),
        meter=Meter(plan, max_steps, rank_info.attempt, start.num_restarts, peak),
        timer=StepTimer(device),
        monitor=monitor,
        beat=beat,
        status=StatusFile(run.run_dir, rank_info.attempt, partial(tracker.event, "alert"), rank_info.is_main),
        max_steps=max_steps,
        start=start,
        proof=proof,
    )


def _build_saver(run: RunContext, engine: Any, model: CausalLMLoss, fence: Callable[[], None]) -> Saver:
    plan, folder = run.plan, run.run_dir.checkpoints
    # Rank 0 prunes.
    retention = store.retention_of(run.run_dir, plan) if run.rank_info.is_main else store.Retention.of(plan.config.checkpoint)
    return Saver(
        engine,
        model.parameters_by_name(),
        folder,
        plan_digest=plan.digest(),
        attempt=run.rank_info.attempt,
        prune=lambda committed: store.prune(folder, retention, keep=[committed]),
        background=plan.saving.background,
        deadline_s=plan.config.cluster.timeout_minutes * 60,
        fence=fence,
        eval_set=plan.config.checkpoint.best_set,
        named_buffers=model.buffers_by_name(),
    )


def _open_eval_rows(plan: LaunchPlan, data: DataFacts, columns: tuple[str, ...]) -> list[EvalRows]:
    """Open the rows of all sets that are evaluated during training."""
    opened, micro_batch_size = [], plan.batch.micro_batch_size
    if data.num_eval_rows:
        sources = (*plan.config.data.sources, make_eval_source(plan.config.data))
        batches = RowBatches(Split.open(data, True, columns), micro_batch_size, pad_id=_PAD_ID)
        opened.append(EvalRows(HELD_OUT, batches, tuple(source.name for source in sources if source is not None)))
    for eval_set in plan.config.eval.all_sets:
        split = Split.open(plan.eval_sets[eval_set.name], named=columns)
        batches = RowBatches(split, micro_batch_size, _PAD_ID, choose_evenly(split.num_rows, eval_set.max_rows))
        opened.append(EvalRows(eval_set.name, batches, (eval_set.name,)))
    return opened
