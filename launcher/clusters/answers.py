"""Where answers from a run's checkpoints come from during training (eval.answers_every), and a description of their cost."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from launcher.clusters.backends import evaluation_nodes_for

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig
    from launcher.plan.launch_plan import LaunchPlan


class AnswerSource(StrEnum):
    """Which machines answer, and when."""

    BESIDE_TRAINING = "on this machine at low priority beside training; what is left, before the run ends"
    AFTER_TRAINING = "on the GPUs of this machine after the last step, before the run ends"
    JOBS = "in a job of one node for each of these steps, one after another"
    NODES = "on idle GPUs of the cluster during training; no more after the last step"


def answer_source(config: RunConfig, device: str) -> AnswerSource:
    """Return where answers come from for a run on `device` (cpu or cuda)."""
    nodes = evaluation_nodes_for(config.cluster.kind)
    if nodes is not None and nodes.runs_elsewhere(config):
        return AnswerSource.JOBS if nodes.SUBMITS_JOBS else AnswerSource.NODES
    return AnswerSource.AFTER_TRAINING if device == "cuda" else AnswerSource.BESIDE_TRAINING


def describe_answers(plan: LaunchPlan) -> str:
    """Describe how often prompts are answered, how many, and where."""
    config, steps = plan.config, plan.batch.max_steps
    every = config.eval.answers_every
    times = f" ({steps // every} times)" if steps is not None else ""
    prompts = f"up to {config.evaluate.max_prompts:,} prompts of each set, of up to {config.evaluate.max_new_tokens:,} tokens"
    return f"every {every} steps{times}: {prompts}; {answer_source(config, plan.topology.device)}"
