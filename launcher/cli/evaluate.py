"""The verb `evaluate`: compare the tuned model with a well-prompted base model; collects answers, scores and the verdict."""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.cli.export import require_checkpoint
from launcher.cli.render import terminal
from launcher.cli.render.sections import ChartCurve, Charts, Items, LineChart, Part, Rows, Section, Table, Text, Tone
from launcher.cli.worker_process import ended_by_signals, run_reporting, run_worker
from launcher.clusters.backends import nodes_for
from launcher.config.command_line import override_key
from launcher.config.compose import compose_one
from launcher.config.resume import with_overrides
from launcher.config.schema import RunConfig
from launcher.errors import EXIT_CHECK_FAILED, ConfigError, Problem, RunError, SubmitError, did_you_mean
from launcher.hardware import device
from launcher.plan.gpu_types import Price, typical_price
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import json_records, locks, run_store
from launcher.runs.run_records import read_export
from launcher.security.folders import private_files
from launcher.security.redaction import redacted_command_line
from launcher.shell_commands import launcher_command, short_path
from launcher.tracking.metrics import format_duration
from launcher.tracking.verdicts import (
    TUNED,
    ComparisonOutcome,
    EvaluationVerdict,
    by_steps,
    format_difference,
    read_verdicts,
)

_EVALUATION, _NODE, _TASKS = (f"launcher.evaluate.{name}" for name in ("evaluation", "node", "tasks"))
_CHANGEABLE = ("evaluate.", "cluster.")
# W&B's own limits for startup and shutdown are shorter.
_WANDB_S = 300.0
_STDERR = 2
FEW_SHOT, BASE = "few-shot", "base"
_WHERE = "command line"
_MAX_STYLES = 12
_MAX_COPIES = 10
_KINDS = {"win": "better than", "loss": "worse than", "tie": "the same as"}
_TONES: dict[str, Tone] = {"better": "good", "worse": "bad"}
_BASELINE = re.compile(r"\d+-shot")
_FORM = "write --min-gain METRIC:BASELINE:GAIN, such as exact_match:few-shot:0.05"


def evaluate_run(arguments: argparse.Namespace) -> int:
    """Evaluate a run and print the verdict; returns 3 if --min-gain does not hold."""
    run_dir = run_store.find_own_run(arguments.run, arguments.root)
    plan = run_store.load_plan(run_dir)
    config = _change_settings(plan.config, arguments.overrides, plan.run_name)
    if arguments.tasks is None and (arguments.task_folder is not None or arguments.limit is not None):
        message = "--task-folder and --limit apply to tasks, but none are named"
        remedy = "add --tasks NAMES; evaluate.max_prompts=N is the number of held-out prompts"
        raise ConfigError(message, where=_WHERE, remedy=remedy)
    gains = parse_minimum_gains(arguments.min_gain, config.evaluate.metrics if arguments.tasks is None else None)
    step = _choose_step(run_dir, arguments.step)
    folder = run_dir.evaluation(step)
    with private_files():
        folder.mkdir(parents=True, exist_ok=True)
    words = ["--step", str(step), *(f"--min-gain={gain}" for gain in gains)]
    for flag, value in (("--tasks", arguments.tasks), ("--task-folder", arguments.task_folder), ("--limit", arguments.limit)):
        words += [] if value is None else [flag, str(value)]
    sets = [f"--set={name}" for name in arguments.set]
    # A run that still trains may have a newer checkpoint by then.
    again = launcher_command(
        "evaluate", short_path(run_dir.root), *arguments.overrides, *words, *sets, *(["--here"] if arguments.here else [])
    )
    nodes = nodes_for(config.cluster.kind)
    nodes = nodes if nodes is not None and nodes.runs_elsewhere(config) else None
    if arguments.tasks is not None and nodes is not None and device().kind != "cuda":
        # A login node's CPU would be too slow for a model that was trained on a cluster.
        raise SubmitError(
            "tasks are scored on this machine, which has no GPU",
            where="--tasks",
            value=f"the run's cluster is {config.cluster.kind}",
            remedy="start the command on a machine with a GPU, such as: srun --gpus 1 python -m launcher evaluate ...; or add "
            "cluster=local to use this machine's CPU",
        )
    try:
        with ended_by_signals(), _lock_evaluation(folder):
            if arguments.tasks is not None:
                shown = run_reporting(_TASKS, config, str(run_dir.plan), *words)
            else:
                with private_files():
                    run_reporting(_EVALUATION, config, "prepare", str(run_dir.plan), "--step", str(step), *sets)
                if nodes is not None and not arguments.here:
                    nodes.answer_prompts(config, run_dir, folder)
                else:
                    _generate_answers(folder, again)
                shown = run_reporting(_EVALUATION, config, "conclude", str(folder))
    except KeyboardInterrupt:
        print(f"what is done is kept; continue with: {again}", file=sys.stderr)
        raise
    results = shown["sets" if arguments.tasks is None else "tasks"]
    verdicts = {
        name: json_records.decode(EvaluationVerdict, result["verdict"], "the verdict")
        for name, result in results.items()
        if "verdict" in result
    }
    if arguments.tasks is None:
        priced = plan.model_copy(update={"config": config, "price": find_price(plan, config)})
        for name, verdict in verdicts.items():
            results[name]["costs"] = tabulate_costs(verdict, priced)
    failed = list[str]()
    for gain in gains:
        about = {name: verdict for name, verdict in verdicts.items() if gain.metric in verdict.means}
        failed += [
            f"{name}: {reason}" if len(results) > 1 else reason
            for name, verdict in about.items()
            if (reason := gain.failure(verdict)) is not None
        ]
        if not about:
            failed.append(f"--min-gain {gain} did not hold: no task has this metric")
    if arguments.json:
        print(json.dumps({**shown, "not_held": failed}, indent=2))
    else:
        parts = show_sets(shown) if arguments.tasks is None else show_tasks(shown)
        terminal.show(*parts, Items(failed, "bad"))
    _send_to_wandb(plan, run_dir, step)
    return EXIT_CHECK_FAILED if failed else 0


