"""Handwritten plans, run directories, checkpoints and verdicts, for tests of the code that reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from launcher.checkpoint import store
from launcher.checkpoint.manifest import STATE, Manifest
from launcher.config.resume import with_overrides
from launcher.config.schema import RunConfig
from launcher.evaluate.verdict import judge, with_examples
from launcher.plan.launch_plan import (
    Batch,
    LaunchPlan,
    Limits,
    Memory,
    ModelFacts,
    PeakMemory,
    Provenance,
    Saving,
    StageMemory,
    Topology,
)
from launcher.plan.retry import Cause
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, journal, json_records, run_store
from launcher.runs.run_records import Attempt
from launcher.tracking.jsonl import read_events
from launcher.tracking.verdicts import EvaluationVerdict, GeneralLoss, SideUsage

# The minimal settings of a run.
SETTINGS = {
    "model": {"name": "m", "init": "random", "path": None, "config": {"model_type": "llama"}, "tokenizer": "./t"},
    "data": {"sources": [{"path": "builtin:stdlib_docs"}]},
    "train": {"max_steps": 40},
}
# The files of a checkpoint of one rank.
ONE_RANK = {store.shard_name(0): b"weights", STATE: b"weights"}
SIDES = {"0-shot": 24, "8-shot": 38, "tuned": 62}
NUM_PROMPTS = 200
# Looks like a key, but is none.
TOKEN = "hf_" + "Qm7" * 8


def plan(run_dir: Path, settings: dict[str, Any], model: dict[str, Any] | None = None, **parts: Any) -> LaunchPlan:
    """The plan of a run with two CPU ranks in `run_dir`; `model` overrides numbers of the model, `parts` whole parts."""
    numbers = {
        "hidden_size": 1,
        "num_layers": 1,
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 1,
        "intermediate_size": 1,
        "vocab_size": 1,
        "tie_word_embeddings": True,
        "config": {"pad_token_id": 0},
        **(model or {}),
    }
    base = LaunchPlan(
        run_name="demo-run",
        run_dir=str(run_dir),
        wandb_id="abcd1234",
        config=RunConfig.model_validate(settings),
        topology=Topology(nodes=1, ranks_per_node=2, world_size=2, device="cpu", backend="gloo"),
        batch=Batch(
            global_batch_size=8,
            micro_batch_size=2,
            accumulation=2,
            max_tokens_per_step=2048,
            tokens_per_step=2000,
            max_steps=40,
            epochs=None,
        ),
        deepspeed={"zero_optimization": {"stage": 3}},
        memory=Memory(
            weights_gib=0.3, gradients_gib=0.3, optimizer_gib=1.5, per_rank_gib=1.0, host_per_node_gib=0.0, device_gib=None
        ),
        checkpointing="none",
        loss_chunk_tokens=1024,
        liger=False,
        peak=PeakMemory(
            states_gib=1.0,
            buckets_gib=0.1,
            stages=(StageMemory(name="loss", activations_gib=0.1, gathered_gib=0.1, gradients_gib=0.1, temporary_gib=0.1),),
            fragmentation_gib=0.0,
            runtime_gib=0.0,
            peak_gib=1.5,
            is_measured=False,
        ),
        checkpoint_bytes=10,
        saving=Saving(background=False, host_gib_per_node=0.0),
        limits=Limits(max_seconds=None),
        model=ModelFacts(path=None, tokenizer_path=None, num_params=1, num_params_exact=True, **numbers),
        data=None,
        provenance=Provenance(created_at="2026-01-31T09:15:00Z", launcher_version="0", python="3.11", packages={}),
    )
    return base.model_copy(update=parts)


def changed(plan: LaunchPlan, *overrides: str) -> LaunchPlan:
    """The plan with other settings and the same numbers."""
    return plan.model_copy(update={"config": with_overrides(plan.config, overrides)})


def run(made: LaunchPlan | Path, *attempts: Attempt, **status: Any) -> RunDir:
    """Create the run directory of a plan, or of the smallest plan for that folder, with these attempts and this status.

    The status names the newest attempt, and an attempt keeps its `submitted_at`.
    """
    run = run_store.create(plan(made, SETTINGS) if isinstance(made, Path) else made)
    for number, attempt in enumerate(attempts, 1):
        run_store.create_attempt(run, attempt)
        if attempt.submitted_at is not None:
            run_store.write_attempt(run, number, attempt)
    run_store.update_status(run, **{"attempt": len(attempts), **status})
    return run


def record(run: RunDir, attempt: int, kind: str, **values: Any) -> None:
    """Append an event to the journal of an attempt; `values` are those of its JSON object."""
    journal.append(run, attempt, json_records.decode(journal.KINDS[kind], values, kind))


def end(run: RunDir, attempt: int = 1, **values: Any) -> None:
    """Append the verdict on an attempt, by default a failure."""
    record(run, attempt, "AttemptConcluded", **{"state": "failed", "cause": Cause.FAILURE, **values})


def end_of(run: RunDir | Path, attempt: int = 1) -> dict[str, Any]:
    """The verdict on an attempt as its JSON object; empty without one."""
    verdict = journal.read_end(run if isinstance(run, RunDir) else RunDir(run), attempt)
    return {} if verdict is None else json.loads(json.dumps(json_records.encode(verdict)))


def causes_of(run: RunDir | Path) -> list[str]:
    """Why each attempt ended, oldest first."""
    of = run if isinstance(run, RunDir) else RunDir(run)
    return [verdict["cause"] for number in run_store.attempt_numbers(of) if (verdict := end_of(of, number))]


def checkpoint(
    run: RunDir | Path,
    step: int,
    loss: float | None = None,
    attempt: int = 1,
    files: Mapping[str, bytes] = dict.fromkeys(map(store.shard_name, range(2)), b"x" * 1000),
    digest: str = "d",
    needed_bytes: int = 1,
) -> Path:
    """Commit a checkpoint of a run, or in a folder of checkpoints; by default of two ranks, of a thousand bytes each."""
    root = run.checkpoints if isinstance(run, RunDir) else run
    saving = store.begin_save(root, step=step, attempt=attempt, needed_bytes=needed_bytes)
    written = {name: atomic_files.write_file(saving / name, [content]) for name, content in files.items()}
    num_ranks = len(files.keys() - {STATE})
    return store.commit(
        saving,
        Manifest(step=step, world_size=num_ranks, plan_digest=digest, attempt=attempt, eval_loss=loss, files=written),
    )


def event_texts(run: RunDir, kind: str = "alert") -> list[str]:
    """Return the texts of a run's events of this kind."""
    return [event["text"] for event in read_events(run.events) if event["kind"] == kind]


