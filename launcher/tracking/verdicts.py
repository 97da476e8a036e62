"""An evaluation's findings: `verdict.json` in its folder, which `report` and W&B also read."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from launcher.plan.run_dir import RunDir, parse_step
from launcher.runs import atomic_files, json_records

FILE_NAME = "verdict.json"
TUNED = "tuned"
# The folder of an evaluation with a verdict per lm-evaluation-harness task.
BENCHMARKS = "benchmarks"
# The loss on general text may rise by this share of its value before training.
_MAX_RISE = 0.05


class ComparisonOutcome(StrEnum):
    """How the tuned model compares with a baseline, or with all of them."""

    BETTER = "better"
    WORSE = "worse"
    UNCLEAR = "unclear"


@dataclass(frozen=True)
class BaselineComparison:
    """The tuned model against one baseline on one metric and the same prompts.

    `difference` is the tuned model's mean minus the baseline's; `low` and `high` bound it with 95% confidence, None if there
    are too few prompts for bounds. `p_value` comes from McNemar's exact test, None if enough pairs differ for the interval to
    decide. `prompts_needed` is the number that would show the observed difference, or None if the outcome is clear.
    `win_examples`, `loss_examples` and `tie_examples` are prompt numbers, largest differences first.
    """

    metric: str
    baseline: str
    outcome: ComparisonOutcome
    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    wins: int
    losses: int
    ties: int
    prompts_needed: int | None = None
    win_examples: tuple[int, ...] = ()
    loss_examples: tuple[int, ...] = ()
    tie_examples: tuple[int, ...] = ()


@dataclass(frozen=True)
class AnswerExample:
    """A prompt with its reference and each side's answer, shortened and without credentials.

    `kind` is `win`, `loss` or `tie`: how the tuned model compares with `baseline`.
    """

    kind: str
    baseline: str
    prompt: str
    reference: str
    answers: dict[str, str]


@dataclass(frozen=True)
class SideUsage:
    """Tokens in all prompts and answers of one side of an evaluation; `gpu_s` is GPU seconds of generation, None if unknown."""

    num_prompts: int
    prompt_tokens: int
    answer_tokens: int
    gpu_s: float | None = None


@dataclass(frozen=True)
class GeneralLoss:
    """The loss on general text (eval.forgetting) before training and at the evaluated step.

    `measured_at` is the earlier step of the last measurement, if it differs from the evaluated step.
    """

    before: float
    after: float
    measured_at: int | None = None

    @property
    def is_forgetting(self) -> bool:
        return self.after > self.before * (1 + _MAX_RISE)


@dataclass(frozen=True)
class EvaluationVerdict:
    """verdict.json: whether fine-tuning helped.

    `means` holds each side's mean score by metric, `comparisons` one comparison per metric and baseline. The primary metric
    comes first in both; `outcome` and `sentence` refer to it. `checkpoint` is the digest of the evaluated checkpoint's manifest,
    empty if the run kept no checkpoint at that step.
    """

    metric: str
    outcome: ComparisonOutcome
    sentence: str
    num_prompts: int
    means: dict[str, dict[str, float]]
    comparisons: tuple[BaselineComparison, ...]
    general_loss: GeneralLoss | None = None
    examples: tuple[AnswerExample, ...] = ()
    usage: dict[str, SideUsage] = field(default_factory=dict)
    checkpoint: str = ""

    @property
    def sides(self) -> list[str]:
        """The baselines, then the tuned model."""
        return [*(side for side in self.means[self.metric] if side != TUNED), TUNED]

    @property
    def primary(self) -> tuple[BaselineComparison, ...]:
        """The comparisons on the primary metric, one for each baseline."""
        return tuple(one for one in self.comparisons if one.metric == self.metric)

    @property
    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: each metric with each side's mean and the difference from each baseline."""
        baselines = self.sides[:-1]
        header = ["metric", *self.sides, *(f"difference to {name}" for name in baselines)]
        differences = {(one.metric, one.baseline): format_difference(one) for one in self.comparisons}
        rows = [
            [metric, *(f"{means[side]:.3f}" for side in self.sides), *(differences[metric, name] for name in baselines)]
            for metric, means in self.means.items()
        ]
        return header, rows

    def write(self, folder: Path) -> None:
        """Write verdict.json to the evaluation's folder, atomically."""
        json_records.write(folder / FILE_NAME, self)


@dataclass(frozen=True)
class SetVerdict:
    """The verdict on one evaluation set at one step; `set_name` is empty if an evaluation has a single unnamed set."""

    step: int
    set_name: str
    verdict: EvaluationVerdict