def _send_to_wandb(plan: LaunchPlan, run: RunDir, step: int) -> None:
    """Add the verdict to the W&B run, if there is one; a failure is reported as a line on standard error."""
    if plan.config.tracking.kind != "wandb" or plan.config.tracking.mode == "disabled":
        return
    command = [sys.executable, "-m", "launcher.tracking.wandb.tracker", str(run.root), str(step)]
    try:
        _, output = run_worker(command, stdout=subprocess.PIPE, timeout_s=_WANDB_S)
    except subprocess.TimeoutExpired:
        output = f"W&B: the verdict is not sent: no answer within {_WANDB_S:.0f} s"
    if output.strip():
        print("\n".join(terminal.to_lines(Items(output.strip().splitlines()))), file=sys.stderr)


def _change_settings(config: RunConfig, overrides: Sequence[str], run_name: str) -> RunConfig:
    problems = [
        Problem(
            f"{override.partition('=')[0]} cannot change in an evaluation: the run was trained with it",
            where=_WHERE,
            value=override,
            remedy="change settings of evaluate and cluster",
        )
        for override in overrides
        if "=" in override and "." in (key := override_key(override)) and not key.startswith(_CHANGEABLE)
    ]
    if problems:
        raise ConfigError(problems)
    if "cluster" in map(override_key, overrides):
        # The cluster differs from the run's, so its settings are composed anew.
        of_cluster = [override for override in overrides if override_key(override).startswith("cluster")]
        config = config.model_copy(update={"cluster": compose_one(of_cluster).config.cluster})
        overrides = [override for override in overrides if override not in of_cluster]
    return with_overrides(config, overrides, run_name)


def _choose_step(run: RunDir, step: int | None) -> int:
    """Return the step whose weights to evaluate: the requested step, the export's, or the newest checkpoint's."""
    record = read_export(run)
    if record is not None and step in (None, record.step):
        return record.step
    # During training, weights are exported for the evaluation before their checkpoint is removed.
    if step is not None and (run.evaluation(step) / "weights.json").is_file():
        return step
    return require_checkpoint(run, step)


@contextmanager
def _lock_evaluation(folder: Path) -> Iterator[None]:
    """Hold the lock of an evaluation."""
    lock = folder / ".lock"
    try:
        with locks.hold(lock, 0.0, redacted_command_line(), mode=0o600):
            yield
    except locks.LockTimeout:
        raise SubmitError(
            "another command is evaluating this step",
            where=short_path(folder),
            value=str(locks.read_holder(lock) or ""),
            remedy="wait until it ends, or end it",
        ) from None


def _generate_answers(folder: Path, again: str) -> None:
    """Generate all answers on this machine; `again` is the command that continues."""
    here = device()
    num_gpus = here.count if here.kind == "cuda" else 0
    command = [sys.executable, "-u", "-m", _NODE, str(folder), "0", "1", str(num_gpus)]
    # Standard output is for the verdict.
    code, _ = run_worker(command, stdout=_STDERR)
    if code:
        raise RunError(
            f"the answers are not complete: a process ended with exit code {code}; its messages are above",
            where=short_path(folder),
            remedy=f"continue with: {again}",
        )


