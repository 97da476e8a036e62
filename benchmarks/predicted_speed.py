"""Compare a plan's time model with runs on this machine's CPUs.

    python benchmarks/predicted_speed.py [--rounds N] [--steps N] [--cpu-seconds] [--only CASE ...]

For each configuration, the benchmark measures this machine's rates at the plan's shapes (cpu_rates.py) and then trains with
`python -m launcher train`. launcher/plan/sizing/step_time.py predicts the step time from those rates. The rates do not contain
the factors of four parts, which are fitted to the configurations marked "fit"; only the errors of the others are meaningful.

--cpu-seconds measures rates and steps in CPU seconds of a rank's process, for a machine that other programs use too. Both then
exclude the time that ranks wait for each other.

On CPUs nothing overlaps: ranks wait for messages and for Python's hooks. The rates express this (no overlap, no device that runs
ahead); everything else is as on GPUs. CPU rates are valid only for this machine and are not stored.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sides
from cpu_sampler import CpuSampler
from steps import faster_half

from launcher.plan.deepspeed import WIDTHS
from launcher.plan.flops import train_flops
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.planner import planned_step
from launcher.plan.sizing.layers import Kernels, checkpointed_layers
from launcher.plan.sizing.step_time import Rates, StepTime, bytes_of_layers, bytes_of_loss

HERE = Path(__file__).resolve().parent
# Deviation from the plan beyond which a run sends an alert: launcher/train/monitoring/anomalies.py.
_LIMIT = 0.20
# The fitted factors. Those of products and attention are 1, because both are measured at their real shapes.
FACTORS = ("elementwise_s", "communication_s", "hooks_s", "optimizer_s")
# A relative error of this size in a step's time has the same weight as a factor of 2 instead of 1.
_PRIOR = 0.02
_RATES_S = 300.0
_SHARED = (
    *("model=tiny", "data=stdlib_docs", "tracking=none", "eval.at_start=false", "eval.sample=false", "eval.every=0"),
    *("export.enabled=false", "checkpoint.save_every=0", "model.dtype=bf16", "model.attention=varlen", "train.epochs=null"),
)
_WIDTHS = {"narrow": (128, 384, 24), "small": (256, 768, 6), "middle": (384, 1024, 8), "wide": (512, 1536, 12)}


@dataclass(frozen=True)
class Case:
    """A configuration and what it is used for."""

    name: str
    is_fit: bool
    row_tokens: int
    overrides: tuple[str, ...]


@dataclass
class Outcome:
    """Measurements of a case, one per round: seconds per step, and the parts of a step by this machine's rates."""

    case: Case
    plan: LaunchPlan
    step_s: list[float] = field(default_factory=list)
    parts: list[StepTime] = field(default_factory=list)

    @property
    def measured_s(self) -> float:
        return statistics.median(self.step_s)

    def part_s(self, name: str) -> float:
        """Return the seconds of a part of the step: the median over rounds."""
        return statistics.median(getattr(step, name) for step in self.parts)

    def predicted_s(self, factors: Sequence[float]) -> float:
        fixed = self.part_s("products_s") + self.part_s("attention_s")
        return fixed + sum(factor * self.part_s(name) for name, factor in zip(FACTORS, factors, strict=True))


def _case(width: str, ranks: int, row: int, micro: int, batch: int, recomputed: str = "none", fit: bool = False) -> Case:
    hidden, inner, layers = _WIDTHS[width]
    config = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "head_dim": 64,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 128),
    }
    words = [f"model.config.{key}={value}" for key, value in config.items()]
    words += _batch(ranks, row, micro, batch, recomputed)
    return Case(_name(width, ranks, row, micro, batch, recomputed), fit, row, tuple(words))


def _batch(ranks: int, row: int, micro: int, batch: int, recomputed: str) -> tuple[str, ...]:
    return (
        *(f"cluster.ranks_per_node={ranks}", f"data.max_length={row}", f"train.micro_batch_size={micro}"),
        *(f"train.global_batch_size={batch}", f"model.activation_checkpointing='{recomputed}'"),
    )


def _name(width: str, ranks: int, row: int, micro: int, batch: int, recomputed: str) -> str:
    accumulation = batch // (ranks * micro)
    return f"{width}, {ranks} x {micro} x {accumulation} rows of {row}, recomputed: {recomputed}"


CASES = (
    _case("narrow", 1, 256, 1, 4, fit=True),
    _case("small", 1, 256, 1, 4, fit=True),
    _case("small", 2, 512, 1, 4, fit=True),
    _case("middle", 1, 1024, 1, 2, "all", fit=True),
    _case("middle", 2, 256, 2, 8, "every 2", fit=True),
    _case("wide", 1, 256, 4, 4, fit=True),
    _case("wide", 2, 512, 1, 2, fit=True),
    _case("narrow", 2, 512, 1, 4, fit=True),
    _case("small", 2, 1024, 1, 2, "all"),
    _case("middle", 1, 512, 1, 4),
    _case("middle", 2, 1024, 1, 2),
    _case("wide", 1, 1024, 1, 2, "every 2"),
    _case("wide", 2, 256, 2, 8, "all"),
    Case(_name("SmolLM2-135M", 1, 512, 1, 2, "none"), False, 512, ("model=demo", *_batch(1, 512, 1, 2, "none"))),
)