def format_difference(comparison: BaselineComparison) -> str:
    """Return `+0.12 (0.08 to 0.16)`: a difference with its bounds."""
    if comparison.low is None or comparison.high is None:
        return f"{comparison.difference:+.2f}"
    # Adding 0 turns -0.0 into 0.0.
    low, high = comparison.low + 0.0, comparison.high + 0.0
    # Two digits would hide which side of zero a bound is on.
    digits = 2 if all(abs(bound) >= 0.005 or bound == 0 for bound in (low, high)) else 3
    return f"{comparison.difference:+.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def read_verdict(folder: Path) -> EvaluationVerdict | None:
    """Return the verdict in an evaluation's folder, or None if the evaluation has not ended.

    Raises:
        DamagedRun: if the file cannot be read or is damaged.
    """
    remedy = "remove the file and evaluate again; existing answers are used"
    return json_records.read_if_present(EvaluationVerdict, folder / FILE_NAME, remedy)


def remove_verdicts(folder: Path) -> None:
    """Remove the verdicts of an evaluation that is being repeated: its settings or weights may differ."""
    for file in (folder / FILE_NAME, *folder.glob(f"*/{FILE_NAME}")):
        file.unlink(missing_ok=True)


def digest_checkpoint(run: RunDir, step: int) -> str:
    """Return a digest of the manifest of a step's checkpoint, which contains its files' digests; empty if there is none."""
    return _digest_manifest(run.checkpoints / f"step-{step:08d}")


def _digest_manifest(checkpoint: Path) -> str:
    try:
        return atomic_files.digest_file(checkpoint / "manifest.json").xxh3_128
    except OSError:
        return ""


def is_current(verdict: EvaluationVerdict, run: RunDir, step: int) -> bool:
    """Return whether a verdict is about its step's current checkpoint.

    A resume from an earlier step may have replaced the checkpoint, or set it aside. One that retention removed stays current.
    """
    if not verdict.checkpoint:
        return True
    digest = digest_checkpoint(run, step)
    if digest:
        return digest == verdict.checkpoint
    return all(_digest_manifest(folder) != verdict.checkpoint for folder in run.checkpoints.glob(f"aside-step-{step:08d}*"))


def read_newest_verdict(run: RunDir) -> SetVerdict | None:
    """Return the verdict on the first set at the newest evaluated step, or None if there is none.

    Raises what `read_verdict` raises.
    """
    for step, folder in reversed(_evaluated_folders(run)):
        verdict = read_verdict(folder)
        if verdict is not None and is_current(verdict, run, step):
            return SetVerdict(step, "", verdict)
    return None


@dataclass(frozen=True)
class VerdictsBySteps:
    """The verdicts on one set at several steps, in ascending order."""

    set_name: str
    verdicts: tuple[SetVerdict, ...]

    @property
    def metric(self) -> str:
        """The primary metric of the newest verdict."""
        return self.verdicts[-1].verdict.metric

    @property
    def means(self) -> dict[str, list[float | None]]:
        """Each side's mean score on the primary metric at each step, or None if a step has no such side."""
        sides = dict.fromkeys(side for one in reversed(self.verdicts) for side in one.verdict.sides)
        return {side: [one.verdict.means.get(self.metric, {}).get(side) for one in self.verdicts] for side in sides}

    @property
    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: each step with each side's mean and the outcome."""
        columns = self.means
        rows = [
            [
                f"{one.step:,}",
                *("-" if means[i] is None else f"{means[i]:.3f}" for means in columns.values()),
                one.verdict.outcome.value,
            ]
            for i, one in enumerate(self.verdicts)
        ]
        return ["step", *(f"{self.metric}, {side}" for side in columns), "outcome"], rows


def by_steps(verdicts: list[SetVerdict]) -> list[VerdictsBySteps]:
    """Return the verdicts of sets that were evaluated at several steps."""
    several: dict[str, list[SetVerdict]] = {}
    for one in verdicts:
        several.setdefault(one.set_name, []).append(one)
    return [VerdictsBySteps(name, tuple(those)) for name, those in several.items() if len(those) > 1]


def read_verdicts(run: RunDir) -> list[SetVerdict]:
    """Return a run's verdicts by step and set, in ascending order. Raises what `read_verdict` raises.

    Verdicts on a checkpoint that was replaced, after a resume from an earlier step, by another at the same step are left out.
    """
    verdicts = []
    for step, folder in _evaluated_folders(run):
        sets, tasks = (sorted(file.parent for file in folder.glob(f"{way}*/{FILE_NAME}")) for way in ("", f"{BENCHMARKS}/"))
        # The verdict beside the sets repeats the first set's.
        for one in [*(sets or [folder]), *tasks]:
            verdict = read_verdict(one)
            if verdict is not None and is_current(verdict, run, step):
                verdicts.append(SetVerdict(step, "" if one == folder else one.name, verdict))
    return verdicts


def _evaluated_folders(run: RunDir) -> list[tuple[int, Path]]:
    """Return the folders of evaluations with their steps, in ascending order."""
    folders = ((parse_step(folder.name), folder) for folder in run.evaluations.glob("step-*"))
    return sorted((step, folder) for step, folder in folders if step is not None)
