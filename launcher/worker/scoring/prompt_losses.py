"""The likelihood of current prompts and of training prompts, under the tuned model and the run's initial model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from launcher import hardware
from launcher.checkpoint import store
from launcher.data.checks import patterns
from launcher.errors import LauncherError
from launcher.evaluate.drift.comparison import Prompt, shorten
from launcher.evaluate.drift.likelihood import (
    PromptLikelihoods,
    UnlikelyPrompt,
    compare_losses,
    find_shared_ends,
    span_between,
)
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.quantities import format_size
from launcher.plan.run_dir import RunDir
from launcher.run_records import read_export
from launcher.tracking.metrics import format_duration
from launcher.worker.scoring.documents import DocumentGroup, ScoredDocument, score_documents
from launcher.worker.scoring.passes import Progress
from launcher.worker.scoring.weights import ScoredWeights, find_weights

# Prompts per side: enough for the test to find relevant differences.
MAX_PROMPTS = 200
_MAX_TOKENS = {"cpu": 12_288, "cuda": 131_072}
BASE, TUNED = "base", "tuned"
# Unrequested scoring may take at most a few minutes on a CPU. The operations per second and core are a low estimate.
_MAX_CPU_S, _FLOPS_OF_CORE = 180.0, 5e10
# A factor for the memory that scoring needs beyond the weights, and the share of a machine's memory that it may use.
_MEMORY_FACTOR, _MEMORY_SHARE = 1.2, 0.5
_NUM_LEAST_LIKELY = 5
_ON_CPU = "start the command on a machine with a GPU, or add --likelihood to score prompts on this CPU"


def find_obstacle(plan: LaunchPlan) -> str:
    """Return why this machine does not score prompts unless requested; empty if it does."""
    device, model = hardware.device(), plan.model
    num_bytes = model.num_params * (4 if plan.config.model.dtype == "fp32" else 2) * _MEMORY_FACTOR
    if device.kind == "cuda":
        is_offloaded = "offload_param" in plan.deepspeed["zero_optimization"]
        available = (device.memory_gib or 0) * device.count * 2**30
        if available and num_bytes > available and not is_offloaded:
            return f"the model needs {format_size(int(num_bytes))}, and the GPUs have {format_size(int(available))}"
        return ""
    if num_bytes > (device.host_memory_gib or 0) * 2**30 * _MEMORY_SHARE:
        return f"this machine has no GPU, and the model needs {format_size(int(num_bytes))} of its memory; {_ON_CPU}"
    # Two models, each with current and training prompts.
    seconds = 2 * 2 * _MAX_TOKENS[device.kind] * 2 * model.num_params / (device.count * _FLOPS_OF_CORE)
    if seconds > _MAX_CPU_S:
        return f"this machine has no GPU, and scoring takes up to {format_duration(seconds)}; {_ON_CPU}"
    return ""


def compare_likelihoods(
    plan: LaunchPlan, run: RunDir, prompts: Sequence[Prompt], training: Sequence[Prompt], is_required: bool, on_progress: Progress
) -> PromptLikelihoods:
    """Score both sides' prompts under both models. Stored scores are not recomputed.

    Raises:
        LauncherError: if a pass fails, or, with `is_required`, if the run has no weights of the tuned model.
    """
    models: dict[str, ScoredWeights] = {}
    gaps = []
    for name in (BASE, TUNED):
        try:
            models[name] = find_weights(run, plan, 0 if name == BASE else _exported_step(run))
        except LauncherError as error:
            if is_required and name == TUNED:
                raise
            gaps.append(f"{name} model: {error.problems[0].message}")
    shared = find_shared_ends([one.tokens for one in training])
    sides = [_choose(side, shared, plan.config.data.max_length) for side in (prompts, training)]
    if not all(sides):
        return PromptLikelihoods({}, ("every prompt has the same text",))
    # Training prompts are scored only once, whatever they are compared with.
    groups = [
        DocumentGroup(title, [document for _, document in side])
        for title, side in zip(("prompts", "training prompts"), sides, strict=True)
    ]
    # All tokens of training documents are trained, including prompts.
    has_trained_prompts = plan.config.data.train_on == "all"
    compared, least_likely = {}, tuple[UnlikelyPrompt, ...]()
    for name, weights in models.items():
        titled = [DocumentGroup(f"{name} model, {one.title}", one.documents) for one in groups]
        now, before = (
            np.array([-log_probs.mean() for log_probs in several], dtype=np.float64)
            for several in score_documents(plan, weights, titled, on_progress)
        )
        compared[name] = compare_losses(weights.step, now, before, name == BASE or not has_trained_prompts)
        if name == TUNED:
            order = np.argsort(-now, kind="stable")[:_NUM_LEAST_LIKELY]
            least_likely = tuple(_describe(sides[0][i][0], float(now[i])) for i in order)
    return PromptLikelihoods(compared, tuple(gaps), least_likely)


def _exported_step(run: RunDir) -> int | None:
    """Return the step whose weights are the run's result, or None for the newest step."""
    record = read_export(run)
    steps = [one.step for one in store.list_checkpoints(run.checkpoints)]
    return record.step if record is not None and record.step in steps else None


def _choose(
    prompts: Sequence[Prompt], shared: tuple[tuple[int, ...], tuple[int, ...]], max_length: int
) -> list[tuple[Prompt, ScoredDocument]]:
    """Return the first prompts (a random sample) as documents without a loss on the tokens that all prompts share."""

    def documents() -> Iterator[tuple[Prompt, ScoredDocument]]:
        num_tokens, max_tokens = 0, _MAX_TOKENS[hardware.device().kind]
        for prompt in prompts[:MAX_PROMPTS]:
            begin, end = span_between(prompt.tokens, *shared)
            document = ScoredDocument.of(prompt.tokens[: min(max_length, max_tokens)], begin, end)
            num_tokens += len(document.tokens)
            if num_tokens > max_tokens:
                return
            if any(document.is_scored):
                yield prompt, document

    return list(documents())


def _describe(prompt: Prompt, loss: float) -> UnlikelyPrompt:
    return UnlikelyPrompt(prompt.where, loss, shorten(patterns.redact([prompt.shown])[0]))