def main() -> None:
    parser = sides.parser(__doc__, rounds=1)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of each run")
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not measured")
    parser.add_argument("--cpu-seconds", action="store_true", help="measure CPU seconds of the ranks")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="leave out the cases whose names do not begin so")
    args = parser.parse_args()
    cases = [case for case in CASES if not args.only or case.name.startswith(tuple(args.only))]
    if not cases:
        parser.error(f"no case begins with {args.only}; the cases are: {'; '.join(case.name for case in CASES)}")
    with tempfile.TemporaryDirectory(prefix="launcher-bench-") as folder:
        built: set[int] = set()
        outcomes = [_prepare(case, Path(folder), args.steps, built) for case in cases]
        for round_number in range(args.rounds):
            for number, outcome in enumerate(outcomes):
                _measure(outcome, Path(folder) / f"{round_number}-{number}", args.steps, args.warmup, args.cpu_seconds)
                print(f"round {round_number + 1}: {_describe(outcome)}", flush=True)
    if len(outcomes) < len(CASES):
        return
    title = f"predicted speed, {len(outcomes)} configurations on CPUs"
    words = ("--rounds", args.rounds, "--steps", args.steps, *(["--cpu-seconds"] if args.cpu_seconds else []))
    command = sides.typed("predicted_speed.py", *words)
    model = "The prediction is that of `launcher/plan/sizing/step_time.py` with rates that `benchmarks/cpu_rates.py` measured."
    sides.record(
        args.results, "predicted speed", title, f"{sides.FROM_TRAIN} {model}", command, table(outcomes, args.cpu_seconds)
    )


def _prepare(case: Case, folder: Path, steps: int, built: set[int]) -> Outcome:
    """Build the data cache, unless `built` contains its row length, and the plan; return them as an outcome."""
    words = _overrides(case, steps)
    command = [sys.executable, "-m", "launcher"]
    if case.row_tokens not in built:
        sides.run([*command, "data", *words], folder / "data.log")
        built.add(case.row_tokens)
    return Outcome(case, sides.read_plan(sides.run([*command, "plan", "--json", *words], folder / "plan.log")))


def _overrides(case: Case, steps: int) -> tuple[str, ...]:
    shared = [one for one in _SHARED if not (one.startswith("model=") and case.overrides[0].startswith("model="))]
    return (*shared, *case.overrides, f"train.max_steps={steps}")


def _measure(outcome: Outcome, folder: Path, steps: int, warmup: int, counts_cpu: bool) -> None:
    """Measure this machine's rates at the plan's shapes, then train."""
    folder.mkdir()
    plan = outcome.plan
    shapes = folder / "shapes.json"
    shapes.write_text(json.dumps({**shapes_of(plan), "counts_cpu": counts_cpu}))
    ranks = str(plan.topology.world_size)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    output = sides.run([*command, str(HERE / "cpu_rates.py"), str(shapes)], folder / "rates.log", timeout_s=_RATES_S)
    measured = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    print(json.dumps(measured), flush=True)
    step = planned_step(plan, rates=rates_of(plan, measured))
    assert step is not None, outcome.case.name
    outcome.parts.append(step)
    prepared = sides.Prepared(folder, _overrides(outcome.case, steps), plan, steps, warmup)
    with CpuSampler(folder, plan.topology.world_size) as sampler:
        figures = sides.launcher_side(prepared, without_last_save=True)
    seconds = sampler.seconds_of_steps(warmup) if counts_cpu else [line["time/step_s"] for line in figures["metrics"]]
    outcome.step_s.append(faster_half(seconds))


def shapes_of(plan: LaunchPlan) -> dict[str, Any]:
    """Return the shapes with which the plan's model computes one micro-batch."""
    model = plan.model
    query, key = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    hidden, inner = model.hidden_size, model.intermediate_size
    return {
        "dtype": plan.config.model.dtype,
        "tokens": plan.batch.micro_batch_size * plan.config.data.max_length,
        "chunk_tokens": _chunk_tokens(plan),
        "hidden": hidden,
        "intermediate": inner,
        "vocab": model.vocab_size,
        "products": [*((hidden, one) for one in (query, key, key, inner, inner)), (query, hidden), (inner, hidden)],
        "doc_tokens": _doc_tokens(plan),
        "heads": model.num_heads,
        "kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
    }


def _chunk_tokens(plan: LaunchPlan) -> int:
    """Return the number of trained tokens in a micro-batch or in a loss chunk, whichever is smaller."""
    return max(1, min(round(_trained_tokens(plan)), plan.loss_chunk_tokens))


def _trained_tokens(plan: LaunchPlan) -> float:
    assert plan.data is not None
    tokens = plan.batch.micro_batch_size * plan.config.data.max_length
    return tokens * plan.data.num_trained_tokens / plan.data.num_tokens


