"""The generations of a run that started from another run's weights: their data, steps and evaluations, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher import run_store
from launcher.config.sections.evaluation import HELD_OUT
from launcher.errors import LauncherError
from launcher.plan.launch_plan import LaunchPlan, Origin
from launcher.plan.run_dir import RunDir
from launcher.run_records import read_export
from launcher.security import owners
from launcher.tracking.general_loss import read_general_loss
from launcher.tracking.jsonl import continued_lines, iter_lines
from launcher.tracking.metrics import STEP
from launcher.tracking.verdicts import ComparisonOutcome, EvaluationVerdict, GeneralLoss, SetVerdict, read_verdicts

HEADER = ["run", "step", "training data", "held-out loss", "general loss", "evaluation"]
_OUTCOMES = {
    ComparisonOutcome.BETTER: "helped",
    ComparisonOutcome.WORSE: "did not help",
    ComparisonOutcome.UNCLEAR: "the data cannot tell",
}


@dataclass(frozen=True)
class Generation:
    """One run in a chain, at the step whose weights the next run started from, or at its result's step for the last run.

    `gap` says why nothing else is known about the run, empty if its files were read. `held_out` is the loss before training and
    at the step. `verdicts` are the step's, or else those of the newest evaluated step.
    """

    run_name: str
    step: int
    gap: str = ""
    data: str = ""
    held_out: tuple[float | None, float | None] = (None, None)
    general_loss: GeneralLoss | None = None
    verdicts: tuple[SetVerdict, ...] = ()

    def cells(self) -> list[str]:
        """Return the cells below HEADER."""
        if self.gap:
            return [self.run_name, f"{self.step:,}", self.gap, "", "", ""]
        general = self.general_loss
        forgetting = "" if general is None else " (forgetting)" if general.is_forgetting else ""
        return [
            self.run_name,
            f"{self.step:,}",
            self.data,
            _change(*self.held_out),
            "-" if general is None else f"{_change(general.before, general.after)}{forgetting}",
            "; ".join(_describe(one, self.step) for one in self.verdicts) or "-",
        ]


def read_generations(run: RunDir, plan: LaunchPlan) -> list[Generation]:
    """Return a run's generations, oldest first; empty for a run that did not start from another run's weights.

    A run in the chain that is gone, replaced or another user's is named with the reason, and none of its files are read.
    """
    if plan.lineage is None:
        return []
    result = read_export(run)
    step = result.step if result is not None else run_store.read_status(run).step or 0
    origins = (plan.lineage, *plan.lineage.ancestors)
    return [*(_read_ancestor(origin, run.root.parent) for origin in reversed(origins)), _read(run, plan, step)]


def _read_ancestor(origin: Origin, root: Path) -> Generation:
    gap = "the run no longer exists"
    # A run may have been moved together with the runs that started from its weights.
    for folder in dict.fromkeys((Path(origin.run_dir), root / origin.run_name)):
        try:
            if not RunDir(folder).plan.is_file():
                continue
            run = run_store.find_run(str(folder), root)
            owners.require_run(run.root)
            plan = run_store.load_plan(run)
            if plan.wandb_id == origin.wandb_id:
                return _read(run, plan, origin.step)
            gap = "another run has its folder now"
        except OSError as error:
            gap = f"the run cannot be read: {error.strerror}"
        except LauncherError as error:
            gap = error.problems[0].message
    return Generation(origin.run_name, origin.step, gap)


def _read(run: RunDir, plan: LaunchPlan, step: int) -> Generation:
    verdicts = read_verdicts(run)
    newest = max((one.step for one in verdicts), default=step)
    shown = [one for one in verdicts if one.step == step] or [one for one in verdicts if one.step == newest]
    metric = f"eval/{HELD_OUT}/loss"
    losses = {line[STEP]: line[metric] for line in continued_lines(iter_lines(run.metrics, (metric,))) if metric in line}
    last = max((at for at in losses if 0 < at <= step), default=None)
    return Generation(
        run_name=plan.run_name,
        step=step,
        data=_describe_data(plan),
        held_out=(losses.get(0), None if last is None else losses[last]),
        general_loss=read_general_loss(run, step),
        verdicts=tuple(shown),
    )


def _describe_data(plan: LaunchPlan) -> str:
    names = ", ".join(source.name or source.path for source in plan.config.data.sources)
    return names if plan.data is None else f"{names} ({plan.data.num_docs:,} documents)"


def _describe(one: SetVerdict, step: int) -> str:
    verdict = one.verdict
    at = "" if one.step == step else f", step {one.step:,}"
    title = f"{one.set_name}{at}: " if one.set_name else f"step {one.step:,}: " if at else ""
    return f"{title}{_OUTCOMES[verdict.outcome]}, {_means(verdict)}" if verdict.comparisons else f"{title}{_means(verdict)}"


def _means(verdict: EvaluationVerdict) -> str:
    means = verdict.means[verdict.metric]
    against = [f"{means[side]:.2f} ({side})" for side in verdict.sides[:-1]]
    tuned = f"{verdict.metric.replace('_', ' ')} {means[verdict.sides[-1]]:.2f}"
    return f"{tuned} against {' and '.join(against)}" if against else tuned


def _change(before: float | None, after: float | None) -> str:
    if before is None:
        return "-" if after is None else f"{after:.4f}"
    return f"{before:.4f} before training" if after is None else f"{before:.4f} to {after:.4f}"