def show_sets(shown: dict[str, Any]) -> list[Part]:
    """Return what `evaluate` shows, from the answer of launcher.evaluate.evaluation and the costs of each set."""
    parts: list[Part] = [Text(f"{shown['run']}, step {shown['step']}")]
    for name, result in shown["sets"].items():
        verdict = result["verdict"]
        inner: list[Part] = [Section("", [_make_table(result["header"], result["rows"])])]
        if result["costs"]:
            inner.append(Section("requests like these", [_make_table(*result["costs"])]))
        styles = [f"{side}: {style}" for side, style in result["styles"].items()]
        inner.append(Section("", [Items([*styles, *result["left_out"]])]))
        if copies := result["training_copies"]:
            more = [f"and {len(copies) - _MAX_COPIES:,} more"] if len(copies) > _MAX_COPIES else []
            inner.append(Section("prompts that are also in the training data", [Items([*copies[:_MAX_COPIES], *more])]))
        parts.append(Section(f"{name}: {verdict['sentence']}", inner, _TONES.get(verdict["outcome"], "")))
    if shown["overlap_gap"]:
        parts.append(Section("", [Text(shown["overlap_gap"])]))
    if shown["selection"]:
        best = sorted(shown["selection"], key=lambda one: -one["score"])[:_MAX_STYLES]
        styles = [f"{one['score']:.3f}  {one['style']}" for one in best]
        parts.append(Section("prompt forms of the base model, compared on training rows", [Items(styles)]))
    about = f"{shown['engine']}, {shown['dtype']}, {format_duration(shown['seconds'])}; answers in {short_path(shown['folder'])}"
    return [*parts, Section("", [Text(about)])]


def show_tasks(shown: dict[str, Any]) -> list[Part]:
    """Return what `evaluate --tasks` shows, from the answer of launcher.evaluate.tasks."""
    parts: list[Part] = [Text(f"{shown['run']}, step {shown['step']}")]
    for task, result in shown["tasks"].items():
        title, inner = f"{task}, {result['num_questions']:,} questions:", list[Part]()
        tone: Tone = ""
        if verdict := result.get("verdict"):
            title, tone = f"{title} {verdict['sentence']}", _TONES.get(verdict["outcome"], "")
            inner.append(Section("", [_make_table(result["header"], result["rows"])]))
        # For example BLEU: computed from all answers together, so its spread is unknown.
        for metric, values in result["whole"].items():
            means = ", ".join(f"{side} {value:.4g}" for side, value in values.items())
            inner.append(Text(f"{metric}, of all questions together: {means}"))
        parts.append(Section(title, inner, tone))
    return [*parts, Section("", [Text(f"scores in {short_path(shown['folder'])}")])]


def show_verdicts(run: RunDir, plan: LaunchPlan) -> list[Section]:
    """Return a run's evaluations for its page: sets that were evaluated at several steps, then each verdict, newest first."""
    verdicts, sections = read_verdicts(run), []
    for one in by_steps(verdicts):
        steps, name = [verdict.step for verdict in one.verdicts], one.set_name or "prompts"
        means = {side: [math.nan if mean is None else mean for mean in values] for side, values in one.means.items()}
        chart = LineChart(f"{one.metric} of {name}", [ChartCurve(side, steps, values) for side, values in means.items()], "step")
        header, rows = one.table
        sections.append(Section(f"{name}, by step", [Charts([chart]), Table(header, rows, range(len(header)))]))
    for newest in sorted(verdicts, key=lambda one: -one.step):
        verdict = newest.verdict
        parts: list[Part] = [Text(verdict.sentence), _make_table(*verdict.table)]
        has_tests = any(one.p_value is not None for one in verdict.primary)
        header = [f"{verdict.metric.replace('_', ' ')} against", "difference", "better", "worse", "same"]
        pairs = [
            [one.baseline, format_difference(one), f"{one.wins:,}", f"{one.losses:,}", f"{one.ties:,}"]
            + ([] if not has_tests else ["-" if one.p_value is None else f"p = {one.p_value:.2g}"])
            for one in verdict.primary
        ]
        parts += [_make_table([*header, *(["exact test"] if has_tests else [])], pairs)] if pairs else []
        if (costs := tabulate_costs(verdict, plan)) is not None:
            parts += [Text("Costs of requests like these.", "soft"), _make_table(*costs)]
        sides = [TUNED, *(side for side in verdict.sides if side != TUNED)]
        examples = [
            Section(
                f"{_KINDS.get(one.kind, one.kind)} {one.baseline}",
                [
                    Rows(
                        [
                            ("prompt", one.prompt),
                            ("reference", one.reference),
                            *((side, one.answers.get(side, "")) for side in sides),
                        ]
                    )
                ],
            )
            for one in verdict.examples
        ]
        parts += [Section(f"{len(examples)} answers, side by side", examples, is_folded=True)] if examples else []
        sections.append(Section(f"step {newest.step:,}" + (f", set {newest.set_name}" if newest.set_name else ""), parts))
    return sections