def _doc_tokens(plan: LaunchPlan) -> int:
    assert plan.data is not None
    return max(1, round(plan.data.num_tokens / plan.data.num_docs))


def rates_of(plan: LaunchPlan, measured: dict[str, float]) -> Rates:
    """Return this machine's rates for one micro-batch of the plan, from the measurements of cpu_rates.py."""
    model, flops = plan.model, train_flops(plan.model)
    assert flops is not None
    tokens, length = plan.batch.micro_batch_size * plan.config.data.max_length, _doc_tokens(plan)
    trained, width = _trained_tokens(plan), WIDTHS[plan.config.model.dtype]
    recomputed = checkpointed_layers(plan.checkpointing, model.num_layers)
    share = sum(recomputed) / len(recomputed)
    again = 1 + share / 3
    products_s = model.num_layers * measured["layer_s"] * again + trained / _chunk_tokens(plan) * measured["head_s"]
    attention = (flops.of([length], 0) - flops.per_token * length) / (model.num_layers * measured["attention_s"])
    kernels = Kernels(width, plan.config.model.attention, plan.config.data.max_length)
    in_layers = tokens * bytes_of_layers(model, kernels, share)
    in_loss = bytes_of_loss(model, width, trained, plan.loss_chunk_tokens)
    elementwise_s = in_layers / measured["layer_bytes_per_s"] + in_loss / measured["loss_bytes_per_s"]
    return Rates(
        products=(tokens * flops.per_token * again + trained * flops.per_label) / products_s,
        attention=attention,
        memory=(in_layers + in_loss) / elementwise_s,
        copies=measured["copied_bytes_per_s"],
        states=measured["states_bytes_per_s"],
        in_node=measured["gathered_bytes_per_s"],
        reduce_factor=measured["reduce_factor"],
        half_tokens=0,
        overlap=0,
        runs_ahead=False,
    )


def fit(outcomes: Sequence[Outcome]) -> list[float]:
    """Return the values of FACTORS with the least squared relative errors; a factor stays near 1 without evidence."""
    rows, sums = [], []
    for outcome in outcomes:
        rows.append([outcome.part_s(name) / outcome.measured_s for name in FACTORS])
        sums.append(1 - (outcome.part_s("products_s") + outcome.part_s("attention_s")) / outcome.measured_s)
    prior = _PRIOR * np.eye(len(FACTORS))
    fitted, *_ = np.linalg.lstsq(np.vstack([rows, prior]), np.concatenate([sums, np.full(len(FACTORS), _PRIOR)]), rcond=None)
    return [max(0.0, float(factor)) for factor in fitted]


def _describe(outcome: Outcome) -> str:
    parts = (*("products_s", "attention_s"), *FACTORS)
    seconds = ", ".join(f"{name.removesuffix('_s')} {getattr(outcome.parts[-1], name):.3f}" for name in parts)
    return f"{outcome.case.name}: {outcome.step_s[-1]:.3f} s a step; by the rates: {seconds}"


def table(outcomes: Sequence[Outcome], counts_cpu: bool = False) -> list[str]:
    """Return a Markdown table of measured and predicted speeds, the errors of both halves, and the fitted factors."""
    factors = fit([outcome for outcome in outcomes if outcome.case.is_fit])
    seconds, rate = ("CPU s of a rank", "tokens for each CPU s of a rank") if counts_cpu else ("s", "tokens/s")
    lines = [
        f"| configuration: ranks x rows x micro-batches | used for | {seconds} a step | {rate}, measured | predicted | error |",
        "|---|---|---|---|---|---|",
    ]
    errors: dict[bool, list[float]] = {True: [], False: []}
    for outcome in outcomes:
        tokens, predicted_s = outcome.plan.batch.expected_tokens, outcome.predicted_s(factors)
        error = outcome.measured_s / predicted_s - 1
        errors[outcome.case.is_fit].append(abs(error))
        rates = f"{tokens / outcome.measured_s:,.0f} | {tokens / predicted_s:,.0f} | {error:+.1%}"
        lines.append(f"| {outcome.case.name} | {'fit' if outcome.case.is_fit else 'test'} | {outcome.measured_s:.3f} | {rates} |")
    lines.append("")
    for is_fit, label in ((True, "fit"), (False, "test")):
        if of_half := errors[is_fit]:
            within = sum(error <= _LIMIT for error in of_half)
            figures = f"median error {statistics.median(of_half):.1%}, worst {max(of_half):.1%}, {within} within {_LIMIT:.0%}"
            lines.append(f"{len(of_half)} configurations for the {label}: {figures}.")
    fitted = ", ".join(f"{name.removesuffix('_s')} {factor:.2f}" for name, factor in zip(FACTORS, factors, strict=True))
    lines.append(f"Time of each part relative to the measured rates: {fitted}. Matrix products and attention: 1.")
    return lines


if __name__ == "__main__":
    main()