def made_verdict() -> EvaluationVerdict:
    """A verdict on 200 prompts in which fine-tuning helped; each model's correct answers are its first ones."""

    def scores(right: int) -> np.ndarray:
        return (np.arange(NUM_PROMPTS) < right).astype(np.float64)

    verdict = judge(
        "exact_match",
        {side: scores(right) for side, right in SIDES.items()},
        others={
            "token_f1": {side: 0.2 + scores(right) * 0.8 for side, right in SIDES.items()},
            "stopped": {side: scores(200 if side == "tuned" else 150) for side in SIDES},
        },
        general_loss=GeneralLoss(2.50, 2.51),
    )
    prompts = [f"Question {n}:\nHow many <b>apples</b> are {n} apples, says {TOKEN}?" for n in range(NUM_PROMPTS)]
    references = [str(number) for number in range(NUM_PROMPTS)]
    answers = {
        side: [reference if number < right else f"{'many ' * 600}" for number, reference in enumerate(references)]
        for side, right in SIDES.items()
    }
    usage = {
        "0-shot": SideUsage(NUM_PROMPTS, 60 * NUM_PROMPTS, 30 * NUM_PROMPTS, 40.0),
        "8-shot": SideUsage(NUM_PROMPTS, 1_260 * NUM_PROMPTS, 25 * NUM_PROMPTS, 90.0),
        "tuned": SideUsage(NUM_PROMPTS, 40 * NUM_PROMPTS, 5 * NUM_PROMPTS, 12.5),
    }
    return replace(with_examples(verdict, prompts, references, answers), usage=usage)