def _make_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return Table(header, rows, range(1, len(header)))


def find_price(plan: LaunchPlan, config: RunConfig) -> Price | None:
    """Return the price of a GPU under an evaluation's settings, which may choose a different cluster from the run's."""
    cluster, trained = config.cluster, plan.config.cluster
    if cluster.price_per_gpu_hour is not None:
        return Price(usd_per_gpu_hour=cluster.price_per_gpu_hour)
    if cluster.gpu_type is not None:
        return typical_price(cluster.gpu_type)
    is_same = cluster.kind == trained.kind and trained.price_per_gpu_hour is None and trained.gpu_type is None
    return plan.price if is_same else None


def tabulate_costs(verdict: EvaluationVerdict, plan: LaunchPlan) -> tuple[list[str], list[list[str]]] | None:
    """Return header and rows: tokens per request and the price of a million, for each side, or None if tokens are unknown."""
    usage = {side: verdict.usage[side] for side in verdict.sides if side in verdict.usage}
    if not usage:
        return None
    price = None if plan.price is None or plan.topology.device != "cuda" else plan.price.usd_per_gpu_hour
    header, rows = ["side", "prompt tokens", "answer tokens", *(["million requests here"] if price is not None else [])], []
    for side, one in usage.items():
        num_prompts = max(one.num_prompts, 1)
        rows.append([side, f"{one.prompt_tokens / num_prompts:,.0f}", f"{one.answer_tokens / num_prompts:,.0f}"])
        if price is not None:
            rows[-1].append("-" if one.gpu_s is None else f"${one.gpu_s / 3600 / num_prompts * 1e6 * price:,.0f}")
    return header, rows


@dataclass(frozen=True)
class MinimumGain:
    """A value of `--min-gain`: the lower bound of the difference from `baseline` in `metric` must be at least `gain`.

    `baseline` is `0-shot`, `8-shot` and so on, `few-shot` for every baseline with examples, or `base` for tasks.
    """

    metric: str
    baseline: str
    gain: float

    def __str__(self) -> str:
        return f"{self.metric}:{self.baseline}:{self.gain:g}"

    def failure(self, verdict: EvaluationVerdict) -> str | None:
        """Return why a verdict does not show the gain, or None if it does."""
        compared = [one for one in verdict.comparisons if one.metric == self.metric]
        if self.baseline == FEW_SHOT:
            compared = [one for one in compared if one.baseline != "0-shot"]
        else:
            compared = [one for one in compared if one.baseline == self.baseline]
        if not compared:
            baselines = ", ".join(dict.fromkeys(one.baseline for one in verdict.comparisons))
            return f"--min-gain {self} did not hold: {self.baseline} was not evaluated; baselines are {baselines or 'none'}"
        for one in compared:
            shown = f"the difference to {one.baseline} by {one.metric} is {format_difference(one)}"
            if one.low is None:
                return f"--min-gain {self} did not hold: there are too few prompts for a lower bound"
            if one.low < self.gain:
                return f"--min-gain {self} did not hold: {shown}, its lower bound is below {self.gain:g}"
            # If few pairs differ, the exact test decides too.
            if self.gain > 0 and one.p_value is not None and one.outcome != ComparisonOutcome.BETTER:
                num_differing = one.wins + one.losses
                return f"--min-gain {self} did not hold: {shown}, but with {num_differing} answers that differ it may be chance"
        return None


def parse_minimum_gains(texts: Iterable[str], metrics: Sequence[str] | None) -> tuple[MinimumGain, ...]:
    """Parse the values of --min-gain; `metrics` are the computed metrics, None for tasks, which have their own."""
    gains, problems = [], []
    for text in texts:
        # The metric may be path/to/file.py:function.
        metric, baseline, number = ([""] * 3 + text.rsplit(":", 2))[-3:]
        gain = math.nan
        with suppress(ValueError):
            gain = float(number)
        is_baseline = baseline == BASE if metrics is None else baseline == FEW_SHOT or _BASELINE.fullmatch(baseline)
        if not metric or not math.isfinite(gain) or not is_baseline:
            baselines = (
                f"of tasks is {BASE}" if metrics is None else f"is 0-shot, {FEW_SHOT}, or a number of examples such as 8-shot"
            )
            problems.append(Problem("--min-gain cannot be parsed", _WHERE, text, f"{_FORM}; a baseline {baselines}"))
        elif metrics is not None and metric not in metrics:
            remedy = f"{did_you_mean(metric, metrics)} metrics of this evaluation are {', '.join(metrics)}".strip()
            problems.append(Problem(f"--min-gain names {metric}, which is not computed", _WHERE, text, remedy))
        else:
            gains.append(MinimumGain(metric, baseline, gain))
    if problems:
        raise ConfigError(problems)
    return tuple(gains)
